"""Statistics of layer inputs over real prompts and, for the UNet, over real denoising."""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from sdprune_jax import UserError, pipeline, sharding
from sdprune_jax.files import convert
from sdprune_jax.files.model_directory import ModelConfig
from sdprune_jax.models import clip, samplers
from sdprune_jax.scoring import accumulate, inputs, recorder
from sdprune_jax.scoring.recorder import LayerStats, Statistic, Stats
from sdprune_jax.scoring.settings import CalibrationSettings


def text_statistics(
    config: clip.TextConfig,
    params: Any,
    mesh: Mesh,
    ids: Int[np.ndarray, "prompts n"],
    paths: Sequence[str],
    statistic: Statistic,
    settings: CalibrationSettings,
) -> Stats:
    """Runs prompts through the text encoder and sums what its layers read.

    Returns:
        Statistics by path of the kernel. Layers that read the same input hold the same arrays.

    Raises:
        ValueError: naming layers that read nothing, or a value that is not finite.
    """
    _refuse_batch(len(ids), settings.batch_size, mesh)
    groups = inputs.groups(paths)
    layers = _inputs_of_each(params, [group[0] for group in groups.values()])
    setup = accumulate.Setup(config, mesh, layers, statistic)
    stats = accumulate.zeros(setup)
    for rows, weight in _batches(len(ids), settings.batch_size):
        tokens = np.broadcast_to(weight[:, None], ids[rows].shape)
        if settings.mask_pads:
            end = np.asarray(clip.end_of_text(jnp.asarray(ids[rows]), config))
            tokens = tokens * (np.arange(ids.shape[1])[None] <= end[:, None])
        stats = accumulate.add_texts(setup, params, stats, *_split(mesh, ids[rows], tokens))
    return recorder.checked({path: stats[group[0]] for group in groups.values() for path in group})


def unet_statistics(
    model: ModelConfig,
    params: Any,
    mesh: Mesh,
    text: Float[np.ndarray, "rows n d"],
    paths: Sequence[str],
    statistic: Statistic,
    key: Key[Array, ""],
    settings: CalibrationSettings,
) -> Stats:
    """Denoises from noise under each prompt and sums what layers read at every call.

    Text states are the same at every call, so the keys and values of cross-attention need no run
    of the UNet. Layers of the time embedding read all timesteps once: those of one trajectory are
    fewer than the inputs, and a Gram matrix without rank fits its update to them alone.

    Args:
        model: architecture and schedule.
        params: parameters of the UNet.
        mesh: batches are split over all of its axes.
        text: last hidden states of the prompts and, in the last row, of the negative prompt.
        paths: kernels of the layers to calibrate.
        statistic: what is summed.
        key: draws the noise, and the positions that Gram matrices of convolutions read.
        settings: sampler, guidance and weights.

    Returns:
        As `text_statistics`.

    Raises:
        ValueError: naming layers that read nothing, or a value that is not finite; or if the
            trajectory cannot be walked.
    """
    _refuse_batch(len(text) - 1, settings.batch_size, mesh)
    if not 0 < settings.position_fraction <= 1:
        raise UserError(f"position_fraction is in (0, 1], got {settings.position_fraction}")
    groups = inputs.groups(paths)
    stats: Stats = {}
    if any(name in groups for name in inputs.TIME):
        stats |= _time_statistics(model, params, statistic, settings)
    if inputs.TEXT in groups:
        stats[inputs.TEXT] = _text_state_statistics(model, text, statistic, settings)
    leaders = {name: group[0] for name, group in groups.items() if name not in stats}
    if leaders:
        setup = setup_of(model, params, mesh, list(leaders.values()), statistic, settings)
        walked = _walk(setup, model, params, text, key, settings)
        stats |= {name: walked[path] for name, path in leaders.items()}
    return recorder.checked({path: stats[name] for name, group in groups.items() for path in group})


def setup_of(
    model: ModelConfig,
    params: Any,
    mesh: Mesh,
    paths: Sequence[str],
    statistic: Statistic,
    settings: CalibrationSettings,
) -> accumulate.Setup:
    """What the program that walks the UNet is compiled for."""
    layers = _inputs_of_each(params, paths)
    return accumulate.Setup(model.unet, mesh, layers, statistic, settings.position_fraction)


def noise_shape(model: ModelConfig) -> tuple[int, int, int]:
    return model.unet.sample_size, model.unet.sample_size, model.unet.in_channels


def _time_statistics(
    model: ModelConfig, params: Any, statistic: Statistic, settings: CalibrationSettings
) -> Stats:
    """Statistics of the inputs of the time embedding's layers at all timesteps."""
    num = model.schedule.num_train_timesteps
    weight = jnp.asarray(settings.call_weights(num)[::-1])  # timestep 0 is the last
    read = inputs.of_time(model.unet, params, num)
    return {name: accumulate.of_rows(x, weight, statistic) for name, x in read.items()}


def _text_state_statistics(
    model: ModelConfig,
    text: Float[np.ndarray, "rows n d"],
    statistic: Statistic,
    settings: CalibrationSettings,
) -> LayerStats:
    """Statistics of the text states, which every call of the UNet reads."""
    table = samplers.timetable(model.schedule, settings.sampler, settings.num_steps)
    total = settings.call_weights(len(table.timestep)).sum()
    parts = [(text[r], w) for r, w in _batches(len(text) - 1, settings.batch_size)]
    if settings.guidance_scale > 1:
        parts.append((text[-1:], np.full(1, len(text) - 1, np.float32)))
    each = (accumulate.of_rows(jnp.asarray(x), jnp.asarray(w * total), statistic) for x, w in parts)
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), each)


def _walk(
    setup: accumulate.Setup,
    model: ModelConfig,
    params: Any,
    text: Float[np.ndarray, "rows n d"],
    key: Key[Array, ""],
    settings: CalibrationSettings,
) -> Stats:
    """Statistics of the layers of `setup` along the trajectories of all prompts."""
    table = samplers.timetable(model.schedule, settings.sampler, settings.num_steps)
    alphas = jnp.asarray(settings.call_weights(len(table.timestep)))
    calls = (jax.tree.map(jnp.asarray, table), alphas, jnp.float32(settings.guidance_scale))
    noise_key, position_key = jax.random.split(key)
    negative = jnp.asarray(text[-1:]) if settings.guidance_scale > 1 else None
    stats, shape = accumulate.zeros(setup), noise_shape(model)
    for rows, weight in _batches(len(text) - 1, settings.batch_size):
        noise = pipeline.image_noise(noise_key, jnp.asarray(rows), shape)
        batch = _split(setup.mesh, noise, text[rows], weight)
        drawn = jax.random.fold_in(position_key, rows[0])
        stats = accumulate.add_trajectories(setup, params, stats, *batch, negative, *calls, drawn)
    return stats


def _inputs_of_each(params: Any, paths: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """Each path, and how many inputs its layer has."""
    flat = convert.flatten(params)
    unknown = sorted(set(paths) - set(flat))
    if unknown:
        raise UserError("the model has no such kernels:\n  " + "\n  ".join(unknown))
    return tuple((path, math.prod(flat[path].shape[:-1])) for path in paths)


def _batches(
    num: int, size: int
) -> Iterator[tuple[Int[np.ndarray, " b"], Float[np.ndarray, " b"]]]:
    """Rows in batches of one size; those that fill up the last one have weight 0, others 1."""
    for first in range(0, num, size):
        rows = np.arange(first, first + size)
        yield np.minimum(rows, num - 1), (rows < num).astype(np.float32)


def _split(mesh: Mesh, *arrays: Any) -> Any:
    return sharding.place(arrays, sharding.batch_sharding(mesh))


def _refuse_batch(num_prompts: int, batch_size: int, mesh: Mesh) -> None:
    problems = [] if num_prompts else ["there is no prompt"]
    if batch_size < 1 or batch_size % mesh.size:
        problems.append(f"batch_size is {batch_size}, expected a multiple of {mesh.size} devices")
    if problems:
        raise UserError("cannot calibrate: " + "; ".join(problems))
