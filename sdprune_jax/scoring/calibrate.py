"""Statistics of layer inputs over real prompts and, for the UNet, over real denoising."""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from sdprune_jax import UserError, pipeline, sharding
from sdprune_jax.files import convert
from sdprune_jax.files.model_directory import Model
from sdprune_jax.models import clip, samplers, unet
from sdprune_jax.scoring import accumulate, inputs, recorder
from sdprune_jax.scoring.recorder import Stats
from sdprune_jax.scoring.trajectory import Trajectory


def text_statistics(
    config: clip.TextConfig,
    params: Any,
    mesh: Mesh,
    ids: Int[np.ndarray, "prompts n"],
    paths: Sequence[str],
    statistic: str,
    *,
    batch_size: int = 32,
    mask_pads: bool = True,
    dtype: Any = jnp.float32,
) -> Stats:
    """Runs prompts through the text encoder and sums what its layers read.

    Args:
        config: of the text encoder.
        params: of the text encoder.
        mesh: batches are split over all of its axes.
        ids: of the prompts, padded.
        paths: kernels of the layers to calibrate.
        statistic: "moments" or "gram".
        batch_size: prompts at once, a multiple of the devices.
        mask_pads: leave out what follows the end of a text. Ramesh and Zhao count it, and most of
            the 77 tokens of a caption are such.
        dtype: of the computation; statistics are float32.

    Returns:
        By kernel. Layers that read the same input hold the same arrays.

    Raises:
        ValueError: naming layers that read nothing, or a value that is not finite.
    """
    _refuse_batch(len(ids), batch_size, mesh)
    groups = inputs.groups(paths)
    layers = _inputs_of_each(params, [group[0] for group in groups.values()])
    setup = accumulate.Setup(config, dtype, mesh, layers, statistic)
    stats = accumulate.zeros(setup)
    for rows, weight in _batches(len(ids), batch_size):
        tokens = np.broadcast_to(weight[:, None], ids[rows].shape)
        if mask_pads:
            end = np.asarray(clip.end_of_text(jnp.asarray(ids[rows]), config))
            tokens = tokens * (np.arange(ids.shape[1])[None] <= end[:, None])
        stats = accumulate.add_texts(setup, params, stats, *_split(mesh, ids[rows], tokens))
    return recorder.checked({path: stats[group[0]] for group in groups.values() for path in group})


def unet_statistics(
    model: Model,
    params: Any,
    mesh: Mesh,
    text: Float[np.ndarray, "prompts n d"],
    negative: Float[np.ndarray, "1 n d"],
    paths: Sequence[str],
    statistic: str,
    key: Key[Array, ""],
    trajectory: Trajectory,
    dtype: Any = jnp.float32,
) -> Stats:
    """Denoises from noise under each prompt and sums what layers read at every call.

    Text states are the same at every call, so the keys and values of cross-attention need no run
    of the UNet. Layers of the time embedding read all timesteps once: those of one trajectory are
    fewer than the inputs, and a Gram matrix without rank fits its update to them alone.

    Args:
        model: the configs of a diffusers directory.
        params: of the UNet.
        mesh: batches are split over all of its axes.
        text: last hidden states of the prompts.
        negative: of the negative prompt.
        paths: kernels of the layers to calibrate.
        statistic: "moments" or "gram".
        key: of the noise, and of the positions that are drawn.
        trajectory: sampler, guidance and weights.
        dtype: of the computation; statistics are float32.

    Returns:
        By kernel. Layers that read the same input hold the same arrays.

    Raises:
        ValueError: naming layers that read nothing, or a value that is not finite; or if the
            trajectory cannot be walked.
    """
    _refuse_batch(len(text), trajectory.batch_size, mesh)
    if not 0 < trajectory.position_fraction <= 1:
        raise UserError(f"position_fraction is in (0, 1], got {trajectory.position_fraction}")
    table = samplers.timetable(model.schedule, trajectory.sampler, trajectory.num_steps)
    alphas = trajectory.weights(len(table.timestep))
    guided = trajectory.guidance_scale > 1
    groups = inputs.groups(paths)
    found: Stats = {}
    if any(name in groups for name in inputs.TIME):
        num = model.schedule.num_train_timesteps
        weight = jnp.asarray(trajectory.weights(num)[::-1])  # timestep 0 is the last
        read = inputs.of_time(model.unet, params, num, dtype)
        found = {
            name: accumulate.of_rows(x, weight, statistic)
            for name, x in read.items()
            if name in groups
        }
    if inputs.TEXT in groups:
        parts = [(text[r], w) for r, w in _batches(len(text), trajectory.batch_size)]
        if guided:
            parts.append((negative, np.full(1, len(text), np.float32)))
        found[inputs.TEXT] = functools.reduce(
            partial(jax.tree.map, jnp.add),
            (
                accumulate.of_rows(jnp.asarray(x, dtype), jnp.asarray(w * alphas.sum()), statistic)
                for x, w in parts
            ),
        )
    leaders = {name: group[0] for name, group in groups.items() if name not in found}
    if leaders:
        setup = _walk(model, params, mesh, list(leaders.values()), statistic, trajectory, dtype)
        shape = _noise_shape(model, trajectory)
        noise_key, position_key = jax.random.split(key)
        stats = accumulate.zeros(setup)
        for rows, weight in _batches(len(text), trajectory.batch_size):
            noise = pipeline.image_noise(noise_key, jnp.asarray(rows), shape)
            stats = accumulate.add_trajectories(
                setup, params, stats, *_split(mesh, noise, text[rows], weight),
                jnp.asarray(negative), jax.tree.map(jnp.asarray, table), jnp.asarray(alphas),
                jnp.float32(trajectory.guidance_scale), jax.random.fold_in(position_key, rows[0]),
            )  # fmt: skip
        found |= {name: stats[path] for name, path in leaders.items()}
    return recorder.checked({path: found[name] for name, group in groups.items() for path in group})


def lower_unet(
    model: Model,
    mesh: Mesh,
    paths: Sequence[str],
    statistic: str,
    trajectory: Trajectory,
    dtype: Any = jnp.float32,
) -> jax.stages.Lowered:
    """What `unet_statistics` runs for every batch of prompts, from shapes alone.

    Args:
        model: the configs of a diffusers directory.
        mesh: of devices that need not be there.
        paths: kernels to calibrate; at least one of them neither of time nor of text alone.
        statistic: "moments" or "gram".
        trajectory: sampler and guidance.
        dtype: of the computation.
    """
    apart = (*inputs.TIME, inputs.TEXT)  # read no picture
    leaders = [group[0] for name, group in inputs.groups(paths).items() if name not in apart]
    params, size = unet.param_shapes(model.unet), trajectory.batch_size
    setup = _walk(model, params, mesh, leaders, statistic, trajectory, dtype)
    table = samplers.timetable(model.schedule, trajectory.sampler, trajectory.num_steps)
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)

    def shape(*axes: int, place: Any = whole) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, jnp.float32, sharding=place)

    on_all = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree
    )
    stats = jax.eval_shape(lambda: accumulate.zeros(setup))
    stats = jax.tree.map(
        lambda x, place: x.update(sharding=place), stats, sharding.fsdp_shardings(stats, mesh)
    )
    text = (model.text_encoder.max_position_embeddings, model.text_encoder.hidden_size)
    return accumulate.add_trajectories.lower(
        setup, on_all(params), stats, shape(size, *_noise_shape(model, trajectory), place=split),
        shape(size, *text, place=split), shape(size, place=split), shape(1, *text),
        on_all(jax.tree.map(jnp.asarray, table)), shape(len(table.timestep)), shape(),
        on_all(jax.eval_shape(lambda: jax.random.key(0))),
    )  # fmt: skip


def _walk(
    model: Model,
    params: Any,
    mesh: Mesh,
    paths: Sequence[str],
    statistic: str,
    trajectory: Trajectory,
    dtype: Any,
) -> accumulate.Setup:
    return accumulate.Setup(
        model.unet, dtype, mesh, _inputs_of_each(params, paths), statistic,
        trajectory.position_fraction, trajectory.guidance_scale > 1,
    )  # fmt: skip


def _noise_shape(model: Model, trajectory: Trajectory) -> tuple[int, int, int]:
    height, width = trajectory.latent_size or (model.unet.sample_size,) * 2
    return height, width, model.unet.in_channels


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
