"""ALPS on one layer: choose all weights together, by alternating between fit and sparsity.

Two copies of the kernel are kept: one minimises the squared error of the outputs, the other is
sparse, and a growing penalty draws them together. It costs an eigendecomposition, and up to 300
products of the kernel with a square matrix, and pays from about 60 % sparsity.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sdprune_jax import UserError
from sdprune_jax.scoring import masks, obs
from sdprune_jax.scoring.obs import Solution
from sdprune_jax.scoring.recorder import LayerStats

_PENALTY = 0.1  # at first, relative to a unit diagonal
_LEAST_PENALTY = 1e-6  # of a new start
_EVERY = 3  # iterations between changes of the penalty
_MAX_ITERATIONS = 300
_REFINEMENTS = 10  # steps of conjugate gradients in the end


def unstructured(
    kernel: Float[Array, "n_in n_out"],
    stats: LayerStats,
    num_removed: int,
    damping: float = 0.01,
) -> Solution:
    """Removes weights anywhere, and fits the others. What is zero stays so, and is removed first.

    Args:
        kernel: of the layer; that of a convolution reshaped to two axes.
        stats: with a Gram matrix.
        num_removed: weights, in [0, size).
        damping: fraction of the mean diagonal added to the diagonal; more as `obs.factorise` says.

    Returns:
        A solution; its loss is in the units of `obs`. By magnitude, as there, if the Gram matrix is
        not positive even with damping 1.

    Raises:
        ValueError: if `num_removed` is out of range.

    Source: ALPS, NeurIPS 2024, algorithms 1 and 2 (https://arxiv.org/abs/2406.07831).
    """
    if not 0 <= num_removed < kernel.size:
        raise UserError(f"cannot remove {num_removed} of {kernel.size}, expected [0, size)")
    return _solved(kernel, stats, num_removed, None, damping)


def n_of_m(
    kernel: Float[Array, "n_in n_out"], stats: LayerStats, n: int, m: int, damping: float = 0.01
) -> Solution:
    """Removes `n` of every `m` consecutive inputs of every output; otherwise as `unstructured`.

    Raises:
        ValueError: if `m` does not divide the inputs, or `n` is not in [1, m).
    """
    if not 0 < n < m or kernel.shape[0] % m:
        raise UserError(f"pattern {n}:{m} does not fit {kernel.shape[0]} inputs")
    return _solved(kernel, stats, n, m, damping)


def _solved(
    kernel: Float[Array, "n_in n_out"],
    stats: LayerStats,
    number: int,
    m: int | None,
    damping: float,
) -> Solution:
    factor = obs.factorise(stats, damping)
    if not factor.is_positive:
        if m is None:
            return obs.unstructured(kernel, factor, number, preserve_zeros=True)
        return obs.n_of_m(kernel, factor, number, m, block_size=m, preserve_zeros=True)
    damping = factor.damping
    kernel, keep, loss = _solve(
        kernel, stats.moment, stats.weight, jnp.asarray(number), jnp.asarray(damping), m
    )  # fmt: skip
    return Solution(kernel, keep, loss, "alps", damping)


@partial(jax.jit, static_argnames="m")
def _solve(
    kernel: Float[Array, "n_in n_out"],
    gram: Float[Array, "n_in n_in"],
    weight: Float[Array, ""],
    number: Int[Array, ""],
    damping: Float[Array, ""],
    m: int | None,
) -> tuple[Float[Array, "n_in n_out"], Bool[Array, "n_in n_out"], Float[Array, ""]]:
    product = partial(jnp.matmul, precision="highest")
    hessian = 2 / weight * gram
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    diagonal = jnp.where(dead, 1, diagonal)
    diagonal += damping * jnp.mean(diagonal)
    scale = jnp.sqrt(diagonal)[:, None]
    unit = jnp.eye(len(gram), dtype=bool)
    hessian = jnp.where(unit, 1, hessian / scale / scale.T)
    forced = dead[:, None] | (kernel == 0)
    dense = scale * jnp.where(forced, 0, kernel)
    values, vectors = jnp.linalg.eigh(hessian)
    target = product(hessian, dense)

    def chosen(x: Any) -> Any:
        scores = jnp.where(forced, 0, jnp.maximum(jnp.abs(x), jnp.finfo(x.dtype).tiny))
        if m is None:
            return masks.lowest(scores, number) & ~forced
        runs = scores.reshape(-1, m, x.shape[1])
        rank = jnp.argsort(jnp.argsort(runs, axis=1), axis=1)
        return (rank >= number).reshape(x.shape) & ~forced

    def iterate(_: Any, state: Any) -> Any:
        sparse, dual, keep, penalty = state
        fit = product(vectors.T, target - dual + penalty * sparse)
        fit = product(vectors, fit / (values[:, None] + penalty))
        keep = chosen(fit + dual / penalty)
        sparse = jnp.where(keep, fit + dual / penalty, 0)
        return sparse, dual + penalty * (fit - sparse), keep, penalty

    def search(carry: Any) -> Any:
        state, count, has_moved, _ = carry
        before, penalty = state[2], state[3]
        state = jax.lax.fori_loop(0, _EVERY, iterate, state)
        changed = jnp.count_nonzero(state[2] != before)
        kept = jnp.count_nonzero(state[2])
        growth = jnp.where(
            changed >= 0.1 * kept, 1.3, jnp.where(changed >= 0.005 * kept, 1.2, 1.1)
        ).astype(penalty.dtype)
        # A penalty that is too large at first pins the choice that it starts from: start again.
        stalled = (changed == 0) & ~has_moved & (penalty > _LEAST_PENALTY)
        state = jax.tree.map(
            partial(jnp.where, stalled),
            (*start[:3], penalty / 5),
            (*state[:3], penalty * growth),
        )
        done = (changed == 0) & ~stalled
        return state, count + _EVERY, has_moved | (changed > 0), done

    start = (dense, jnp.zeros_like(dense), chosen(dense), jnp.asarray(_PENALTY, dense.dtype))
    (sparse, _, keep, _), *_ = jax.lax.while_loop(
        lambda carry: (carry[1] < _MAX_ITERATIONS) & ~carry[3],
        search,
        (start, 0, jnp.asarray(False), jnp.asarray(False)),
    )
    sparse = _refined(hessian, target, sparse, keep)
    change = sparse - dense
    loss = jnp.sum(change * product(hessian, change)) / 2
    return sparse / scale, keep, loss


def _refined(
    hessian: Float[Array, "n_in n_in"],
    target: Float[Array, "n_in n_out"],
    sparse: Float[Array, "n_in n_out"],
    keep: Bool[Array, "n_in n_out"],
) -> Float[Array, "n_in n_out"]:
    """Solves `hessian @ sparse = target` on what is kept, every output by itself."""

    def apply(x: Any) -> Any:
        return jnp.where(keep, jnp.matmul(hessian, x, precision="highest"), 0)

    def ratio(a: Any, b: Any) -> Any:
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)

    def step(_: Any, state: Any) -> Any:
        x, residual, direction, square = state
        image = apply(direction)
        length = ratio(square, jnp.sum(direction * image, axis=0, keepdims=True))
        residual -= length * image
        new_square = jnp.sum(residual**2, axis=0, keepdims=True)
        direction_ = residual + ratio(new_square, square) * direction
        return x + length * direction, residual, direction_, new_square

    sparse = jnp.where(keep, sparse, 0)
    residual = jnp.where(keep, target, 0) - apply(sparse)
    square = jnp.sum(residual**2, axis=0, keepdims=True)
    state = (sparse, residual, residual, square)
    return jax.lax.fori_loop(0, _REFINEMENTS, step, state)[0]
