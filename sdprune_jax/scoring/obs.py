"""SparseGPT and OBS-Diff on one layer: choose weights and let the others make up for them.

Inputs are eliminated in order. What is cut from an input is paid for by the inputs after it, as
their Gram matrix says. The two methods differ only in how the Gram matrix is weighted.

A kernel here is `[n_in, n_out]`; that of a convolution is reshaped, `kernel.reshape(-1, c_out)`.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sdprune_jax import UserError
from sdprune_jax.scoring import masks
from sdprune_jax.scoring.recorder import LayerStats


class Factor(NamedTuple):
    """The Gram matrix of a layer, ready for elimination; layers that share it share this.

    Attributes:
        upper: U with U^T U the inverse of H, where H = 2 / weight * gram, plus damping.
        dead: inputs that were always 0. Their weights become 0.
        damping: fraction of the mean diagonal that was added to the diagonal.
        is_positive: False if H could not be factorised even with damping 1. Then `upper` is no
            use, and layers are pruned by magnitude.
    """

    upper: Float[Array, "n_in n_in"]
    dead: Bool[Array, " n_in"]
    damping: float
    is_positive: bool


class Solution(NamedTuple):
    """A pruned layer.

    Attributes:
        kernel: zero where weights were removed; the others have changed too.
        keep: whether each weight stays or, from `units.remove`, each unit.
        loss: half the growth of the squared error of the outputs, in units of H. NaN where
            the factor was of no use.
        method: "obs" or "alps", or "magnitude" where the factor was of no use.
        damping: fraction of the mean diagonal that was added to the diagonal.
    """

    kernel: Float[Array, "n_in n_out"]
    keep: Bool[Array, "n_in n_out"] | Bool[Array, " units"]
    loss: Float[Array, ""]
    method: str
    damping: float


def factorise(stats: LayerStats, damping: float = 0.01) -> Factor:
    """Damps the Gram matrix and factorises its inverse, with 10 times more until that works.

    Args:
        stats: their moment is a Gram matrix.
        damping: fraction of the mean diagonal to add at first, in (0, 1].

    Source: SparseGPT, section 3 and appendix A (https://arxiv.org/abs/2301.00774).
    """
    if not 0 < damping <= 1:
        raise UserError(f"damping is a fraction of the mean diagonal in (0, 1], got {damping}")
    if stats.moment.ndim != 2:
        raise UserError("second moments cannot compensate: calibrate with the statistic `gram`")
    while True:
        upper, dead, is_positive = _factorise(stats.moment, stats.weight, jnp.asarray(damping))
        if is_positive or damping == 1:
            return Factor(upper, dead, damping, bool(is_positive))
        damping = min(10 * damping, 1)


def remove(
    kernel: Float[Array, "n_in n_out"],
    factor: Factor,
    num_removed: int,
    m: int | None = None,
    *,
    block_size: int = 128,
) -> Solution:
    """Removes weights, and lets the inputs after them make up for it.

    What is zero stays zero and is removed first; so is, even beyond `num_removed`, all that reads a
    dead input.

    Args:
        kernel: weights of the layer.
        factor: Gram matrix of its inputs.
        num_removed: how many of all weights, in [0, size), or of every run of `m`, in (0, m).
        m: consecutive inputs of an output that make a run; None removes weights anywhere.
        block_size: inputs whose weights are chosen together, a multiple of `m`.

    Raises:
        ValueError: if `num_removed` is out of range, or `m` does not divide the inputs.

    Source: SparseGPT, algorithm 1 (https://arxiv.org/abs/2301.00774).
    """
    refuse(kernel.shape, num_removed, m)
    forced = factor.dead[:, None] | (kernel == 0)
    if not factor.is_positive:
        if m is None:
            return by_magnitude(kernel, factor, masks.lowest(jnp.abs(kernel), num_removed))
        runs = jnp.where(forced, -1, jnp.abs(kernel)).reshape(-1, m, kernel.shape[1])
        keep = (rank(runs) >= num_removed).reshape(kernel.shape) & ~forced
        return by_magnitude(kernel, factor, keep)
    numbers: Any = num_removed
    if m is None:
        num_forced = np.asarray(forced.sum(axis=1))
        numbers = _removed_per_block(num_forced, kernel.shape[1], num_removed, block_size)
    kernel, keep, loss = _eliminate(
        kernel, factor.upper, forced, jnp.asarray(numbers), block_size, m
    )
    return Solution(kernel, keep, loss, "obs", factor.damping)


def refuse(shape: Sequence[int], num_removed: int, m: int | None) -> None:
    """Raises a UserError if a kernel of this shape cannot lose so many weights; see `remove`."""
    size = math.prod(shape)
    if m is None and not 0 <= num_removed < size:
        raise UserError(f"cannot remove {num_removed} of {size}, expected [0, size)")
    if m is not None and (not 0 < num_removed < m or shape[0] % m):
        raise UserError(f"pattern {num_removed}:{m} does not fit {shape[0]} inputs")


def output_error(
    kernel: Float[Array, "n_in n_out"], pruned: Float[Array, "n_in n_out"], stats: LayerStats
) -> Float[Array, ""]:
    """The sum of w (x^T kernel - x^T pruned)^2 over all inputs and outputs."""
    change = kernel - pruned
    return jnp.sum(change * jnp.matmul(stats.moment, change, precision="highest"))


def relative_error(
    kernel: Float[Array | np.ndarray, "*ins n_out"],
    pruned: Float[Array | np.ndarray, "*ins n_out"],
    stats: LayerStats,
) -> Float[Array, ""]:
    """`output_error` as a share of the outputs' own squares: 0 if none moves, 1 if all are lost."""
    before, after = (jnp.asarray(x, jnp.float32).reshape(-1, x.shape[-1]) for x in (kernel, pruned))
    whole = output_error(before, jnp.zeros_like(before), stats)
    return output_error(before, after, stats) / jnp.where(whole > 0, whole, 1)


def by_magnitude(
    kernel: Float[Array, "n_in n_out"], factor: Factor, keep: Bool[Array, "n_in _"]
) -> Solution:
    """The layer without compensation."""
    nothing = jnp.asarray(jnp.nan, kernel.dtype)
    return Solution(jnp.where(keep, kernel, 0), keep, nothing, "magnitude", factor.damping)


def rank(scores: Float[Array, "runs m n_out"]) -> Int[Array, "runs m n_out"]:
    """How many of a run come before each, lowest first, ties by index."""
    return jnp.argsort(jnp.argsort(scores, axis=1), axis=1)


@jax.jit
def _factorise(
    gram: Float[Array, "n_in n_in"], weight: Float[Array, ""], damping: Float[Array, ""]
) -> tuple[Float[Array, "n_in n_in"], Bool[Array, " n_in"], Bool[Array, ""]]:
    hessian = 2 / weight * gram
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    diagonal = jnp.where(dead, 1, diagonal)
    diagonal += damping * jnp.mean(diagonal)
    hessian = jnp.where(jnp.eye(len(gram), dtype=bool), diagonal[None], hessian)
    # With the order of inputs reversed, H = R R^T for an upper R, and U is the inverse of R. That
    # is one Cholesky factor in place of two, and the inverse of H, which squares the errors, is
    # never formed. A failed factor is NaN.
    upper = jnp.flip(jnp.linalg.cholesky(jnp.flip(hessian)))
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    inverse = jax.scipy.linalg.solve_triangular(upper, identity)
    return inverse, dead, jnp.isfinite(inverse).all()


def _removed_per_block(
    num_forced: Int[np.ndarray, " n_in"], n_out: int, num_removed: int, block_size: int
) -> Int[np.ndarray, " blocks"]:
    """How many weights each block loses.

    What is not forced is shared out by size, cumulatively, so that the sum is exact.
    """
    starts = np.arange(0, len(num_forced), block_size)
    fixed = np.add.reduceat(num_forced, starts).astype(np.int64)
    sizes = np.add.reduceat(np.full(len(num_forced), n_out), starts)
    free = np.cumsum(sizes - fixed)
    shared = max(num_removed - int(fixed.sum()), 0) * free // max(int(free[-1]), 1)
    return (np.diff(shared, prepend=0) + fixed).astype(np.int32)


@partial(jax.jit, static_argnames=("block_size", "m"))
def _eliminate(
    kernel: Float[Array, "n_in n_out"],
    upper: Float[Array, "n_in n_in"],
    forced: Bool[Array, "n_in n_out"],
    num_removed: Int[Array, "*blocks"],
    block_size: int,
    m: int | None,
) -> tuple[Float[Array, "n_in n_out"], Bool[Array, "n_in n_out"], Float[Array, ""]]:
    """Goes through the inputs block by block.

    `forced` weights go whatever their score; `num_removed` is for each block or, with `m`, for
    every run of `m` inputs.
    """
    n_in = len(kernel)
    kernel = jnp.where(forced, 0, kernel)

    def block(state: Any, start: Any, size: int, number: Any) -> Any:
        kernel, keep, loss = state
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        rows, stuck, factors = cut(kernel), cut(forced), cut(upper)
        square = cut(factors, axis=1)
        if m is None:
            rows, errors, chosen = _anywhere(rows, square, stuck, number)
        else:
            rows, errors, chosen = _in_runs(rows, square, stuck, number, m)
        rows = jnp.where(chosen, rows, 0)
        later = jnp.where(jnp.arange(n_in)[None] < start + size, 0, factors)
        kernel -= jnp.matmul(later.T, errors, precision="highest")
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return put(kernel, rows), put(keep, chosen), loss + jnp.sum(errors**2) / 2

    state = (kernel, jnp.zeros_like(forced), jnp.zeros((), kernel.dtype))
    numbers = num_removed if m is None else jnp.broadcast_to(num_removed, -(-n_in // block_size))
    whole, rest = divmod(n_in, block_size)
    step = lambda i, state: block(state, i * block_size, block_size, numbers[i])
    state = jax.lax.fori_loop(0, whole, step, state) if whole else state
    return block(state, n_in - rest, rest, numbers[-1]) if rest else state


def _anywhere(rows: Any, square: Any, stuck: Any, number: Any) -> tuple[Any, Any, Any]:
    """Chooses all weights of a block at once; returns its rows, their errors and what stays."""
    scores = _scores(rows, jnp.diagonal(square)[:, None], stuck)
    # `lowest` keeps at least one, but a block may lose all of its weights.
    chosen = masks.lowest(scores, number) & ~stuck & (number < scores.size)
    step = lambda j, carry: _eliminate_input(square, j, carry, chosen[j])
    rows, errors = jax.lax.fori_loop(0, len(rows), step, (rows, jnp.zeros_like(rows)))
    return rows, errors, chosen


def _in_runs(rows: Any, square: Any, stuck: Any, number: Any, m: int) -> tuple[Any, Any, Any]:
    """As `_anywhere`, but chooses within every run of `m` inputs once those before are gone."""
    diagonal = jnp.diagonal(square)[:, None]

    def run(i: Any, carry: Any) -> Any:
        rows, errors, chosen = carry
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=i * m, slice_size=m)
        scores = _scores(cut(rows), cut(diagonal), cut(stuck))
        kept = (rank(scores[None])[0] >= number) & ~cut(stuck)
        for j in range(m):
            rows, errors = _eliminate_input(square, i * m + j, (rows, errors), kept[j])
        return rows, errors, jax.lax.dynamic_update_slice_in_dim(chosen, kept, i * m, 0)

    carry = (rows, jnp.zeros_like(rows), jnp.zeros_like(stuck))
    return jax.lax.fori_loop(0, len(rows) // m, run, carry)


def _eliminate_input(square: Any, j: Any, carry: Any, kept: Any) -> tuple[Any, Any]:
    rows, errors = carry
    error = jnp.where(kept, 0, rows[j]) / square[j, j]
    # U is 0 left of its diagonal: inputs before this one stay as they are.
    return rows - square[j][:, None] * error[None], errors.at[j].set(error)


def _scores(rows: Any, diagonal: Any, stuck: Any) -> Any:
    least = jnp.finfo(rows.dtype).tiny  # so that what must go ranks first
    return jnp.where(stuck, 0, jnp.maximum((rows / diagonal) ** 2, least))
