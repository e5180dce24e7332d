"""From a method to the pruned kernels of a component."""

import functools
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Key

from sdprune_jax.files import convert
from sdprune_jax.pruning import allocate, alps, global_threshold, patterns, request, scores
from sdprune_jax.pruning.methods import SOLVERS, STATISTIC, Method
from sdprune_jax.scoring import masks, obs, recorder
from sdprune_jax.scoring.recorder import LayerStats, Stat

Kernels = Mapping[str, Float[np.ndarray, "..."]]  # by path, in Flax's layout


class Pruned(NamedTuple):
    """What became of a layer.

    Attributes:
        keep: of every weight, in Flax's layout.
        kernel: where the weights that stay have changed too.
        loss: growth of the squared error of the outputs, of a solver; NaN where it fell back.
        damping: of a solver.
        output_error: of a solver: what the squares of the outputs' changes are of the outputs' own.
    """

    keep: Bool[np.ndarray, "..."]
    kernel: Float[np.ndarray, "..."] | None = None
    loss: float | None = None
    damping: float | None = None
    output_error: float | None = None


def removed_of_each(
    kernels: Kernels,
    method: Method,
    stats: Mapping[str, Stat],
    sizes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """How many weights every layer loses; those that follow an n:m pattern are left out.

    Args:
        kernels: of layers that are pruned together.
        stats: what layers read, where the method asks for it.
        sizes: weights of all layers in scope, by path; None if `kernels` are all of them.
    """
    sizes = sizes or {path: kernel.size for path, kernel in kernels.items()}
    own = request.own_sparsities(sizes, method)
    alone = {p: masks.num_removed(sizes[p], own[p]) for p in kernels if p in own}
    if method.pattern != "unstructured":
        return alone
    others = {path: sizes[path] for path in kernels if path not in own}
    sparsity = allocate.remaining(sizes, method.sparsity, own)
    if method.threshold == "rz":
        removed = allocate.each_floored(others, sparsity)
    elif method.allocation == "uniform" or not others:
        removed = allocate.uniform(others, sparsity)
    else:
        sparsities = _by_outliers(kernels, others, method, stats, sparsity)
        removed = allocate.counts(others, sparsities)
        # What is sparse enough already has other outliers than it had: it keeps its own shares.
        zeros = {
            path: min(size - int(np.count_nonzero(kernels[path])), size - 1)
            for path, size in others.items()
        }
        if 0 < sum(removed.values()) <= sum(zeros.values()):
            removed = zeros
    return {path: (alone | removed)[path] for path in kernels}


def prune(
    kernels: Kernels,
    method: Method,
    removed: Mapping[str, int],
    stats: Mapping[str, Stat],
    key: Key[Array, ""],
) -> Iterator[tuple[str, Pruned]]:
    """Yields every layer of `kernels`, pruned.

    Args:
        kernels: of the layers in scope; none is changed.
        removed: of `removed_of_each`; a component group takes their sum.
        stats: what layers read, where the method asks for it.
        key: of random scores.
    """
    if method.method in SOLVERS:
        yield from _solve(kernels, method, removed, stats)
        return
    group = method.group or ("output" if method.method == "wanda" else "layer")

    def score(path: str) -> Float[np.ndarray, "..."]:
        """In torch's layout, whose order parts equal scores."""
        kernel = kernels[path]
        if method.method == "random":
            found = np.asarray(scores.random(key, path, kernel))
        elif group == "normalised":
            found = _score(scores.normalised(kernel), method, stats.get(path))
        else:
            found = _score(kernel, method, stats.get(path))
        return convert.to_torch(path, found)

    if method.pattern != "unstructured":
        n, m = request.n_and_m(method.pattern)
        for path in [path for path in kernels if path not in removed]:
            found = jnp.asarray(convert.from_torch(path, score(path)))
            yield path, Pruned(np.asarray(patterns.n_of_m(found, n, m)))
    if method.band:
        found = ((path, _outside(score(path), *method.band, group)) for path in kernels)
    elif group == "output":
        found = (
            (path, masks.lowest_per_output(jnp.asarray(score(path)), n // kernels[path].shape[-1]))
            for path, n in removed.items()
        )
    elif group == "layer" and method.method == "magnitude":  # bits are scores: no copy
        found = masks.lowest_of_each(
            {path: convert.to_torch(path, kernels[path]) for path in removed}, removed
        )
    elif group == "layer":
        found = masks.lowest_of_each({path: score(path) for path in removed}, removed)
    else:
        found = global_threshold.lowest(score, list(kernels), sum(removed.values()))
    for path, keep in found:
        keep = np.asarray(keep)
        if method.threshold == "rz":
            keep = masks.without_ties(score(path), keep)
        yield path, Pruned(convert.from_torch(path, keep))


def _score(
    kernel: Float[np.ndarray, "..."], method: Method, stats: Stat | None
) -> Float[np.ndarray, "..."]:
    if STATISTIC[method.method] is None:
        return np.asarray(scores.magnitude(kernel))
    if isinstance(stats, np.ndarray):
        return np.asarray(scores.taylor(kernel, stats))
    assert stats is not None
    return np.asarray(scores.wanda(kernel, np.asarray(recorder.mean_square(stats))))


def _by_outliers(
    kernels: Kernels,
    sizes: Mapping[str, int],
    method: Method,
    stats: Mapping[str, Stat],
    sparsity: Fraction,
) -> dict[str, Fraction]:
    """By path of `sizes`, whose layers lose `sparsity` together: the blocks' own, by OWL."""
    blocks, ratios = allocate.blocks(sizes), {}
    for name, paths in blocks.items():
        found = [_score(kernels[path], method, stats.get(path)) for path in paths]
        ratios[name] = allocate.outlier_ratio(found, method.owl_multiple)
    in_block = {name: sum(sizes[p] for p in paths) for name, paths in blocks.items()}
    sparsities = allocate.owl(ratios, in_block, sparsity, method.owl_lambda)
    of_layer = {path: sparsities[name] for name, paths in blocks.items() for path in paths}
    return {path: of_layer[path] for path in sizes}


def _outside(
    scores: Float[np.ndarray, "n_out n_in *taps"], low: float, high: float, group: str
) -> Bool[np.ndarray, "n_out n_in *taps"]:
    """What a band of a layer, or of each of its outputs, leaves."""
    keep = functools.partial(patterns.band, low=low, high=high)
    if group == "layer":
        return np.asarray(keep(jnp.asarray(scores)))
    rows = jnp.asarray(scores).reshape(len(scores), -1)
    return np.asarray(jax.vmap(keep)(rows)).reshape(scores.shape)


def _solve(
    kernels: Kernels,
    method: Method,
    removed: Mapping[str, int],
    stats: Mapping[str, Stat],
) -> Iterator[tuple[str, Pruned]]:
    # What is sparse already gets no weight back.
    unstructured: Any = functools.partial(obs.unstructured, preserve_zeros=True)
    n_of_m: Any = functools.partial(obs.n_of_m, preserve_zeros=True)
    if method.method == "alps":
        unstructured = functools.partial(alps.unstructured, damping=method.damping)
        n_of_m = functools.partial(alps.n_of_m, damping=method.damping)
    factors: dict[int, obs.Factor] = {}  # layers that read the same share it
    for path, kernel in kernels.items():
        if removed.get(path) == 0:
            nothing = np.ones(kernel.shape, bool)  # not even weights of inputs that are always 0
            yield path, Pruned(nothing, loss=0.0, output_error=0.0)
            continue
        found = stats[path]
        assert isinstance(found, LayerStats)
        seen: LayerStats | obs.Factor = found
        if method.method != "alps":
            moment = id(found.moment)
            if moment not in factors:
                factors[moment] = obs.factorise(found, method.damping)
            seen = factors[moment]
        flat = jnp.asarray(kernel, jnp.float32).reshape(-1, kernel.shape[-1])
        if path in removed:
            solution = unstructured(flat, seen, removed[path])
        else:
            solution = n_of_m(flat, seen, *request.n_and_m(method.pattern))
        if solution.method == "magnitude":
            logging.warning("%s: no factor even with damping 1, so by magnitude", path)
        yield (
            path,
            Pruned(
                np.asarray(solution.keep).reshape(kernel.shape),
                np.asarray(solution.kernel).reshape(kernel.shape),
                float(solution.loss),
                float(solution.damping),
                float(obs.relative_error(flat, solution.kernel, found)),
            ),
        )
