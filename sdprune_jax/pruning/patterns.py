"""Keep masks with a pattern: N of every M inputs, and a band of quantiles."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sdprune_jax import UserError
from sdprune_jax.scoring import masks

# The runs of a convolution. Tensor cores skip zeros along the channels of one tap; published code
# runs through the flattened weight of torch, where neighbours are taps of one channel.
Order = Literal["channels", "flattened"]


@partial(jax.jit, static_argnames=("n", "m", "order"))
def n_of_m(
    scores: Float[Array, "*taps n_in n_out"], n: int, m: int, order: Order = "channels"
) -> Bool[Array, "*taps n_in n_out"]:
    """Drops the `n` lowest scores of every `m` consecutive inputs, ties by index.

    Args:
        scores: in Flax's layout, `[in, out]` or `[kh, kw, in, out]`, and not negative.
        n: how many to remove, as in "2:4" of Wanda and SparseGPT; others count what they keep.
        m: inputs of a run, which starts at a multiple of `m`.
        order: of the inputs of a convolution.

    Raises:
        ValueError: as `refuse_indivisible`.
    """
    refuse_indivisible({"the kernel": scores.shape}, n, m, order)
    if order == "flattened" and scores.ndim == 4:
        by_tap = jnp.transpose(scores, (2, 0, 1, 3))
        keep = n_of_m(by_tap.reshape(-1, scores.shape[-1]), n, m)
        return jnp.transpose(keep.reshape(by_tap.shape), (1, 2, 0, 3))
    *taps, n_in, n_out = scores.shape
    runs = scores.reshape(*taps, n_in // m, m, n_out)
    index = jax.lax.broadcasted_iota(jnp.int32, runs.shape, runs.ndim - 2)
    rank = jnp.zeros(runs.shape, jnp.int32)
    for i in range(m):  # counting those before it, which needs no sort and no other device
        other = runs[..., i : i + 1, :]
        rank += (other < runs) | ((other == runs) & (i < index))
    return (rank >= n).reshape(scores.shape)


def refuse_indivisible(
    shapes: Mapping[str, tuple[int, ...]], n: int, m: int, order: Order = "channels"
) -> None:
    """Checks, before anything is pruned, that runs of `m` fill the inputs of every layer.

    Args:
        shapes: of kernels in Flax's layout, by the name to be reported.
        n: to be removed of every `m`.
        m: inputs of a run.
        order: of the inputs of a convolution.

    Raises:
        ValueError: if not 0 < n < m, or naming all layers whose inputs are no multiple of `m`.
    """
    if not 0 < n < m:
        raise UserError(f"n of every m weights are removed with 0 < n < m, got {n}:{m}")
    bad = []
    for name, (*taps, n_in, _) in shapes.items():
        n_runs = n_in
        if order == "flattened":
            for size in taps:
                n_runs *= size
        if n_runs % m:
            bad.append(f"{name} ({n_runs})")
    if bad:
        raise UserError(
            f"{n}:{m} needs layers whose inputs are a multiple of {m}; leave out, with a sparsity "
            f"of their own, or by the scope: {', '.join(bad)}"
        )


def band(scores: Float[Array, "*shape"], low: float, high: float) -> Bool[Array, "*shape"]:
    """Drops the scores ranked between two quantiles, to see what weights of that size carry.

    Args:
        scores: of one layer, in torch's layout for its order of ties, and not negative.
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
    is_low = ~masks.lowest(scores, masks.num_removed(scores.size, low))
    if high == 1:
        return is_low
    return is_low | masks.lowest(scores, masks.num_removed(scores.size, high))
