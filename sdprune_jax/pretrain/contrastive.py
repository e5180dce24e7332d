"""The CLIP of a pretrained model: both towers from nothing, on images and drawn captions."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, Key

from sdprune_jax import config, pipeline
from sdprune_jax.data import captions, emoji, tokenizer
from sdprune_jax.metrics import embedded
from sdprune_jax.models import clip
from sdprune_jax.training import loop


def configure(section: config.PretrainCLIP, vocab_size: int) -> clip.CLIPConfig:
    """Two towers of one width, with SD2's exact GELU; ids as `tokenizer.train` lays them out."""
    shared = {
        "hidden_size": section.width,
        "intermediate_size": 4 * section.width,
        "num_attention_heads": section.heads,
        "hidden_act": "gelu",
        "projection_dim": section.width,
    }
    text = clip.TextConfig(
        **shared,
        vocab_size=vocab_size,
        num_hidden_layers=section.text_layers,
        max_position_embeddings=section.max_length,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=0,
    )
    vision = clip.VisionConfig(
        **shared,
        num_hidden_layers=section.vision_layers,
        image_size=emoji.SIZE,
        patch_size=section.patch_size,
    )
    return clip.CLIPConfig(text, vision, section.width)


def train_clip(
    section: config.PretrainCLIP,
    clip_config: clip.CLIPConfig,
    words: transformers.CLIPTokenizer,
    data: Mapping[str, emoji.Pairs],
    seed: int,
    mesh: Mesh,
    directory: pathlib.Path,
) -> loop.Params:
    """Trains both towers by the symmetric contrastive loss over the global batch.

    From step `hard_from` on, a batch is of a few subgroups of concepts, which are harder to tell
    apart than random ones. Up to step `whole_from`, the vision tower reads a random half of the
    patches of each image, in half the time.

    Sources: CLIP, ICML 2021, figure 3 (https://arxiv.org/abs/2103.00020); FLIP, CVPR 2023
    (https://arxiv.org/abs/2212.00794).
    """
    training, draw = section.training, make_batches(clip_config, words, data["train"])

    def batch_at(step):
        is_hard, is_whole = step >= section.hard_from, step >= section.whole_from
        return draw(step, training.batch_size, seed, is_hard, is_whole)

    params = loop.init_params(clip.clip_param_shapes(clip_config), seed)
    params["logit_scale"] = np.float32(np.log(1 / 0.07))
    evaluate = lambda params: recall(clip_config, params, words, data["val"])
    return loop.fit_section(
        training, make_loss(clip_config, varied), params, batch_at, {}, evaluate, seed, mesh,
        directory,
    )  # fmt: skip


def make_loss(
    clip_config: clip.CLIPConfig,
    vary: Callable[[Float[Array, "b h w 3"], Key[Array, ""]], Float[Array, "b h w 3"]],
) -> loop.LossFn:
    """The contrastive loss of images that are varied; `frozen` has layers of the text tower."""
    apply: Any = clip.CLIP(clip_config).apply

    def loss_fn(params, frozen, batch, key):
        shown = vary(pipeline.to_float(batch["images"]), key)
        params = whole(params, frozen)
        texts, pictures, scale = apply({"params": params}, batch["ids"], shown, batch.get("kept"))
        logits = jnp.minimum(scale, 100.0) * texts @ pictures.T
        same = batch["concept"][:, None] == batch["concept"][None]  # in another style: no negative
        logits = jnp.where(same & ~jnp.eye(len(same), dtype=bool), -jnp.inf, logits)
        both = jax.nn.log_softmax(logits, 0) + jax.nn.log_softmax(logits, 1)
        loss = -jnp.mean(jnp.diagonal(both)) / 2
        return loss, {"loss": loss, "scale": scale}

    return loss_fn


def whole(params: loop.Params, frozen: loop.Params) -> loop.Params:
    """With the layers of the text tower that do not learn, if there are any."""
    return params | {"text_model": params["text_model"] | frozen}


def make_batches(
    clip_config: clip.CLIPConfig, words: transformers.CLIPTokenizer, pairs: emoji.Pairs
) -> Callable[[int, int, int, bool, bool], dict[str, np.ndarray]]:
    """From step, size, seed, and whether concepts are alike and images whole, to a batch."""
    names = [concept.subgroup for concept in emoji.concepts()]
    subgroup = np.unique(names, return_inverse=True)[1][pairs.concept]
    length = clip_config.text.max_position_embeddings

    def draw(step, size, seed, is_hard, is_whole):
        groups = subgroup if is_hard else None
        rows = loop.rows_of_batch(len(subgroup), size, step, seed, groups)
        ids = draw_captions(words, pairs, rows, length, [seed, step])
        concept = pairs.concept[rows] if is_hard else np.arange(len(rows), dtype=np.int32)
        batch = {"images": pairs.images[rows], "ids": ids, "concept": concept}
        if not is_whole:
            batch["kept"] = halves(len(rows), clip_config.vision, [seed, step])
        return batch

    return draw


def recall(
    clip_config: clip.CLIPConfig,
    params: loop.Params,
    words: transformers.CLIPTokenizer,
    pairs: emoji.Pairs,
) -> dict[str, float]:
    """The share of pictures that find their concept among all: `val_r_at_1`, `val_r_at_10`."""
    scorer = embedded.Scorer(clip_config, params, words)
    pictures = np.asarray(pipeline.to_float(pairs.images))
    found = scorer.recall(pictures, pairs.concept, pairs.style)
    return {f"val_{name}": float(hits.mean()) for name, hits in found.items()}


def halves(
    count: int, vision: clip.VisionConfig, seed: list[int]
) -> Int32[np.ndarray, "count half"]:
    """A random half of the patches of each image."""
    patches = np.arange((vision.image_size // vision.patch_size) ** 2, dtype=np.int32)
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(patches, (count, 1)), axis=1)[:, : len(patches) // 2]


def draw_captions(
    words: transformers.CLIPTokenizer,
    pairs: emoji.Pairs,
    rows: np.ndarray,
    length: int,
    seed: list[int],
) -> Int32[np.ndarray, "n length"]:
    """Token ids of newly drawn captions of some rows."""
    rng = np.random.default_rng(seed)
    concepts, styles = emoji.concepts(), emoji.styles()
    texts = [
        captions.augmented(rng, concepts[pairs.concept[row]], styles[pairs.style[row]].word)
        for row in rows
    ]
    return tokenizer.encode(words, texts, length, warns=False)  # it would at every step


def varied(images: Float[Array, "b h w 3"], key: Key[Array, ""]) -> Float[Array, "b h w 3"]:
    """Images on white, each moved, resized and recoloured a little."""
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
    """The text tower without its last layer, on which Stable Diffusion 2 conditions."""
    last = clip_config.text.num_hidden_layers - 1
    kept = {k: v for k, v in params["text_model"].items() if k != f"encoder.layers.{last}"}
    return dataclasses.replace(clip_config.text, num_hidden_layers=last), {"text_model": kept}
