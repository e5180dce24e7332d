"""LD-Pruner: what the removal of one block does to the latents that come out."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Float64

from sdprune_jax import UserError, pipeline, sharding
from sdprune_jax.data import cache
from sdprune_jax.files import model_directory
from sdprune_jax.models import samplers, unet
from sdprune_jax.scoring.settings import CalibrationSettings


def score(
    model: model_directory.ModelConfig,
    params: Any,
    mesh: Mesh,
    text: Float[np.ndarray, "rows n d"],
    names: Sequence[str],
    seed: int,
    settings: CalibrationSettings,
) -> dict[str, Float64[np.ndarray, " 1"]]:
    """How far the latents of some prompts move, each block removed alone.

    Every prompt starts from the same noise each time. Gates remove the blocks, so that one program
    serves all of them.

    Args:
        model: architecture and schedule.
        params: float32 parameters of the UNet.
        mesh: batches are split over all of its axes.
        text: last hidden states of the prompts and, in the last row, of the negative prompt.
        names: sites to remove, among those of `sites.operators`.
        seed: draws the noise.
        settings: sampler and guidance.

    Returns:
        One number by name, never negative.

    Raises:
        ValueError: if a batch does not divide among the devices.

    Source: LD-Pruner (https://arxiv.org/abs/2404.11936): the distance between the means of both
        sets of latents, and that between their standard deviations, summed.
    """
    if settings.batch_size % mesh.size:
        raise UserError(
            f"calibration.batch_size is {settings.batch_size}, expected a multiple of the"
            f" {mesh.size} devices"
        )
    sample, split = _make_sample(model, mesh, names, settings), sharding.batch_sharding(mesh)
    shardings = sharding.fsdp_shardings(model_directory.param_shapes(model, "unet"), mesh)
    params = sharding.place(params, shardings)
    size, key = model.unet.sample_size, jax.random.key(seed)
    shape = (size, size, model.unet.in_channels)
    text, negative = text[:-1], text[-1:] if settings.guidance_scale > 1 else None

    def statistics(gates: Float32[np.ndarray, " names"]) -> Float64[np.ndarray, "2 latent"]:
        batches = []
        for rows in cache.in_batches(len(text), settings.batch_size):
            noise = pipeline.image_noise(key, jnp.asarray(rows), shape)
            placed = sharding.place((noise, text[rows]), split)
            latents = sharding.to_host(sample(params, *placed, negative, gates))
            batches.append(latents[: len(set(rows.tolist()))])
        flat = np.concatenate(batches).reshape(len(text), -1).astype(np.float64)
        return np.stack([flat.mean(axis=0), flat.std(axis=0)])

    whole = np.ones(len(names), np.float32)
    before, scores = statistics(whole), {}
    for i, name in enumerate(names):
        without = statistics(np.where(np.arange(len(names)) == i, np.float32(0), whole))
        scores[name] = np.linalg.norm(without - before, axis=1).sum(keepdims=True)
    return scores


def _make_sample(
    model: model_directory.ModelConfig,
    mesh: Mesh,
    names: Sequence[str],
    settings: CalibrationSettings,
) -> Any:
    """`(params, noise, text, negative, gates) -> latents`, with a gate for each of `names`."""
    apply: Any = unet.UNet(model.unet).apply
    table = samplers.timetable(model.schedule, settings.sampler, settings.num_steps)
    split = sharding.batch_sharding(mesh)

    @partial(jax.jit, in_shardings=(None, split, split, None, None), out_shardings=split)
    def sample(
        params: Any,
        noise: Float[Array, "b h w c"],
        text: Float[Array, "b n d"],
        negative: Float[Array, "1 n d"] | None,
        gates: Float[Array, " names"],
    ) -> Float[Array, "b h w c"]:
        def predict(carry: None, x: Any, timestep: Any, text: Any) -> Any:
            own = {
                name: jnp.broadcast_to(gate, (len(text), 1))
                for name, gate in zip(names, gates, strict=True)
            }
            return carry, apply({"params": params}, x, timestep, text, own)

        return pipeline.denoise(predict, table, noise, text, negative, settings.guidance_scale)[0]

    return sample
