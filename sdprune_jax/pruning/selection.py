"""From a method to the pruned kernels of a component."""

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import NamedTuple

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
    """What became of a layer; all but the first are None where no solver was at work.

    Attributes:
        keep: which weights stay, in Flax's layout.
        kernel: the weights that stay, which a solver has changed.
        loss: growth of the squared error of the outputs; NaN where the solver fell back.
        damping: what the solver added to the Gram matrix, as a fraction of its mean diagonal.
        output_error: squared change of the outputs over their own squares.
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
        kernels: layers that are pruned together.
        method: how they are pruned.
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
    """Yields every layer of `kernels`, pruned; the kernels given stay as they are.

    Args:
        kernels: the layers in scope.
        method: how they are pruned.
        removed: weights that each layer loses, from `removed_of_each`; where all layers compete,
            they lose the sum.
        stats: what layers read, where the method asks for it.
        key: draws random scores.
    """
    if method.method in SOLVERS:
        yield from _solve(kernels, method, removed, stats)
        return
    group = method.group or ("output" if method.method == "wanda" else "layer")

    def score(path: str) -> Float[np.ndarray, "..."]:
        """In torch's layout, whose order parts equal scores."""
        kernel = kernels[path]
        if method.method == "random":
            return convert.to_torch(path, np.asarray(scores.random(key, path, kernel)))
        if group == "normalised":
            kernel = scores.normalised(kernel)
        return convert.to_torch(path, _score(kernel, method, stats.get(path)))

    def choose(path: str) -> Bool[np.ndarray, "..."]:
        """Chooses within a layer or each of its outputs."""
        x = score(path)
        rows = x.reshape(1 if group == "layer" else len(x), -1)
        if method.band:
            return patterns.band(rows, *method.band).reshape(x.shape)
        return masks.lowest_of_rows(rows, removed[path] // len(rows)).reshape(x.shape)

    if method.pattern != "unstructured":
        n, m = request.n_and_m(method.pattern)
        for path in [path for path in kernels if path not in removed]:
            flax = jnp.asarray(convert.from_torch(path, score(path)))
            yield path, Pruned(np.asarray(patterns.n_of_m(flax, n, m)))
    if group in ("layer", "output"):
        chosen = ((path, choose(path)) for path in removed)
    else:
        chosen = global_threshold.lowest(score, list(kernels), sum(removed.values()))
    for path, keep in chosen:
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
    """The sparsity of each layer of `sizes`, by OWL over blocks, so that all lose `sparsity`."""
    blocks, ratios = allocate.blocks(sizes), {}
    for name, paths in blocks.items():
        each = [_score(kernels[path], method, stats.get(path)) for path in paths]
        ratios[name] = allocate.outlier_ratio(each, method.owl_multiple)
    in_block = {name: sum(sizes[p] for p in paths) for name, paths in blocks.items()}
    sparsities = allocate.owl(ratios, in_block, sparsity, method.owl_lambda)
    of_layer = {path: sparsities[name] for name, paths in blocks.items() for path in paths}
    return {path: of_layer[path] for path in sizes}


def _solve(
    kernels: Kernels,
    method: Method,
    removed: Mapping[str, int],
    stats: Mapping[str, Stat],
) -> Iterator[tuple[str, Pruned]]:
    factors: dict[int, obs.Factor] = {}  # layers that read the same share it
    for path, kernel in kernels.items():
        if removed.get(path) == 0:
            nothing = np.ones(kernel.shape, bool)  # not even weights of inputs that are always 0
            yield path, Pruned(nothing, loss=0.0, output_error=0.0)
            continue
        read = stats[path]
        assert isinstance(read, LayerStats)
        flat = jnp.asarray(kernel, jnp.float32).reshape(-1, kernel.shape[-1])
        number = (removed[path],) if path in removed else request.n_and_m(method.pattern)
        if method.method == "alps":
            solution = alps.remove(flat, read, *number, damping=method.damping)
        else:
            if id(read.moment) not in factors:
                factors[id(read.moment)] = obs.factorise(read, method.damping)
            solution = obs.remove(flat, factors[id(read.moment)], *number)
        if solution.method == "magnitude":
            logging.warning("%s: no factor even with damping 1, so by magnitude", path)
        error = obs.relative_error(flat, solution.kernel, read)
        keep = np.asarray(solution.keep).reshape(kernel.shape)
        solved = np.asarray(solution.kernel).reshape(kernel.shape)
        numbers = map(float, (solution.loss, solution.damping, error))
        yield path, Pruned(keep, solved, *numbers)
