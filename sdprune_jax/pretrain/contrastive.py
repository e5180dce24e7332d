"""The CLIP of a pretrained model: both towers from nothing, on images and drawn captions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jaxtyping import Array, Float, Int32, Key

from sdprune_jax import pipeline
from sdprune_jax.data import captions, emoji
from sdprune_jax.data.order import rows_of_batch
from sdprune_jax.data.tokenizer import encode as tokenize
from sdprune_jax.metrics import embedded
from sdprune_jax.models import clip
from sdprune_jax.models.initial import init_params
from sdprune_jax.training import loop


def train_clip(
    training: loop.TrainingSettings,
    clip_config: clip.CLIPConfig,
    tokenizer: transformers.CLIPTokenizer,
    data: Mapping[str, emoji.Pairs],
    hard_from: int,
    whole_from: int,
) -> loop.Params:
    """Trains both towers by the symmetric contrastive loss over the global batch.

    From step `hard_from` on, a batch is of a few subgroups of concepts, which are harder to tell
    apart than random ones. Up to step `whole_from`, the vision tower reads a random half of the
    patches of each image, in half the time.

    Source: CLIP, ICML 2021, figure 3 (https://arxiv.org/abs/2103.00020); FLIP, CVPR 2023
        (https://arxiv.org/abs/2212.00794).
    """
    draw = make_batches(clip_config, tokenizer, data["train"], training.batch_size, training.seed)

    def batch_at(step):
        return draw(step, step >= hard_from, step >= whole_from)

    params = init_params(clip.clip_param_shapes(clip_config), training.seed)
    params["logit_scale"] = np.float32(np.log(1 / 0.07))
    evaluate = lambda params: recall(clip_config, params, tokenizer, data["val"])
    return loop.fit(training, make_loss(clip_config, varied), params, batch_at, {}, evaluate)


def make_loss(
    clip_config: clip.CLIPConfig,
    vary: Callable[[Float[Array, "b h w 3"], Key[Array, ""]], Float[Array, "b h w 3"]],
) -> loop.LossFn:
    """Makes the contrastive loss of varied images; frozen are some layers of the text tower."""
    apply: Any = clip.CLIP(clip_config).apply

    def loss_fn(params, frozen, batch, key):
        shown = vary(pipeline.to_float(batch["images"]), key)
        params = whole(params, frozen)
        texts, images, scale = apply({"params": params}, batch["ids"], shown, batch.get("kept"))
        logits = jnp.minimum(scale, 100.0) * texts @ images.T
        same = batch["concept"][:, None] == batch["concept"][None]  # in another style: no negative
        logits = jnp.where(same & ~jnp.eye(len(same), dtype=bool), -jnp.inf, logits)
        both = jax.nn.log_softmax(logits, 0) + jax.nn.log_softmax(logits, 1)
        loss = -jnp.mean(jnp.diagonal(both)) / 2
        return loss, {"loss": loss, "scale": scale}

    return loss_fn


def whole(params: loop.Params, frozen: loop.Params) -> loop.Params:
    """Adds the layers of the text tower that do not learn, if there are any."""
    return params | {"text_model": params["text_model"] | frozen}


def make_batches(
    clip_config: clip.CLIPConfig,
    tokenizer: transformers.CLIPTokenizer,
    pairs: emoji.Pairs,
    batch_size: int,
    seed: int,
) -> Callable[[int, bool, bool], dict[str, np.ndarray]]:
    """Returns a function that draws the batch of a step.

    It also takes whether the batch is of a few subgroups of concepts, and whether images are read
    whole.
    """
    names = [concept.subgroup for concept in emoji.concepts()]
    subgroup = np.unique(names, return_inverse=True)[1][pairs.concept]
    length = clip_config.text.max_position_embeddings

    def draw(step, is_hard, is_whole):
        groups = subgroup if is_hard else None
        rows = rows_of_batch(len(subgroup), batch_size, step, seed, groups)
        ids = draw_captions(tokenizer, pairs, rows, length, [seed, step])
        concept = pairs.concept[rows] if is_hard else np.arange(len(rows), dtype=np.int32)
        batch = {"images": pairs.images[rows], "ids": ids, "concept": concept}
        if not is_whole:
            batch["kept"] = halves(len(rows), clip_config.vision, [seed, step])
        return batch

    return draw


def recall(
    clip_config: clip.CLIPConfig,
    params: loop.Params,
    tokenizer: transformers.CLIPTokenizer,
    pairs: emoji.Pairs,
) -> dict[str, float]:
    """Returns the share of pictures that find their concept: `val_r_at_1`, `val_r_at_10`."""
    scorer = embedded.Scorer(clip_config, params, tokenizer)
    images = np.asarray(pipeline.to_float(pairs.images))
    hits = scorer.recall(images, pairs.concept, pairs.style)
    return {f"val_{name}": float(each.mean()) for name, each in hits.items()}


def halves(
    count: int, vision: clip.VisionConfig, seed: list[int]
) -> Int32[np.ndarray, "count half"]:
    """Draws a random half of the patches of each image."""
    patches = np.arange((vision.image_size // vision.patch_size) ** 2, dtype=np.int32)
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(patches, (count, 1)), axis=1)[:, : len(patches) // 2]


def draw_captions(
    tokenizer: transformers.CLIPTokenizer,
    pairs: emoji.Pairs,
    rows: np.ndarray,
    length: int,
    seed: list[int],
) -> Int32[np.ndarray, "n length"]:
    """Draws new captions of some rows, as token ids."""
    rng = np.random.default_rng(seed)
    concepts, styles = emoji.concepts(), emoji.styles()
    texts = [
        captions.augmented(rng, concepts[pairs.concept[row]], styles[pairs.style[row]].word)
        for row in rows
    ]
    return tokenize(tokenizer, texts, length, warns=False)  # it would at every step


def varied(images: Float[Array, "b h w 3"], key: Key[Array, ""]) -> Float[Array, "b h w 3"]:
    """Moves, resizes and recolours each image on white a little."""
    b, h, w, _ = images.shape
    keys = jax.random.split(key, 4)
    scale = jax.random.uniform(keys[0], (b, 2), minval=0.9, maxval=1.08)
    centre = jax.random.uniform(keys[1], (b, 2), minval=-3, maxval=3)  # pixels
    offset = (1 - scale) * jnp.array([h, w], jnp.float32)[None] / 2 + centre
    resample = lambda image, scale, offset: jax.image.scale_and_translate(
        image, image.shape, (0, 1), scale, offset, "linear"
    )
    ink = jax.vmap(resample)(1 - images, scale, offset)  # 0 where the paper is white
    grey = ink.mean(axis=-1, keepdims=True)
    saturation = jax.random.uniform(keys[2], (b, 1, 1, 1), minval=0.6, maxval=1.2)
    strength = jax.random.uniform(keys[3], (b, 1, 1, 3), minval=0.8, maxval=1.0)
    return 1 - (grey + (ink - grey) * saturation) * strength


def text_encoder(
    clip_config: clip.CLIPConfig, params: loop.Params
) -> tuple[clip.TextConfig, loop.Params]:
    """Returns the text tower less its last layer: what Stable Diffusion 2 conditions on."""
    last = clip_config.text.num_hidden_layers - 1
    kept = {k: v for k, v in params["text_model"].items() if k != f"encoder.layers.{last}"}
    return dataclasses.replace(clip_config.text, num_hidden_layers=last), {"text_model": kept}
