"""What the router and the experts are trained on: prompts, their embeddings, states and latents.

All of it is computed once, on all devices, and kept under a key of what it was made from.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int32, Key, Shaped, UInt8

from sdprune_jax import UserError, pipeline, sharding
from sdprune_jax.data import cache, emoji, pictures, tokenizer
from sdprune_jax.files import json_files, model_directory
from sdprune_jax.models import clip, noise_schedule, sentence, vae
from sdprune_jax.training import loop

_ROWS_PER_DEVICE = 32  # rows that a device encodes at once
_IN_MEMORY = 2**31  # bytes; larger arrays are written to disk as they are computed


class Noisy(NamedTuple):
    """Training inputs and targets of a denoiser."""

    latents: Float[Array, "b h w c"]
    timestep: Int[Array, " b"]
    target: Float[Array, "b h w c"]
    alpha_cumprod: Float[Array, " b"]


class Examples(NamedTuple):
    """What batches are made of; prompts of one picture are rows that follow one another."""

    embedding: Float[np.ndarray, "rows n"]  # what the router reads of every prompt
    states: Float[np.ndarray, "rows tokens d"]  # what the UNet reads of every prompt; float16
    null: Float[np.ndarray, "1 tokens d"]  # what the UNet reads of no text
    # Mean of the latents of every picture and, with flips, of its mirror image.
    mean: Float[np.ndarray, "images flips h w c"]
    log_variance: Float[np.ndarray, "images flips h w c"]  # log of the variance of the same latents

    def batch(self, rows: Int[np.ndarray, " b"], seed: Sequence[int]) -> dict[str, Any]:
        """Returns the examples of some prompts, mirrored or not as `seed` draws."""
        image = rows // (len(self.states) // len(self.mean))
        flip = np.random.default_rng(seed).integers(self.mean.shape[1], size=len(rows))
        return {
            "embedding": self.embedding[rows],
            "text": self.states[rows],
            "mean": self.mean[image, flip],
            "log_variance": self.log_variance[image, flip],
        }


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The encoders of a model, the devices that share the work, and where results are kept."""

    model: model_directory.ModelConfig
    mesh: Mesh
    cache_dir: pathlib.Path | None = None  # None keeps nothing
    variant: str | None = None  # variant of the model's files

    def load(self, component: str) -> loop.Params:
        return model_directory.load(self.model, component, dtype=np.float32, variant=self.variant)

    def tokenize(self, texts: Sequence[str]) -> Int32[np.ndarray, "rows tokens"]:
        own = tokenizer.load(self.model.directory / "tokenizer")
        return tokenizer.encode(own, texts, self.model.text_encoder.max_position_embeddings)

    def cached(self, name: str, inputs: Any, compute: Callable[[], cache.Arrays]) -> cache.Arrays:
        if self.cache_dir is None:
            return compute()
        return cache.cached(self.cache_dir, name, cache.fingerprint(*inputs()), compute)


def embed(
    encoders: Encoders, texts: Sequence[str], encoder: str = "text_encoder"
) -> Float[np.ndarray, "rows n"]:
    """Returns what the router reads of prompts.

    Args:
        encoders: the model, devices and cache.
        texts: the prompts.
        encoder: `text_encoder`, which is the model's own, or a directory of sentence-transformers.

    Raises:
        UserError: if the encoder is neither.
    """
    config = encoder_config(encoder, encoders.model)
    directory = pathlib.Path(encoder)
    if isinstance(config, clip.TextConfig):
        directory = encoders.model.directory / "text_encoder"

    def compute() -> cache.Arrays:
        if isinstance(config, clip.TextConfig):
            params, rows = encoders.load("text_encoder"), encoders.tokenize(texts)
            apply = functools.partial(_pooled_text, config)
        else:
            shapes = sentence.param_shapes(config)
            params = model_directory.load_params(directory, shapes, dtype=np.float32)
            rows = _ids_and_masks(directory, texts, config.max_tokens)
            apply = functools.partial(_pooled_sentence, config)
        return {"embedding": _apply(apply, params, rows.__getitem__, len(rows), encoders)}

    inputs = lambda: (cache.directory_state(directory), list(texts))
    return encoders.cached("embeddings", inputs, compute)["embedding"]


def encoder_config(
    encoder: str, model: model_directory.ModelConfig
) -> clip.TextConfig | sentence.SentenceConfig:
    """Returns the config of what embeds prompts for the router; either kind has a `hidden_size`.

    Raises:
        UserError: if the encoder is neither `text_encoder` nor a sentence encoder.
    """
    if encoder == "text_encoder":
        return model.text_encoder
    file = pathlib.Path(encoder) / "config.json"
    if not file.is_file():
        raise UserError(
            f"config.router.data.encoder is {encoder!r}, expected `text_encoder` or a"
            " directory of sentence-transformers, which has a config.json"
        )
    return sentence.SentenceConfig.from_json(json_files.read_json(file))


def encode(
    encoders: Encoders,
    images: emoji.Pairs | pictures.Stored,
    texts: Sequence[str],
    encoder: str = "text_encoder",
    flips: bool = False,
) -> Examples:
    """Computes all that a training needs of pictures and their prompts.

    Args:
        encoders: the model, devices and cache.
        images: the pictures.
        texts: the prompts, equally many of each picture.
        encoder: what embeds prompts for the router; see `embed`.
        flips: encode the mirror image of each picture too.

    Raises:
        UserError: if there is no picture, or as `embed`.
    """
    if not len(images.images):
        raise UserError("there is no picture to train on: give a larger num_images")
    model, num_flips = encoders.model, 1 + flips

    def latents() -> cache.Arrays:
        take = functools.partial(_mirrored, images.images, num_flips)
        apply, num_rows = functools.partial(_moments, model.vae), num_flips * len(images.images)
        moments = _apply(apply, encoders.load("vae"), take, num_rows, encoders)
        moments = moments.reshape(-1, num_flips, *moments.shape[1:])
        mean, log_variance = np.split(moments, 2, axis=-1)
        return {"mean": mean, "log_variance": log_variance}

    def states() -> cache.Arrays:
        params, ids = encoders.load("text_encoder"), encoders.tokenize([*texts, ""])
        apply = functools.partial(_states, model.text_encoder)
        rows = _apply(apply, params, ids.__getitem__, len(ids), encoders)
        return {"states": rows[:-1], "null": rows[-1:]}

    state = lambda component: cache.directory_state(model.directory / component)
    embedding = embed(encoders, texts, encoder)
    text = encoders.cached("text", lambda: (state("text_encoder"), list(texts)), states)
    inputs = lambda: (state("vae"), pictures.state(images), num_flips)
    moments = encoders.cached("latents", inputs, latents)
    return Examples(embedding, text["states"], text["null"], **moments)


def encode_split(
    encoders: Encoders, source: pictures.PictureSource, split: str, seed: int
) -> Examples:
    """Computes all that a training needs of a split; `seed` draws its prompts."""
    images = pictures.load(source, split)
    texts = pictures.prompts(images, split, seed, source.captions_per_image).texts
    return encode(encoders, images, texts, source.encoder, source.flips)


def draw_noisy(
    batch: Mapping[str, Any],
    key: Key[Array, ""],
    schedule: noise_schedule.Schedule,
    scaling_factor: float,
) -> Noisy:
    """Draws latents, noise and uniform timesteps for the latent distributions of a batch."""
    keys, mean = jax.random.split(key, 3), batch["mean"]
    spread = jnp.exp(batch["log_variance"] / 2) * jax.random.normal(keys[0], mean.shape)
    x0 = (mean + spread) * scaling_factor
    noise = jax.random.normal(keys[1], x0.shape)
    alphas = noise_schedule.alphas_cumprod(schedule).astype(np.float32)
    timestep = jax.random.randint(keys[2], x0.shape[:1], 0, len(alphas))
    alpha = jnp.asarray(alphas)[timestep]
    target = noise_schedule.training_target(x0, noise, alpha, schedule.prediction_type)
    return Noisy(noise_schedule.add_noise(x0, noise, alpha), timestep, target, alpha)


def _pooled_text(
    text_config: clip.TextConfig, params: loop.Params, ids: Int[Array, "b n"]
) -> Float[Array, "b d"]:
    states: Any = clip.TextTower(text_config).apply({"params": params}, ids)
    return states[jnp.arange(len(ids)), clip.end_of_text(ids, text_config)]


def _pooled_sentence(
    encoder: sentence.SentenceConfig, params: loop.Params, ids_and_mask: Int[Array, "b 2 n"]
) -> Float[Array, "b d"]:
    ids, mask = ids_and_mask[:, 0], ids_and_mask[:, 1].astype(bool)
    states: Any = sentence.SentenceEncoder(encoder).apply({"params": params}, ids, mask)
    return sentence.pool(states, mask)


def _states(
    text_config: clip.TextConfig, params: loop.Params, ids: Int[Array, "b n"]
) -> Float[Array, "b n d"]:
    states: Any = clip.TextTower(text_config).apply({"params": params}, ids)
    return states.astype(jnp.float16)


def _moments(
    vae_config: vae.VAEConfig, params: loop.Params, images: Shaped[Array, "b height width 3"]
) -> Float[Array, "b h w moments"]:
    x, apply = pipeline.to_float(images), vae.VAE(vae_config).apply
    moments: Any = apply({"params": params}, x, method="encode")
    return jnp.concatenate(moments, axis=-1)


def _ids_and_masks(
    directory: pathlib.Path, texts: Sequence[str], max_tokens: int
) -> Int32[np.ndarray, "rows 2 tokens"]:
    own: Any = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    tokens = own(list(texts), padding=True, truncation=True, max_length=max_tokens)
    kinds = ("input_ids", "attention_mask")
    return np.stack([np.array(tokens[kind], np.int32) for kind in kinds], axis=1)


def _mirrored(
    images: Any, num_flips: int, rows: Int[np.ndarray, " b"]
) -> UInt8[np.ndarray, "b h w 3"]:
    """Takes rows of the pictures each of which, with two flips, its mirror image follows."""
    taken = images[rows // num_flips]
    return np.where((rows % num_flips)[:, None, None, None] == 1, taken[:, :, ::-1], taken)


def _apply(
    apply: Callable[[loop.Params, Any], Array],
    params: loop.Params,
    take: Callable[[Int[np.ndarray, " b"]], np.ndarray],
    num_rows: int,
    encoders: Encoders,
) -> np.ndarray:
    """Applies a network to all rows, which `take` reads a batch at a time, on all devices.

    Large results are kept in a file without a name in the cache, and not in memory.
    """
    mesh = encoders.mesh
    placed = sharding.batch_sharding(mesh)
    encode = jax.jit(apply, out_shardings=placed)
    params, result = sharding.place(params, sharding.replicated(mesh)), np.zeros(0)
    for batch in cache.in_batches(num_rows, _ROWS_PER_DEVICE * mesh.size):
        part = sharding.to_host(encode(params, sharding.place(take(batch), placed)))
        if not result.size:
            result = _room(part, num_rows, encoders.cache_dir)
        result[batch] = part  # the last row again and again, at the end
    return result


def _room(part: np.ndarray, num_rows: int, scratch: pathlib.Path | None) -> np.ndarray:
    """Makes an empty array of rows like those of `part`."""
    shape = (num_rows, *part.shape[1:])
    if scratch is None or num_rows * part[0].nbytes < _IN_MEMORY:
        return np.empty(shape, part.dtype)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=scratch) as file:  # there as long as the array is
        return np.memmap(file, part.dtype, "w+", shape=shape)
