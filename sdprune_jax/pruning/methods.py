"""From a section of the config to the pruned kernels of a component.

What a criterion needs to know of layers is in `STATISTIC`; what it compares, unless told, is
what its paper compares.
"""

import functools
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Key

from sdprune_jax import config, convert
from sdprune_jax.pruning import allocate, alps, component, masks, obs, patterns, recorder, scores
from sdprune_jax.pruning.recorder import LayerStats

Kernels = Mapping[str, Float[np.ndarray, "..."]]  # by path, in Flax's layout
Stat = LayerStats | Float[np.ndarray, "..."]  # of what a layer reads, or the loss's gradient by it

STATISTIC: Mapping[str, str | None] = {
    "random": None,
    "magnitude": None,
    "wanda": "moments",
    "sparsegpt": "gram",
    "obsdiff": "weighted_gram",
    "alps": "gram",
    "taylor": "gradient",
}
_GROUP = {
    "random": "layer",
    "magnitude": "layer",
    "wanda": "output",
    "taylor": "layer",
}
_SOLVERS = ("sparsegpt", "obsdiff", "alps")  # which choose and compensate by blocks of their own


class Pruned(NamedTuple):
    """What became of a layer.

    Attributes:
        keep: of every weight, in Flax's layout.
        kernel: where the weights that stay have changed too.
        loss: growth of the squared error of the outputs, of a solver; NaN where it fell back.
        damping: of a solver.
    """

    keep: Bool[np.ndarray, "..."]
    kernel: Float[np.ndarray, "..."] | None = None
    loss: float | None = None
    damping: float | None = None


def check(kernels: Mapping[str, Any], section: config.PruneComponent) -> None:
    """Refuses what cannot be done, before any work.

    Args:
        kernels: arrays or `jax.ShapeDtypeStruct`s of the layers in scope.
        section: of the component.

    Raises:
        ValueError: naming the fields that clash, or the layers that do not fit the pattern.
    """
    problems = []
    group, pattern = section.group, section.pattern
    if section.method in _SOLVERS and group not in (None, "layer"):
        problems.append(
            f"group={group} has no meaning for {section.method}, which has its own blocks"
        )
    rule = (section.method, group or "layer", pattern, section.allocation)
    if section.method == "taylor" and group == "normalised":
        problems.append("group=normalised has no meaning for taylor, whose scores are of one scale")
    if section.threshold == "rz" and rule != ("magnitude", "layer", "unstructured", "uniform"):
        problems.append("threshold=rz is a rule of uniform layer-wise magnitude only")
    if section.allocation == "owl" and (group or "layer") not in ("layer", "output"):
        problems.append(f"allocation=owl gives every layer its own sparsity; group={group} none")
    if pattern != "unstructured":
        n, m = n_and_m(pattern)
        if section.sparsity != n / m:
            problems.append(f"pattern={pattern} removes {n / m:g}; set sparsity to that")
        if section.allocation != "uniform" or group not in (None, "layer"):
            problems.append(f"pattern={pattern} leaves nothing to allocate or to compare")
    if problems:
        raise ValueError("config.prune is not possible: " + "; ".join(problems))
    if pattern != "unstructured":
        shapes = {convert.torch_key(path): tuple(x.shape) for path, x in kernels.items()}
        patterns.refuse_indivisible(shapes, *n_and_m(pattern))


def n_and_m(pattern: str) -> tuple[int, int]:
    n, m = pattern.split(":")
    return int(n), int(m)


def removed_of_each(
    kernels: Kernels, section: config.PruneComponent, stats: Mapping[str, Stat]
) -> dict[str, int]:
    """How many weights every layer loses."""
    sizes = {path: kernel.size for path, kernel in kernels.items()}
    if section.threshold == "rz":
        return allocate.each_floored(sizes, section.sparsity)
    if section.allocation == "uniform":
        return allocate.uniform(sizes, section.sparsity)
    blocks = allocate.blocks(kernels)
    ratios = {}
    for name, paths in blocks.items():
        found = [_score(kernels[path], section, stats.get(path)) for path in paths]
        ratios[name] = allocate.outlier_ratio(found, section.owl_multiple)
    in_block = {name: sum(sizes[p] for p in paths) for name, paths in blocks.items()}
    sparsities = allocate.owl(ratios, in_block, section.sparsity, section.owl_lambda)
    of_layer: dict[str, Fraction] = {
        path: sparsities[name] for name, paths in blocks.items() for path in paths
    }
    return allocate.counts(sizes, {path: of_layer[path] for path in sizes})


def prune(
    kernels: Kernels,
    section: config.PruneComponent,
    removed: Mapping[str, int],
    stats: Mapping[str, Stat],
    key: Key[Array, ""],
) -> Iterator[tuple[str, Pruned]]:
    """Yields every layer of `kernels`, pruned.

    Args:
        kernels: of the layers in scope; none is changed.
        section: of the component.
        removed: weights that each layer loses; a component group takes their sum.
        stats: what layers read, where the method asks for it.
        key: of random scores.
    """
    if section.method in _SOLVERS:
        yield from _solve(kernels, section, removed, stats)
        return
    group = section.group or _GROUP[section.method]

    def score(path: str) -> Float[np.ndarray, "..."]:
        """In torch's layout, whose order parts equal scores."""
        kernel = kernels[path]
        if section.method == "random":
            found = np.asarray(scores.random(key, path, kernel))
        elif group == "normalised":
            found = _score(scores.normalised(kernel), section, stats.get(path))
        else:
            found = _score(kernel, section, stats.get(path))
        return convert.to_torch(path, found)

    if section.pattern != "unstructured":
        n, m = n_and_m(section.pattern)
        for path in kernels:
            found = jnp.asarray(convert.from_torch(path, score(path)))
            yield path, Pruned(np.asarray(patterns.n_of_m(found, n, m)))
        return
    if group == "output":
        found = (
            (path, masks.lowest_per_output(jnp.asarray(score(path)), n // kernels[path].shape[-1]))
            for path, n in removed.items()
        )
    elif group == "layer" and section.method == "magnitude":  # bits are scores: no copy
        found = masks.lowest_of_each(
            {path: convert.to_torch(path, kernel) for path, kernel in kernels.items()}, removed
        )
    elif group == "layer":
        found = masks.lowest_of_each({path: score(path) for path in kernels}, removed)
    else:
        found = component.lowest(score, list(kernels), sum(removed.values()))
    for path, keep in found:
        keep = np.asarray(keep)
        if section.threshold == "rz":
            keep = masks.without_ties(score(path), keep)
        yield path, Pruned(convert.from_torch(path, keep))


def _score(
    kernel: Float[np.ndarray, "..."], section: config.PruneComponent, stats: Stat | None
) -> Float[np.ndarray, "..."]:
    if STATISTIC[section.method] is None:
        return np.asarray(scores.magnitude(kernel))
    if isinstance(stats, np.ndarray):
        return np.asarray(scores.taylor(kernel, stats))
    assert stats is not None
    return np.asarray(scores.wanda(kernel, np.asarray(recorder.mean_square(stats))))


def _solve(
    kernels: Kernels,
    section: config.PruneComponent,
    removed: Mapping[str, int],
    stats: Mapping[str, Stat],
) -> Iterator[tuple[str, Pruned]]:
    unstructured: Any = obs.unstructured
    n_of_m: Any = obs.n_of_m
    if section.method == "alps":
        unstructured = functools.partial(alps.unstructured, damping=section.damping)
        n_of_m = functools.partial(alps.n_of_m, damping=section.damping)
    factors: dict[int, obs.Factor] = {}  # layers that read the same share it
    for path, kernel in kernels.items():
        found = stats[path]
        assert isinstance(found, LayerStats)
        seen: LayerStats | obs.Factor = found
        if section.method != "alps":
            moment = id(found.moment)
            if moment not in factors:
                factors[moment] = obs.factorise(found, section.damping)
            seen = factors[moment]
            if not seen.is_positive:
                logging.warning("%s: no factor even with damping 1, so by magnitude", path)
        flat = jnp.asarray(kernel, jnp.float32).reshape(-1, kernel.shape[-1])
        if section.pattern == "unstructured":
            solution = unstructured(flat, seen, removed[path])
        else:
            solution = n_of_m(flat, seen, *n_and_m(section.pattern))
        yield (
            path,
            Pruned(
                np.asarray(solution.keep).reshape(kernel.shape),
                np.asarray(solution.kernel).reshape(kernel.shape),
                float(solution.loss),
                float(solution.damping),
            ),
        )
