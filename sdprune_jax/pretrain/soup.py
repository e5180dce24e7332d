"""A CLIP averaged with copies of itself that were tuned on more varied images."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from absl import logging
from jaxtyping import Array, Float, Key

from sdprune_jax import sharding
from sdprune_jax.data import emoji
from sdprune_jax.models import clip
from sdprune_jax.pretrain import contrastive
from sdprune_jax.training import loop


def average(
    tuning: loop.TrainingSettings,
    clip_config: clip.CLIPConfig,
    params: loop.Params,
    tokenizer: transformers.CLIPTokenizer,
    data: Mapping[str, emoji.Pairs],
    strengths: Sequence[float],
    whole_from: int,
) -> loop.Params:
    """Returns the mean of a CLIP and of a copy tuned at each strength of `warped`, on hard batches.

    What `contrastive.text_encoder` keeps stays as it is, so a UNet that reads it may be trained
    before. A copy generalises no better than the CLIP, their mean does.

    Args:
        tuning: the training of the first copy; others have the seeds and directories next to it.
        clip_config: the architecture.
        params: parameters of the CLIP.
        tokenizer: its tokenizer.
        data: pictures with their concepts, of the splits `train` and `val`.
        strengths: one for each copy.
        whole_from: step from which images are read whole, and not by half.

    Source: model soups, ICML 2022 (https://arxiv.org/abs/2203.05482).
    """
    params = jax.tree.map(sharding.to_host, params)
    frozen = contrastive.text_encoder(clip_config, params)[1]["text_model"]
    text = {name: x for name, x in params["text_model"].items() if name not in frozen}
    start = params | {"text_model": text}
    recall = functools.partial(
        contrastive.recall, clip_config, tokenizer=tokenizer, pairs=data["val"]
    )
    copies = [params]
    for number, strength in enumerate(strengths, start=1):
        seed, directory = tuning.seed + number, tuning.directory / f"tuned_{number}"
        own = dataclasses.replace(tuning, seed=seed, directory=directory)
        draw = contrastive.make_batches(
            clip_config, tokenizer, data["train"], own.batch_size, own.seed
        )
        loss_fn = contrastive.make_loss(clip_config, functools.partial(warped, strength=strength))
        batch_at = lambda step, draw=draw: draw(step, True, step >= whole_from)
        evaluate = lambda tuned: recall(contrastive.whole(tuned, frozen))
        tuned = loop.fit(own, loss_fn, start, batch_at, frozen, evaluate)
        copies.append(contrastive.whole(jax.tree.map(sharding.to_host, tuned), frozen))
    whole = mean(copies, frozen)
    logging.info("mean of %d CLIPs: %s", len(copies), recall(whole))
    return whole


def mean(copies: Sequence[loop.Params], frozen: loop.Params) -> loop.Params:
    """Averages all parameters but the frozen ones: the mean of equal numbers may round."""
    means = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *copies)
    return contrastive.whole(means, frozen)


def warped(
    images: Float[Array, "b h w 3"], key: Key[Array, ""], strength: float
) -> Float[Array, "b h w 3"]:
    """Turns, shears, resizes and recolours images on white, and moves them by up to 4 pixels.

    Args:
        images: values in [-1, 1].
        key: draws all changes.
        strength: 1 turns by up to 17 degrees and makes a tenth of the images grey; 0 moves only.
    """
    b, h, w, _ = images.shape
    keys = iter(jax.random.split(key, 10))
    draw = lambda low, high, *axes: jax.random.uniform(
        next(keys), (b, *axes), minval=low, maxval=high
    )
    angle, shear = draw(-0.3 * strength, 0.3 * strength), draw(-0.15 * strength, 0.15 * strength)
    rows = [[jnp.cos(angle), shear - jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]]
    turn = jnp.stack([jnp.stack(row, -1) for row in rows], -2)
    size = jnp.exp(draw(-0.25 * strength, 0.12 * strength, 2))
    move, middle = draw(-4, 4, 1, 1, 2), jnp.array([h - 1, w - 1], jnp.float32)[None, None] / 2
    pixels = jnp.stack(jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij"), -1) - middle
    places = jnp.einsum("bij,hwj->bhwi", turn / size[:, :, None], pixels) + middle[None] - move
    ink = _at(1 - images, places)  # 0 where the paper is white
    grey = ink.mean(-1, keepdims=True)
    saturation = draw(1 - 0.7 * strength, 1 + 0.3 * strength, 1, 1, 1)
    saturation *= draw(0, 1, 1, 1, 1) > 0.1 * strength
    ink = (grey + (ink - grey) * saturation) * draw(1 - 0.3 * strength, 1, 1, 1, 3)
    mix = jnp.eye(3)[None] + 0.12 * strength * jax.random.normal(next(keys), (b, 3, 3))
    ink = jnp.einsum("bhwi,bij->bhwj", ink, mix)
    contrast = jnp.exp(draw(-0.35 * strength, 0.35 * strength, 1, 1, 1))
    return 1 - 2 * jnp.clip(ink / 2, 1e-4, 1) ** contrast


def _at(
    images: Float[Array, "b h w c"], places: Float[Array, "b h w 2"]
) -> Float[Array, "b h w c"]:
    """Samples images bilinearly; beyond the edges they are 0."""
    sample = lambda channel, place: jax.scipy.ndimage.map_coordinates(
        channel, [place[0], place[1]], order=1, mode="constant"
    )
    one = jax.vmap(sample, in_axes=(2, None), out_axes=2)
    return jax.vmap(one)(images, jnp.moveaxis(places, -1, 1))
