"""Whole heads and runs of neurons out of one layer, with compensation by what stays."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sdprune_jax import UserError
from sdprune_jax.scoring import masks, obs


def remove(
    kernel: Float[Array, "n_in n_out"], factor: obs.Factor, unit_size: int, num_removed: int
) -> obs.Solution:
    """Removes whole units of inputs one after another, the cheapest at the time first.

    Made for what closes a site: the kernel of `to_out.0` with heads as units, of `net.2` with runs
    of neurons. The rows of removed units are 0; `sites.slice_params` deletes them.

    Returns:
        A solution whose `keep` has one entry a unit, which is `unit_size` consecutive inputs.

    Raises:
        ValueError: if the inputs are not made of units, or none would be left.

    Source: OBS-Diff, structured pruning (https://arxiv.org/abs/2510.06751), one unit a round. Its
        score of a head sums w^2 over squared diagonal entries of the factor; the full factor,
        used here, gives the growth of the loss itself. For single inputs both are the same.
    """
    num_units, rest = divmod(kernel.shape[0], unit_size)
    if rest or not 0 <= num_removed < num_units:
        raise UserError(
            f"cannot remove {num_removed} units of {unit_size} from {kernel.shape[0]} inputs:"
            f" expected whole units, and one that is left"
        )
    if not factor.is_positive:
        squares = jnp.sum(kernel.reshape(num_units, -1) ** 2, axis=1)
        keep = masks.lowest(squares, num_removed)
        solution = obs.by_magnitude(kernel, factor, jnp.repeat(keep, unit_size)[:, None])
        return solution._replace(keep=keep)
    kernel, keep, loss = _remove_units(
        kernel, factor.upper, factor.dead, jnp.asarray(num_removed), unit_size
    )
    return obs.Solution(kernel, keep, loss, "obs", factor.damping)


@partial(jax.jit, static_argnames="unit_size")
def _remove_units(
    kernel: Float[Array, "n_in n_out"],
    upper: Float[Array, "n_in n_in"],
    dead: Bool[Array, " n_in"],
    num_removed: Int[Array, ""],
    unit_size: int,
) -> tuple[Float[Array, "n_in n_out"], Bool[Array, " units"], Float[Array, ""]]:
    n_in, n_out = kernel.shape
    num_units = n_in // unit_size
    identity = jnp.eye(unit_size, dtype=kernel.dtype)
    solve = partial(jax.scipy.linalg.solve_triangular, lower=True)

    def remove(_: Any, state: Any) -> Any:
        kernel, inverse, keep, loss = state
        blocks = inverse.reshape(num_units, unit_size, num_units, unit_size)
        own = jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)
        own = jnp.where(keep[:, None, None], own, identity[None])  # what is removed has no inverse
        factors = jnp.linalg.cholesky(own)
        # The growth of the loss is exact: all weights of the unit go at once.
        whitened = jax.vmap(solve)(factors, kernel.reshape(num_units, unit_size, n_out))
        costs = jnp.where(keep, jnp.sum(whitened**2, axis=(1, 2)) / 2, jnp.inf)
        unit = jnp.argmin(costs)
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=unit * unit_size)
        across = solve(factors[unit], cut(inverse, slice_size=unit_size))  # [unit_size, n_in]
        kernel -= jnp.matmul(across.T, whitened[unit], precision="highest")
        inverse -= jnp.matmul(across.T, across, precision="highest")
        return kernel, inverse, keep.at[unit].set(False), loss + costs[unit]

    inverse = jnp.matmul(upper.T, upper, precision="highest")
    kernel = jnp.where(dead[:, None], 0, kernel)
    state = (kernel, inverse, jnp.ones(num_units, bool), jnp.zeros((), kernel.dtype))
    kernel, _, keep, loss = jax.lax.fori_loop(0, num_removed, remove, state)
    return jnp.where(jnp.repeat(keep, unit_size)[:, None], kernel, 0), keep, loss
