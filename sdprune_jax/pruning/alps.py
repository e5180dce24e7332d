"""ALPS on one layer: choose all weights together, by alternating between fit and sparsity.

Two copies of the kernel are kept: one minimises the squared error of the outputs, the other is
sparse, and a growing penalty draws them together. It costs an eigendecomposition, and up to 300
products of the kernel with a square matrix, and pays from about 60 % sparsity.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sdprune_jax.scoring import masks, obs
from sdprune_jax.scoring.obs import Solution
from sdprune_jax.scoring.recorder import LayerStats

_PENALTY = 0.1  # at first, relative to a unit diagonal
_LEAST_PENALTY = 1e-6  # below which no new start is made
_EVERY = 3  # iterations between changes of the penalty
_MAX_ITERATIONS = 300
_REFINEMENTS = 10  # steps of conjugate gradients in the end


def remove(
    kernel: Float[Array, "n_in n_out"],
    stats: LayerStats,
    num_removed: int,
    m: int | None = None,
    *,
    damping: float = 0.01,
) -> Solution:
    """Removes weights, and fits the others. What is zero stays so, and is removed first.

    `num_removed` and `m` are as in `obs.remove`, `damping` as in `obs.factorise`; by magnitude if
    the Gram matrix is not positive even with damping 1.

    Raises:
        ValueError: as `obs.remove`.

    Source: ALPS, NeurIPS 2024, algorithms 1 and 2 (https://arxiv.org/abs/2406.07831).
    """
    obs.refuse(kernel.shape, num_removed, m)
    factor = obs.factorise(stats, damping)
    if not factor.is_positive:
        return obs.remove(kernel, factor, num_removed, m)
    number, damping = jnp.asarray(num_removed), factor.damping
    kernel, keep, loss = _solve(kernel, stats, number, jnp.asarray(damping), m)
    return Solution(kernel, keep, loss, "alps", damping)


class _Problem(NamedTuple):
    """A layer in units that make the diagonal of H one.

    Attributes:
        values: eigenvalues of H.
        vectors: its eigenvectors.
        target: H times the dense kernel.
        forced: weights removed whatever their score.
        number: how many to remove, of all weights or of every run.
    """

    values: Float[Array, " n_in"]
    vectors: Float[Array, "n_in n_in"]
    target: Float[Array, "n_in n_out"]
    forced: Bool[Array, "n_in n_out"]
    number: Int[Array, ""]


@partial(jax.jit, static_argnames="m")
def _solve(
    kernel: Float[Array, "n_in n_out"],
    stats: LayerStats,
    number: Int[Array, ""],
    damping: Float[Array, ""],
    m: int | None,
) -> tuple[Float[Array, "n_in n_out"], Bool[Array, "n_in n_out"], Float[Array, ""]]:
    hessian = 2 / stats.weight * stats.moment
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    diagonal = jnp.where(dead, 1, diagonal)
    diagonal += damping * jnp.mean(diagonal)
    scale = jnp.sqrt(diagonal)[:, None]
    hessian = jnp.where(jnp.eye(len(hessian), dtype=bool), 1, hessian / scale / scale.T)
    forced = dead[:, None] | (kernel == 0)
    dense = scale * jnp.where(forced, 0, kernel)
    values, vectors = jnp.linalg.eigh(hessian)
    problem = _Problem(values, vectors, _product(hessian, dense), forced, number)
    sparse, keep = _searched(problem, dense, m)
    sparse = _refined(hessian, problem.target, sparse, keep)
    change = sparse - dense
    loss = jnp.sum(change * _product(hessian, change)) / 2
    return sparse / scale, keep, loss


def _searched(problem: _Problem, dense: Any, m: int | None) -> tuple[Any, Any]:
    """Alternates between fit and sparsity until the choice of weights stays; returns both."""
    start = _choose(problem, dense, m)
    start = (dense, jnp.zeros_like(dense), start, jnp.asarray(_PENALTY, dense.dtype))
    iterate = partial(_iterate, problem, m)

    def search(carry: Any) -> Any:
        state, count, has_moved, _ = carry
        before, penalty = state[2], state[3]
        state = jax.lax.fori_loop(0, _EVERY, lambda _, state: iterate(state), state)
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

    goes_on = lambda carry: (carry[1] < _MAX_ITERATIONS) & ~carry[3]
    begin = (start, 0, jnp.asarray(False), jnp.asarray(False))
    (sparse, _, keep, _), *_ = jax.lax.while_loop(goes_on, search, begin)
    return sparse, keep


def _iterate(problem: _Problem, m: int | None, state: Any) -> Any:
    sparse, dual, _, penalty = state
    fit = _product(problem.vectors.T, problem.target - dual + penalty * sparse)
    fit = _product(problem.vectors, fit / (problem.values[:, None] + penalty))
    keep = _choose(problem, fit + dual / penalty, m)
    sparse = jnp.where(keep, fit + dual / penalty, 0)
    return sparse, dual + penalty * (fit - sparse), keep, penalty


def _choose(problem: _Problem, x: Any, m: int | None) -> Bool[Array, "n_in n_out"]:
    least = jnp.finfo(x.dtype).tiny  # so that what must go ranks first
    scores = jnp.where(problem.forced, 0, jnp.maximum(jnp.abs(x), least))
    if m is None:
        return masks.lowest(scores, problem.number) & ~problem.forced
    rank = obs.rank(scores.reshape(-1, m, x.shape[1]))
    return (rank >= problem.number).reshape(x.shape) & ~problem.forced


def _refined(
    hessian: Float[Array, "n_in n_in"],
    target: Float[Array, "n_in n_out"],
    sparse: Float[Array, "n_in n_out"],
    keep: Bool[Array, "n_in n_out"],
) -> Float[Array, "n_in n_out"]:
    """Solves `hessian @ sparse = target` on what is kept, every output by itself."""

    def apply(x: Any) -> Any:
        return jnp.where(keep, _product(hessian, x), 0)

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


def _product(a: Any, b: Any) -> Any:
    return jnp.matmul(a, b, precision="highest")  # by default TF32 or bfloat16
