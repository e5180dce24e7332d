"""What the router and the experts are trained on: prompts, their embeddings, states and latents.

All of it is computed once, on all devices, and kept under a key of what it was made from.
"""

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

from sdprune_jax import UserError, config, pipeline, sharding
from sdprune_jax.data import cache, emoji, pictures, tokenizer
from sdprune_jax.data.pictures import Stored, state
from sdprune_jax.files import model_directory, tensors
from sdprune_jax.models import clip, noise_schedule, sentence, vae
from sdprune_jax.training import loop

_ROWS_PER_DEVICE = 32  # that a device encodes at once
_IN_MEMORY = 2**31  # bytes; larger arrays are written to disk as they are computed


class Noised(NamedTuple):
    """Training inputs and targets of a denoiser."""

    latents: Float[Array, "b h w c"]
    timestep: Int[Array, " b"]
    target: Float[Array, "b h w c"]
    alpha_cumprod: Float[Array, " b"]


class Examples(NamedTuple):
    """What a batch is made of, by prompt or by picture.

    Attributes:
        embedding: of every prompt, as the router reads it.
        states: of every prompt, as the UNet reads it; float16.
        null: the states of no text.
        mean: of the latents of every picture and, with flips, of its mirror image.
        log_variance: of the same.
    """

    embedding: Float[np.ndarray, "rows n"]
    states: Float[np.ndarray, "rows tokens d"]
    null: Float[np.ndarray, "1 tokens d"]
    mean: Float[np.ndarray, "images flips h w c"]
    log_variance: Float[np.ndarray, "images flips h w c"]

    def batch(self, rows: Int[np.ndarray, " b"], seed: Sequence[int]) -> dict[str, Any]:
        """The examples of some prompts, mirrored or not as `seed` draws."""
        image = rows // (len(self.states) // len(self.mean))
        flip = np.random.default_rng(seed).integers(self.mean.shape[1], size=len(rows))
        return {
            "embedding": self.embedding[rows],
            "text": self.states[rows],
            "mean": self.mean[image, flip],
            "log_variance": self.log_variance[image, flip],
        }


def embeddings(
    section: config.RouterData,
    model: model_directory.ModelConfig,
    texts: Sequence[str],
    mesh: Mesh,
    cache_dir: pathlib.Path | None,
    variant: str | None = None,
) -> Float[np.ndarray, "rows n"]:
    """What the router reads of prompts.

    Args:
        section: names the encoder.
        model: whose text encoder that may be.
        texts: the prompts.
        mesh: of `sharding.make_mesh`.
        cache_dir: None keeps nothing.
        variant: of the model's files.

    Raises:
        ValueError: if the encoder is neither `text_encoder` nor a sentence encoder.
    """
    encoder = encoder_of(section, model)
    directory = pathlib.Path(section.encoder)
    if isinstance(encoder, clip.TextConfig):
        directory = model.directory / "text_encoder"

    def compute() -> cache.Arrays:
        if isinstance(encoder, clip.TextConfig):
            params = model_directory.load(model, "text_encoder", dtype=np.float32, variant=variant)
            encode = functools.partial(_pooled_text, encoder)
            ids = _ids(model, texts)
            return {
                "embedding": _encode(encode, params, ids.__getitem__, len(ids), mesh, cache_dir)
            }
        params = model_directory.load_params(
            directory, sentence.param_shapes(encoder), dtype=np.float32
        )
        words: Any = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        found = words(list(texts), padding=True, truncation=True, max_length=encoder.max_tokens)
        keys = ("input_ids", "attention_mask")
        both = np.stack([np.array(found[key], np.int32) for key in keys], axis=1)
        encode = functools.partial(_pooled, encoder)
        return {"embedding": _encode(encode, params, both.__getitem__, len(both), mesh, cache_dir)}

    if cache_dir is None:
        return compute()["embedding"]
    key = cache.fingerprint(cache.directory_state(directory), list(texts))
    return cache.cached(cache_dir, "embeddings", key, compute)["embedding"]


def encoder_of(
    section: config.RouterData, model: model_directory.ModelConfig
) -> clip.TextConfig | sentence.SentenceConfig:
    """What embeds the prompts that are routed; both kinds have a `hidden_size`.

    Raises:
        ValueError: if the encoder is neither `text_encoder` nor a sentence encoder.
    """
    if section.encoder == "text_encoder":
        return model.text_encoder
    file = pathlib.Path(section.encoder) / "config.json"
    if not file.is_file():
        raise UserError(
            f"config.router.data.encoder is {section.encoder!r}, expected `text_encoder` or a"
            " directory of sentence-transformers, which has a config.json"
        )
    return sentence.SentenceConfig.from_json(tensors.read_json(file))


def examples(
    section: config.RouterData,
    model: model_directory.ModelConfig,
    pairs: emoji.Pairs | Stored,
    texts: Sequence[str],
    mesh: Mesh,
    cache_dir: pathlib.Path | None,
    variant: str | None = None,
) -> Examples:
    """Everything that a training needs of some pictures and their prompts.

    Args as of `embeddings`.

    Raises:
        ValueError: if there is no picture, or as `embeddings`.
    """
    if not len(pairs.images):
        raise UserError("there is no picture to train on: give a larger num_images")
    num_flips = 1 + section.flips

    def latents() -> cache.Arrays:
        params = model_directory.load(model, "vae", dtype=np.float32, variant=variant)
        take = functools.partial(_mirrored, pairs.images, num_flips)
        encode = functools.partial(_moments, model.vae)
        moments = _encode(encode, params, take, num_flips * len(pairs.images), mesh, cache_dir)
        moments = moments.reshape(-1, num_flips, *moments.shape[1:])
        mean, log_variance = np.split(moments, 2, axis=-1)
        return {"mean": mean, "log_variance": log_variance}

    def states() -> cache.Arrays:
        params = model_directory.load(model, "text_encoder", dtype=np.float32, variant=variant)
        encode = functools.partial(_states, model.text_encoder)
        ids = _ids(model, [*texts, ""])
        found = _encode(encode, params, ids.__getitem__, len(ids), mesh, cache_dir)
        return {"states": found[:-1], "null": found[-1:]}

    embedding = embeddings(section, model, texts, mesh, cache_dir, variant)
    if cache_dir is None:
        return Examples(embedding, **states(), **latents())
    vae_state = cache.directory_state(model.directory / "vae")
    key = cache.fingerprint(vae_state, state(pairs), num_flips)
    moments = cache.cached(cache_dir, "latents", key, latents)
    encoder_state = cache.directory_state(model.directory / "text_encoder")
    text = cache.cached(cache_dir, "text", cache.fingerprint(encoder_state, list(texts)), states)
    return Examples(embedding, text["states"], text["null"], **moments)


def of_split(
    section: config.RouterData,
    model: model_directory.ModelConfig,
    split: str,
    seed: int,
    mesh: Mesh,
    cache_dir: pathlib.Path,
    variant: str | None = None,
) -> Examples:
    """Everything that a training needs of the pictures of a split; `seed` draws their prompts."""
    images = pictures.load(section, split)
    texts = pictures.prompts(section, images, split, seed).texts
    return examples(section, model, images, texts, mesh, cache_dir, variant)


def noised(
    batch: Mapping[str, Any],
    key: Key[Array, ""],
    schedule: noise_schedule.Schedule,
    scaling_factor: float,
) -> Noised:
    """Draws latents, noise and uniform timesteps for the latent distributions of a batch."""
    keys, mean = jax.random.split(key, 3), batch["mean"]
    spread = jnp.exp(batch["log_variance"] / 2) * jax.random.normal(keys[0], mean.shape)
    x0 = (mean + spread) * scaling_factor
    noise = jax.random.normal(keys[1], x0.shape)
    alphas = noise_schedule.alphas_cumprod(schedule).astype(np.float32)
    timestep = jax.random.randint(keys[2], x0.shape[:1], 0, len(alphas))
    alpha = jnp.asarray(alphas)[timestep]
    target = noise_schedule.training_target(x0, noise, alpha, schedule.prediction_type)
    return Noised(noise_schedule.add_noise(x0, noise, alpha), timestep, target, alpha)


def _pooled_text(
    text_config: clip.TextConfig, params: loop.Params, ids: Int[Array, "b n"]
) -> Float[Array, "b d"]:
    states: Any = clip.TextTower(text_config).apply({"params": params}, ids)
    return states[jnp.arange(len(ids)), clip.end_of_text(ids, text_config)]


def _pooled(
    encoder: sentence.SentenceConfig, params: loop.Params, both: Int[Array, "b 2 n"]
) -> Float[Array, "b d"]:
    ids, mask = both[:, 0], both[:, 1].astype(bool)
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


def _ids(
    model: model_directory.ModelConfig, texts: Sequence[str]
) -> Int32[np.ndarray, "rows tokens"]:
    words = tokenizer.load(model.directory / "tokenizer")
    return tokenizer.encode(words, texts, model.text_encoder.max_position_embeddings)


def _mirrored(
    images: Any, num_flips: int, rows: Int[np.ndarray, " b"]
) -> UInt8[np.ndarray, "b h w 3"]:
    """Rows of every picture and, with two flips, of its mirror image after it."""
    found = images[rows // num_flips]
    return np.where((rows % num_flips)[:, None, None, None] == 1, found[:, :, ::-1], found)


def _encode(
    apply: Callable[[loop.Params, Any], Array],
    params: loop.Params,
    take: Callable[[Int[np.ndarray, " b"]], np.ndarray],
    num_rows: int,
    mesh: Mesh,
    scratch: pathlib.Path | None,
) -> np.ndarray:
    """`apply` of all rows, which `take` reads a batch at a time, split over all devices.

    What is large is kept in a file in `scratch`, which nobody sees, and not in memory.
    """
    placed = sharding.batch_sharding(mesh)
    encode = jax.jit(apply, out_shardings=placed)
    params, found = sharding.place(params, sharding.replicated(mesh)), np.zeros(0)
    for batch in cache.in_batches(num_rows, _ROWS_PER_DEVICE * mesh.size):
        part = sharding.to_host(encode(params, sharding.place(take(batch), placed)))
        if not found.size:
            found = _room(part, num_rows, scratch)
        found[batch] = part  # the last row again and again, at the end
    return found


def _room(part: np.ndarray, num_rows: int, scratch: pathlib.Path | None) -> np.ndarray:
    """An empty array of rows like those of `part`."""
    shape = (num_rows, *part.shape[1:])
    if scratch is None or num_rows * part[0].nbytes < _IN_MEMORY:
        return np.empty(shape, part.dtype)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=scratch) as file:  # there as long as the array is
        return np.memmap(file, part.dtype, "w+", shape=shape)
