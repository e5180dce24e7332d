"""The compiled programs of a calibration: what they read, record and add up."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from sdprune_jax import pipeline, sharding
from sdprune_jax.models import clip, samplers, unet
from sdprune_jax.scoring import recorder
from sdprune_jax.scoring.recorder import LayerStats, Stats


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a compiled calibration depends on, beside the shapes of its arguments."""

    config: Any
    mesh: Mesh
    layers: tuple[tuple[str, int], ...]  # path of the kernel, and number of inputs
    statistic: recorder.Statistic
    fraction: float = 1.0  # share of positions that the Gram matrix of a convolution reads

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.layers]


@partial(jax.jit, static_argnames="setup", donate_argnames="stats")
def add_texts(
    setup: Setup, params: Any, stats: Stats, ids: Int[Array, "b n"], weight: Float[Array, "b n"]
) -> Stats:
    """`stats` and what one batch of texts adds; tokens count by their weight."""
    apply: Any = clip.TextTower(setup.config).apply
    record = recorder.apply_and_record
    _, new = record(apply, params, (ids,), setup.paths, setup.statistic, weight)
    return _add(setup, stats, new)


@partial(jax.jit, static_argnames="setup", donate_argnames="stats")
def add_trajectories(
    setup: Setup,
    params: Any,
    stats: Stats,
    noise: Float[Array, "b h w c"],
    text: Float[Array, "b n d"],
    weight: Float[Array, " b"],
    negative: Float[Array, "1 n d"] | None,
    table: samplers.Timetable,
    alphas: Float[Array, " calls"],
    guidance_scale: Float[Array, ""],
    key: Key[Array, ""],
) -> Stats:
    """`stats` and what denoising one batch adds; calls count by `alphas`, prompts by `weight`."""
    apply: Any = unet.UNet(setup.config).apply
    if negative is not None:
        weight = jnp.concatenate([weight, weight])

    def predict(stats: Stats, x: Any, timestep: Any, text: Any, alpha: Any, number: Any) -> Any:
        inputs, own_key = (x, timestep, text), jax.random.fold_in(key, number)
        weights = alpha * weight
        out, new = recorder.apply_and_record(
            apply, params, inputs, setup.paths, setup.statistic, weights, setup.fraction, own_key
        )
        return _add(setup, stats, new), out

    per_call = (alphas, jnp.arange(len(alphas)))
    return pipeline.denoise(
        predict, table, noise, text, negative, guidance_scale, carry=stats, per_call=per_call
    )[1]


of_rows = jax.jit(recorder.of_rows, static_argnames="statistic")


def _add(setup: Setup, old: Stats, new: Stats) -> Stats:
    return _placed(jax.tree.map(jnp.add, old, new), setup.mesh)


@partial(jax.jit, static_argnames="setup")
def zeros(setup: Setup) -> Stats:
    """Empty statistics, the large ones split over the mesh."""
    num_axes = 1 if setup.statistic == "moments" else 2
    zeros = {
        path: LayerStats(jnp.zeros([n_in] * num_axes), jnp.zeros(())) for path, n_in in setup.layers
    }
    return _placed(zeros, setup.mesh)


def _placed(stats: Stats, mesh: Mesh) -> Stats:
    return jax.lax.with_sharding_constraint(stats, sharding.fsdp_shardings(stats, mesh))
