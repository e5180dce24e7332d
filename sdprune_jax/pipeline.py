"""Prompt to image: encode, denoise under guidance, decode, as one jitted function."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8

from sdprune_jax import NotFiniteError, UserError, sharding
from sdprune_jax.data import cache, tokenizer
from sdprune_jax.files import model_directory
from sdprune_jax.files.model import Model
from sdprune_jax.files.model_directory import ModelConfig
from sdprune_jax.models import clip, samplers, unet, vae


class Sampled(NamedTuple):
    """What came of some prompts."""

    latents: Float[Array, "b h w c"]  # the last ones, as the UNet knows them
    images: Float[Array, "b height width 3"]  # about [-1, 1]


class Rendered(NamedTuple):
    """A batch of finished images."""

    index: list[int]  # of their prompts
    latents: Float[np.ndarray, "b h w c"]
    images: UInt8[np.ndarray, "b height width 3"]


# (params by component, prompt ids [b n], negative ids [1 n], noise [b h w c], guidance scale)
Sample = Callable[..., Sampled]


def load(model: ModelConfig, mesh: Mesh, variant: str | None = None) -> dict[str, Any]:
    """Parameters of all components in float32, the large ones split over the mesh."""
    return {
        name: model_directory.load(
            model,
            name,
            dtype=np.float32,
            variant=variant,
            sharding=sharding.fsdp_shardings(model_directory.param_shapes(model, name), mesh),
        )
        for name in model_directory.COMPONENTS
    }


def make_sample(
    model: ModelConfig,
    mesh: Mesh,
    *,
    sampler: str | None,
    num_steps: int,
    guided: bool,
    dtype: Any = jnp.float32,
) -> Sample:
    """Compiles generation for one sampler, once for all models of one architecture.

    Args:
        model: the configs of a diffusers directory; a masked model runs the program of the dense.
        mesh: batches are split over all of its axes.
        sampler: one of `samplers.SAMPLERS`; None for what the scheduler's class says.
        num_steps: steps of the sampler.
        guided: run the UNet on the negative prompt too; without it half the work is saved.
        dtype: dtype of the computation.

    Returns:
        `(params, ids, negative_ids, noise, guidance_scale) -> Sampled`; guidance scale 1 is the
        prompt alone.
    """
    anywhere = dataclasses.replace(model, directory=pathlib.Path())
    program = sample_program(anywhere, mesh, sampler, num_steps, guided, jnp.dtype(dtype))

    def sample(
        params: Mapping[str, Any], ids: Any, negative_ids: Any, noise: Any, guidance_scale: Any
    ) -> Sampled:
        ids, noise = sharding.place((ids, noise), sharding.batch_sharding(mesh))
        return program(params, ids, negative_ids, noise, guidance_scale)

    return sample


@functools.cache
def sample_program(
    model: ModelConfig, mesh: Mesh, sampler: str | None, num_steps: int, guided: bool, dtype: Any
) -> Any:
    """The jitted function of `make_sample`, which has the same arguments and all on the mesh."""
    encode: Any = clip.TextTower(model.text_encoder, dtype).apply
    unet_apply: Any = unet.UNet(model.unet, dtype).apply
    decode: Any = partial(vae.VAE(model.vae, dtype).apply, method="decode")
    table = samplers.timetable(model.schedule, sampler, num_steps)
    over_batch = sharding.batch_sharding(mesh)

    @partial(
        jax.jit,
        in_shardings=(None, over_batch, None, over_batch, None),
        out_shardings=over_batch,
    )
    def sample(
        params: Mapping[str, Any],
        ids: Int[Array, "b n"],
        negative_ids: Int[Array, "1 n"],
        noise: Float[Array, "b h w c"],
        guidance_scale: Float[Array, ""],
    ) -> Sampled:
        text_params = {"params": params["text_encoder"]}
        text = encode(text_params, ids)
        negative = encode(text_params, negative_ids) if guided else None

        def predict(carry: None, x: Any, timestep: Any, text: Any) -> Any:
            return carry, unet_apply({"params": params["unet"]}, x, timestep, text)

        latents, _ = denoise(predict, table, noise, text, negative, guidance_scale)
        images = decode({"params": params["vae"]}, latents / model.vae.scaling_factor)
        return Sampled(latents, images)

    return sample


def denoise(
    predict: Callable[..., tuple[Any, Float[Array, "_b h w c"]]],
    table: samplers.Timetable,
    noise: Float[Array, "b h w c"],
    text: Float[Array, "b n d"],
    negative: Float[Array, "1 n d"] | None,
    guidance_scale: Any,
    *,
    carry: Any = None,
    per_call: tuple[Any, ...] = (),
) -> tuple[Float[Array, "b h w c"], Any]:
    """Walks from noise to latents, under guidance if there is a negative prompt.

    Args:
        predict: `(carry, x, timestep, text, *row of per_call) -> (carry, the UNet's prediction)`,
            once a call. Under guidance the first half of its batch has the negative prompt.
        table: timesteps and coefficients of the sampler.
        noise: where the walk starts.
        text: states of the prompts.
        negative: states of what guidance leads away from; None walks by the prompts alone.
        guidance_scale: 1 is the prompts alone.
        carry: what `predict` hands from call to call.
        per_call: arrays whose leading axis has a row for every call.

    Returns:
        The last latents and the last `carry`.

    Source: Ho & Salimans 2022, classifier-free guidance (https://arxiv.org/abs/2207.12598).
    """
    guided = negative is not None
    if guided:
        text = jnp.concatenate([jnp.broadcast_to(negative, text.shape), text])

    def call(state: Any, inputs: Any) -> Any:
        (walk, carry), (row, rows) = state, inputs
        x = jnp.concatenate([walk.x, walk.x]) if guided else walk.x
        carry, out = predict(carry, x, jnp.broadcast_to(row.timestep, x.shape[:1]), text, *rows)
        if guided:
            without, prompted = jnp.split(out, 2)
            out = without + guidance_scale * (prompted - without)
        return (samplers.step(walk, row, out), carry), None

    steps = (jax.tree.map(jnp.asarray, table), per_call)
    (walk, carry), _ = jax.lax.scan(call, (samplers.start(noise), carry), steps)
    return walk.x, carry


def render(
    model: ModelConfig,
    params: Mapping[str, Any],
    sample: Sample,
    prompts: Sequence[str],
    index: Sequence[int],
    *,
    size: tuple[int, int],
    seed: int,
    guidance_scale: float,
    negative_prompt: str,
    batch_size: int,
) -> Iterator[Rendered]:
    """Yields one batch after another, of `batch_size` images or fewer.

    An image depends on its prompt, its index and the seed, not on what else is asked for.

    Args:
        model: as loaded into `params`.
        params: parameters by component, from `load`.
        sample: from `make_sample`.
        prompts: texts of the whole experiment.
        index: places in `prompts` of the texts to draw.
        size: height and width in pixels.
        seed: seed of the noise.
        guidance_scale: 1 is the prompt alone.
        negative_prompt: what guidance leads away from.
        batch_size: images at once, over all devices.

    Raises:
        FloatingPointError: if an image is not finite.
    """
    words = tokenizer.load(model.directory / "tokenizer")
    length = model.text_encoder.max_position_embeddings
    negative = tokenizer.encode(words, [negative_prompt], length)
    h, w = (pixels // model.vae.downscale for pixels in size)
    shape, key, scale = (h, w, model.vae.latent_channels), jax.random.key(seed), guidance_scale
    for rows in cache.in_batches(len(index), batch_size):
        here = [index[row] for row in rows]
        ids = tokenizer.encode(words, [prompts[i] for i in here], length)
        noise = image_noise(key, jnp.asarray(here), shape)
        made = sample(params, ids, negative, noise, jnp.float32(scale))
        num = len(set(rows.tolist()))  # the last batch repeats its last row
        latents, images = (sharding.to_host(x)[:num] for x in made)
        yield Rendered(here[:num], latents, to_bytes(images))


def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    num_steps: int = 25,
    guidance_scale: float = 7.5,
    negative_prompt: str = "",
    sampler: str | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 16,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> UInt8[np.ndarray, "n height width 3"]:
    """Draws a picture of every prompt.

    The same seed and place in the list give the same noise, whatever the model and the batch.

    Args:
        model: has all of its components.
        prompts: one text a picture.
        seed: seed of the noise.
        num_steps: steps of the sampler.
        guidance_scale: 1 is the prompt alone.
        negative_prompt: what guidance leads away from.
        sampler: one of `samplers.SAMPLERS`; None is what the model's scheduler says.
        height, width: size of the pictures in pixels; None is the model's own.
        batch_size: pictures at once, rounded up to a multiple of the devices.
        dtype: dtype of the computation.
        mesh: devices to use; None is all of them.

    Raises:
        UserError: if the sampler cannot follow the model's schedule, or a size is not possible.
        NotFiniteError: if a picture is not finite.
    """
    mesh = mesh or sharding.make_mesh()
    downscale = model.config.vae.downscale
    own = model.config.unet.sample_size * downscale
    size = (height or own, width or own)
    if any(pixels < 1 or pixels % downscale for pixels in size):
        raise UserError(f"cannot draw {size[0]} x {size[1]} pixels: give multiples of {downscale}")
    how = {"sampler": sampler, "num_steps": num_steps, "guided": guidance_scale > 1}
    sample = make_sample(model.config, mesh, dtype=dtype, **how)
    params = _placed(model, mesh)
    index = range(len(prompts))
    batches = render(
        model.config,
        params,
        sample,
        prompts,
        index,
        size=size,
        seed=seed,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        batch_size=-(-min(batch_size, max(len(prompts), 1)) // mesh.size) * mesh.size,
    )
    images = [batch.images for batch in batches]
    return np.concatenate(images) if images else np.zeros((0, *size, 3), np.uint8)


def _placed(model: Model, mesh: Mesh) -> dict[str, Any]:
    """Returns the parameters in float32 on the devices, the large ones split over them."""
    params = {}
    for name, tree in model.params.items():
        shapes = model_directory.param_shapes(model.config, name)
        host = jax.tree.map(lambda x: np.asarray(x, np.float32), tree)
        params[name] = sharding.place(host, sharding.fsdp_shardings(shapes, mesh))
    return params


@partial(jax.jit, static_argnames="shape")
def image_noise(
    key: Key[Array, ""], index: Int[Array, " b"], shape: tuple[int, int, int]
) -> Float[Array, "b h w c"]:
    """Noise of each image from its own key, so that it depends on no other image of the batch."""
    draw = lambda index: jax.random.normal(jax.random.fold_in(key, index), shape)
    return jax.vmap(draw)(index)


def to_bytes(images: Float[np.ndarray, "b h w 3"]) -> UInt8[np.ndarray, "b h w 3"]:
    """From [-1, 1] to bytes, rounded as diffusers does.

    Raises:
        FloatingPointError: if an image is not finite; it would look black.
    """
    bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
    if bad.size:
        raise NotFiniteError(
            f"images {bad.tolist()} of the batch are not finite: compute in float32"
            " (config.dtype), or set upcast_attention in unet/config.json"
        )
    return np.round(np.clip(images / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def to_float(images: Any) -> Float[Array, "n h w 3"]:
    """From bytes to [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1
