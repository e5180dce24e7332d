"""Keep masks with a pattern: N of every M inputs, and a band of quantiles.

Runs of a convolution go along the channels of one tap, where tensor cores skip zeros.
"""

from collections.abc import Mapping
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from sdprune_jax import UserError
from sdprune_jax.scoring import masks, obs


@partial(jax.jit, static_argnames=("n", "m"))
def n_of_m(
    scores: Float[Array, "*taps n_in n_out"], n: int, m: int
) -> Bool[Array, "*taps n_in n_out"]:
    """Drops the `n` lowest scores of every `m` consecutive inputs, ties by index.

    `n` counts what is removed, as in "2:4" of Wanda and SparseGPT; others count what they keep.

    Raises:
        ValueError: as `refuse_indivisible`.
    """
    refuse_indivisible({"the kernel": scores.shape}, n, m)
    rank = obs.rank(scores.reshape(-1, m, scores.shape[-1]))
    return (rank >= n).reshape(scores.shape)


def refuse_indivisible(shapes: Mapping[str, tuple[int, ...]], n: int, m: int) -> None:
    """Checks, before anything is pruned, that runs of `m` fill the inputs of every layer.

    Args:
        shapes: shapes of kernels in Flax's layout, by the name to be reported.
        n: how many of every `m` are removed.
        m: inputs of a run.

    Raises:
        ValueError: if not 0 < n < m, or naming all layers whose inputs are no multiple of `m`.
    """
    if not 0 < n < m:
        raise UserError(f"n of every m weights are removed with 0 < n < m, got {n}:{m}")
    bad = [f"{name} ({shape[-2]})" for name, shape in shapes.items() if shape[-2] % m]
    if bad:
        raise UserError(
            f"{n}:{m} needs layers whose inputs are a multiple of {m}; leave out, with a sparsity "
            f"of their own, or by the scope: {', '.join(bad)}"
        )


def band(
    scores: Shaped[np.ndarray, "rows n"], low: float, high: float
) -> Bool[np.ndarray, "rows n"]:
    """Drops the scores of every row between two quantiles, to see what weights of that size carry.

    Args:
        scores: not negative; one row a group of weights that compete.
        low: fraction of the scores that are lower and stay, in [0, 1).
        high: fraction of the scores below the upper end, in [low, 1].

    Raises:
        ValueError: if a quantile is outside its range, or nothing would stay.

    Source: an option in the authors' code of Ramesh and Zhao 2024
        (https://arxiv.org/abs/2411.15113).
    """
    if not 0 <= low <= high <= 1 or high - low == 1:
        raise UserError(
            f"a band of quantiles has 0 <= low <= high <= 1 and leaves something, got "
            f"[{low}, {high}]"
        )
    size = scores.shape[1]
    is_low = ~masks.lowest_of_rows(scores, masks.num_removed(size, low))
    if high == 1:
        return is_low
    return is_low | masks.lowest_of_rows(scores, masks.num_removed(size, high))
