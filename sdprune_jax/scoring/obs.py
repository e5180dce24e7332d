"""SparseGPT and OBS-Diff on one layer: choose weights and let the others make up for them.

Inputs are eliminated in order. What is cut from an input is paid for by the inputs after it, as
their Gram matrix says. The two methods differ only in how the Gram matrix is weighted.

A kernel here is `[n_in, n_out]`; that of a convolution is reshaped, `kernel.reshape(-1, c_out)`.
"""

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
        damping: what was added to the diagonal, as a fraction of its mean.
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
        kernel: what is kept has changed.
        keep: of every weight or, of `units.remove`, of every unit.
        loss: half the growth of the squared error of the outputs, in units of H. NaN where
            the factor was of no use.
        method: "obs", or "magnitude" where the factor was of no use; "alps" of `alps`.
        damping: of the factor.
    """

    kernel: Float[Array, "n_in n_out"]
    keep: Bool[Array, "n_in n_out"] | Bool[Array, " units"]
    loss: Float[Array, ""]
    method: str
    damping: float


def factorise(stats: LayerStats, damping: float = 0.01) -> Factor:
    """Damps the Gram matrix and factorises its inverse, with 10 times more until that works.

    Args:
        stats: with a Gram matrix.
        damping: to begin with, in (0, 1].

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


def unstructured(
    kernel: Float[Array, "n_in n_out"],
    factor: Factor,
    num_removed: int,
    *,
    block_size: int = 128,
    threshold: str = "exact",
    preserve_zeros: bool = False,
) -> Solution:
    """Removes weights anywhere.

    Args:
        kernel: of the layer.
        factor: of its inputs.
        num_removed: weights, in [0, size). Weights of dead inputs are the first of them, and all
            go even if there are more.
        block_size: inputs whose weights are chosen together.
        threshold: "exact" removes just as many; "published" also what ties with the first that
            would be kept, and that one, in every block.
        preserve_zeros: leave zero what is zero, and count it among the removed. Else zeros
            may be filled.

    Raises:
        ValueError: if a number is out of range.

    Source: SparseGPT, algorithm 1 (https://arxiv.org/abs/2301.00774).
    """
    if not 0 <= num_removed < kernel.size:
        raise UserError(f"cannot remove {num_removed} of {kernel.size}, expected [0, size)")
    if threshold not in ("exact", "published"):
        raise UserError(f"threshold is {threshold!r}, expected exact or published")
    if not factor.is_positive:
        return by_magnitude(kernel, factor, masks.lowest(jnp.abs(kernel), num_removed))
    forced = _forced(kernel, factor.dead, preserve_zeros)
    per_block = _removed_per_block(
        np.asarray(forced.sum(axis=1)), kernel.shape[1], num_removed, block_size, threshold
    )
    published = threshold == "published" and num_removed > 0
    kernel, keep, loss = _eliminate(
        kernel, factor.upper, forced, jnp.asarray(per_block), block_size, None, published
    )
    return Solution(kernel, keep, loss, "obs", factor.damping)


def n_of_m(
    kernel: Float[Array, "n_in n_out"],
    factor: Factor,
    n: int,
    m: int,
    *,
    block_size: int = 128,
    preserve_zeros: bool = False,
) -> Solution:
    """Removes `n` of every `m` consecutive inputs of every output; otherwise as `unstructured`.

    Raises:
        ValueError: if `m` does not divide the inputs and the block, or `n` is not in [1, m).
    """
    problems = [] if 0 < n < m else [f"cannot remove {n} of every {m}"]
    problems += [
        f"{m} does not divide the {what}"
        for size, what in ((kernel.shape[0], f"{kernel.shape[0]} inputs"),
                           (block_size, f"block of {block_size}"))
        if size % max(m, 1)
    ]  # fmt: skip
    if problems:
        raise UserError(f"pattern {n}:{m} does not fit: " + "; ".join(problems))
    forced = _forced(kernel, factor.dead, preserve_zeros)
    if not factor.is_positive:
        score = jnp.where(forced, -1, jnp.abs(kernel))
        runs = score.reshape(-1, m, kernel.shape[1])
        return by_magnitude(kernel, factor, (_rank(runs) >= n).reshape(kernel.shape) & ~forced)
    kernel, keep, loss = _eliminate(
        kernel, factor.upper, forced, jnp.asarray(n), block_size, m, False
    )  # fmt: skip
    return Solution(kernel, keep, loss, "obs", factor.damping)


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
    """`output_error` as a share of the outputs' own squares: 0 if none moves, 1 if all are lost.

    Args:
        kernel: in Flax's layout, dense.
        pruned: what became of it.
        stats: with a Gram matrix.
    """
    before, after = (jnp.asarray(x, jnp.float32).reshape(-1, x.shape[-1]) for x in (kernel, pruned))
    whole = output_error(before, jnp.zeros_like(before), stats)
    return output_error(before, after, stats) / jnp.where(whole > 0, whole, 1)


def by_magnitude(
    kernel: Float[Array, "n_in n_out"], factor: Factor, keep: Bool[Array, "n_in _"]
) -> Solution:
    """The layer without compensation."""
    nothing = jnp.asarray(jnp.nan, kernel.dtype)
    return Solution(jnp.where(keep, kernel, 0), keep, nothing, "magnitude", factor.damping)


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


def _forced(
    kernel: Float[Array, "n_in n_out"], dead: Bool[Array, " n_in"], preserve_zeros: bool
) -> Bool[Array, "n_in n_out"]:
    """Weights that are removed whatever their score."""
    forced = jnp.broadcast_to(dead[:, None], kernel.shape)
    return forced | (kernel == 0) if preserve_zeros else forced


def _removed_per_block(
    forced: Int[np.ndarray, " n_in"], n_out: int, num_removed: int, block_size: int, threshold: str
) -> Int[np.ndarray, " blocks"]:
    """How many weights each block loses.

    What is not forced is shared out by size, cumulatively, so the sum is exact. The published rule
    rounds every block down.
    """
    starts = range(0, len(forced), block_size)
    sizes = [len(forced[start : start + block_size]) * n_out for start in starts]
    if threshold == "published":
        return np.array([size * num_removed // sum(sizes) for size in sizes], np.int32)
    fixed = [int(forced[start : start + block_size].sum()) for start in starts]
    free = np.cumsum([size - f for size, f in zip(sizes, fixed, strict=True)]).tolist()
    share = max(num_removed - sum(fixed), 0)
    shared = [share * end // free[-1] if free[-1] else 0 for end in free]
    return np.diff(shared, prepend=0).astype(np.int32) + np.array(fixed, np.int32)


@partial(jax.jit, static_argnames=("block_size", "m", "published"))
def _eliminate(
    kernel: Float[Array, "n_in n_out"],
    upper: Float[Array, "n_in n_in"],
    forced: Bool[Array, "n_in n_out"],
    num_removed: Int[Array, "*blocks"],
    block_size: int,
    m: int | None,
    published: bool,
) -> tuple[Float[Array, "n_in n_out"], Bool[Array, "n_in n_out"], Float[Array, ""]]:
    """Goes through the inputs block by block.

    Args:
        kernel: of the layer.
        upper: of its factor.
        forced: weights removed whatever their score; those of dead inputs are set to 0 first.
        num_removed: of each block or, with `m`, of every run of `m` inputs.
        block_size: inputs.
        m: inputs in a run, or None.
        published: also remove the lowest score that would be kept, and its ties.
    """
    n_in = len(kernel)
    kernel = jnp.where(forced, 0, kernel)

    def block(state: Any, start: Any, size: int, number: Any) -> Any:
        kernel, keep, loss = state
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        rows, stuck, factors = cut(kernel), cut(forced), cut(upper)
        square = cut(factors, axis=1)
        diagonal = jnp.diagonal(square)[:, None]

        def column(j: Any, carry: Any, kept: Any) -> Any:
            rows, errors = carry
            error = jnp.where(kept, 0, rows[j]) / diagonal[j]
            # U is 0 left of its diagonal: inputs before this one stay as they are.
            return rows - square[j][:, None] * error[None], errors.at[j].set(error)

        def score(rows: Any, diagonal: Any, stuck: Any) -> Any:
            least = jnp.finfo(rows.dtype).tiny  # so that what must go ranks first
            return jnp.where(stuck, 0, jnp.maximum((rows / diagonal) ** 2, least))

        carry = (rows, jnp.zeros_like(rows))
        if m is None:
            scores = score(rows, diagonal, stuck)
            # `lowest` keeps at least one, but a block may lose all of its weights.
            chosen = masks.lowest(scores, number) & ~stuck & (number < scores.size)
            if published:
                chosen &= scores > jnp.min(scores, where=chosen, initial=jnp.inf)
            rows, errors = jax.lax.fori_loop(0, size, lambda j, c: column(j, c, chosen[j]), carry)
        else:

            def run(i: Any, carry: Any) -> Any:
                rows, errors, chosen = carry
                cut = partial(jax.lax.dynamic_slice_in_dim, start_index=i * m, slice_size=m)
                scores = score(cut(rows), cut(diagonal), cut(stuck))
                kept = (_rank(scores[None])[0] >= number) & ~cut(stuck)
                for j in range(m):
                    rows, errors = column(i * m + j, (rows, errors), kept[j])
                return rows, errors, jax.lax.dynamic_update_slice_in_dim(chosen, kept, i * m, 0)

            carry = (*carry, jnp.zeros_like(stuck))
            rows, errors, chosen = jax.lax.fori_loop(0, size // m, run, carry)
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


def _rank(scores: Float[Array, "runs m n_out"]) -> Int[Array, "runs m n_out"]:
    """How many of a run come before each, lowest first, ties by index."""
    return jnp.argsort(jnp.argsort(scores, axis=1), axis=1)
