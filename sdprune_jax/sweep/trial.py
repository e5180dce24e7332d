"""One point of a sweep: pruned in memory, rendered, measured."""

import dataclasses
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from sdprune_jax import pipeline, sharding, sites
from sdprune_jax.evaluate import images, measuring, networks, scores, task
from sdprune_jax.evaluate.measurement import Measurement
from sdprune_jax.evaluate.protocols import Protocol
from sdprune_jax.files import convert, model_directory
from sdprune_jax.pruning.component import Calibrate, prune_component
from sdprune_jax.pruning.methods import STATISTIC, Method
from sdprune_jax.pruning.record import ComponentRecord
from sdprune_jax.scoring.calibration import Calibration
from sdprune_jax.scoring.recorder import Stat
from sdprune_jax.sweep import cliff, points

_AT_ONCE = 64  # latents in memory

DISTANCE = "latent_mse_to_dense"
_Stats = Mapping[str, Stat]


class Bench(NamedTuple):
    """What all points share, computed once.

    Attributes:
        model: configs of the dense one.
        protocol: how images are made and measured.
        size: height and width of images, in pixels.
        asked: prompts and reference pictures.
        folder: holds the images of all points.
        sample: the compiled sampler; a masked model runs the same program.
        networks: that measure, by name.
        params: the dense model's parameters by component, on the devices.
        flat: float32 arrays on the host, by path, of the components that points prune.
        widest: by component and statistic, the layers of all points that need it.
        calibration: makes the calibration of a component from its name and a seed.
        measurement: what is measured of every point.
        stats: what the dense model's layers read, by component, statistic and seed; filled when
            needed. Only the last seed is kept where more exceed `calibration.max_gigabytes`.
    """

    mesh: Mesh
    model: model_directory.ModelConfig
    protocol: Protocol
    size: tuple[int, int]
    asked: task.Task
    folder: pathlib.Path
    sample: pipeline.Sample
    networks: Mapping[str, networks.Network]
    params: Mapping[str, Any]
    flat: Mapping[str, Mapping[str, np.ndarray]]
    widest: Mapping[tuple[str, str], list[str]]
    calibration: Callable[[str, int], Calibration]
    measurement: Measurement
    stats: dict[tuple[str, str, int], _Stats | None]


def open_bench(
    mesh: Mesh,
    model: model_directory.ModelConfig,
    protocol: Protocol,
    asked: task.Task,
    size: tuple[int, int],
    folder: pathlib.Path,
    all_points: Sequence[points.Point],
    calibration: Callable[[str, int], Calibration],
    measurement: Measurement,
    dtype: str = "float32",
    variant: str = "",
) -> Bench:
    """Loads the dense model and the networks, and compiles nothing yet."""
    sample = pipeline.make_sample(
        model,
        mesh,
        sampler=protocol.sampler,
        num_steps=protocol.num_steps,
        guided=protocol.guidance_scale > 1,
        dtype=jnp.dtype(dtype),
    )
    widest: dict[tuple[str, str], list[str]] = {}
    pruned = set()
    for point in all_points:
        for name, part in points.methods(point).items():
            pruned.add(name)
            if statistic := STATISTIC[part.method]:
                layers = sites.prunable(model_directory.param_shapes(model, name), name, part.scope)
                known = widest.get((name, statistic), [])
                widest[name, statistic] = list(dict.fromkeys([*known, *layers]))
    params = pipeline.load(model, mesh, variant or None)
    flat = {
        name: {path: sharding.to_host(x) for path, x in convert.flatten(params[name]).items()}
        for name in sorted(pruned)
    }
    return Bench(
        mesh,
        model,
        protocol,
        size,
        asked,
        folder,
        sample,
        measuring.load_networks(measurement, protocol, model),
        params,
        flat,
        widest,
        calibration,
        measurement,
        {},
    )


def dense(bench: Bench, seed: int, folder: pathlib.Path) -> dict[str, Any]:
    """The dense model's row: its figures, and those that chance gets.

    Args:
        seed: seed of the noise.
        folder: where its images are drawn.
    """
    start = time.perf_counter()
    _render(bench, bench.params, seed, folder)
    figures = _measure(bench, folder)
    scores.take_values(figures)  # a row has means alone
    num = len(bench.asked.prompts)
    batches = (
        images.latents(folder, range(first, min(first + _AT_ONCE, num)))
        for first in range(0, num, _AT_ONCE)
    )
    chance = {name: figure["chance"] for name, figure in figures.items() if "chance" in figure}
    return {
        "seed": seed,
        "figures": figures,
        "chance": chance | {DISTANCE: cliff.spread(batches)},
        "seconds": {"render and measure": round(time.perf_counter() - start, 3)},
    }


def trial(
    bench: Bench,
    point: points.Point,
    seed: int,
    folder: pathlib.Path,
    of_dense: pathlib.Path,
) -> dict[str, Any]:
    """A point's row.

    Args:
        point: what to prune, and how.
        seed: seed of the noise, of the calibration, and of random scores.
        folder: where its images are drawn; an interrupted trial goes on from them.
        of_dense: the folder of the dense model's images of the same seed.
    """
    clock = [time.perf_counter()]
    params, parts, zeros = dict(bench.params), {}, 0
    for name, method in points.methods(point).items():
        params[name], done = prune(bench, name, method, seed)
        zeros += done.zeros
        parts[name] = {
            "method": points.label(method),
            "scope": method.scope,
            "sparsity": method.sparsity,
            "zeros": done.zeros,
            "of_prunable": done.of_prunable,
            "settings": dataclasses.asdict(method),
        }
    clock.append(time.perf_counter())
    _render(bench, params, seed, folder)
    clock.append(time.perf_counter())
    figures = _measure(bench, folder)
    resamples = bench.measurement.num_resamples
    figures |= scores.to_dense(folder, of_dense, len(bench.asked.prompts), resamples)
    scores.take_values(figures)  # a row has means alone
    clock.append(time.perf_counter())
    seconds = np.diff(clock).round(3).tolist()
    return {
        "seed": seed,
        **points.sparsity(point, _shapes(bench), zeros)._asdict(),
        "components": parts,
        "figures": figures,
        "seconds": dict(zip(("prune", "render", "measure"), seconds, strict=True)),
    }


def failed(bench: Bench, point: points.Point, seed: int, why: str) -> dict[str, Any]:
    """The row of a point whose images are not finite, which has no figures."""
    sparsity = points.expected(point, _shapes(bench))
    parts = {
        name: {
            "method": points.label(method),
            "scope": method.scope,
            "sparsity": method.sparsity,
        }
        for name, method in points.methods(point).items()
    }
    return {
        "seed": seed,
        **sparsity._asdict(),
        "components": parts,
        "figures": {},
        "failed": why,
    }


def keep(drawn: pathlib.Path, target: pathlib.Path, num_images: int, num_kept: int) -> None:
    """Moves the first pictures of a measured point into `target`, and deletes the others."""
    for i in range(min(num_kept, num_images)):
        path = images.picture_path(drawn, i)
        target.mkdir(parents=True, exist_ok=True)
        path.replace(target / path.name)
        path.with_suffix(".npy").replace(target / f"{path.stem}.npy")
    shutil.rmtree(drawn, ignore_errors=True)
    shutil.rmtree(drawn.parent / "cache", ignore_errors=True)


def prune(
    bench: Bench, component: str, method: Method, seed: int
) -> tuple[dict[str, Any], ComponentRecord]:
    """A component of the dense model, pruned and on the devices, and what was done to it."""
    shapes = model_directory.param_shapes(bench.model, component)
    dense = convert.unflatten(bench.flat[component], shapes)
    calibrate = _calibrate(bench, component, method, seed)
    pruned, done = prune_component(dense, component, method, calibrate, seed=seed)
    return sharding.place(pruned, sharding.fsdp_shardings(shapes, bench.mesh)), done


def _calibrate(bench: Bench, component: str, method: Method, seed: int) -> Calibrate | None:
    """Gives what layers read: once for all points, if all that fits in memory together."""
    statistic = STATISTIC[method.method]
    if statistic is None:
        return None
    calibration = bench.calibration(component, seed)
    key, widest = (component, statistic, seed), bench.widest[component, statistic]
    if key not in bench.stats:
        fits = len(calibration.packages(widest, statistic)) == 1
        if not fits:
            logging.warning(
                "statistics (%s) of the %s exceed calibration.max_gigabytes: every point computes"
                " its own, in parts",
                statistic,
                component,
            )
        dense = bench.flat[component]
        bench.stats[key] = calibration.stats(dense, widest, statistic) if fits else None
        _forget(bench.stats, seed, calibration.settings.max_gigabytes)
    stats = bench.stats[key]
    if stats is None:
        return calibration.parts
    return lambda _, layers, __: [(layers, {path: stats[path] for path in layers})]


def _forget(
    stats: dict[tuple[str, str, int], _Stats | None], seed: int, max_gigabytes: float
) -> None:
    """Drops what layers read under other seeds, if all that is held exceeds the limit."""
    leaves = {id(x): x.nbytes for arrays in stats.values() for x in jax.tree.leaves(arrays)}
    if sum(leaves.values()) > max_gigabytes * 1e9:
        for key in [key for key in stats if key[-1] != seed]:
            del stats[key]


def _render(bench: Bench, params: Mapping[str, Any], seed: int, folder: pathlib.Path) -> None:
    images.complete(
        folder,
        bench.model,
        params,
        bench.sample,
        bench.asked.prompts,
        size=bench.size,
        seed=seed,
        guidance_scale=bench.protocol.guidance_scale,
        negative_prompt="",
        batch_size=bench.measurement.batch_size,
    )


def _measure(bench: Bench, folder: pathlib.Path) -> scores.Figures:
    figures = measuring.measure(
        bench.measurement,
        bench.mesh,
        bench.protocol,
        bench.networks,
        {"": folder},
        bench.asked,
        bench.folder / "cache",
    )
    return figures[""]


def _shapes(bench: Bench) -> dict[str, Any]:
    return {name: model_directory.param_shapes(bench.model, name) for name in points.COMPONENTS}
