"""One threshold for all the layers of a component, which are never in memory together.

Two passes over the scores count them by the integers with their bits (as in `masks`), first by the
upper half of these integers and then by the lower; a third compares. Layers come one at a time and
a few megabytes suffice, whatever the model.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from sdprune_jax import UserError

_CHUNK = 2**20  # scores; what is derived from them stays in a cache
_HALF = 16  # bits


def lowest(
    score: Callable[[str], Float[np.ndarray, "..."]], names: Sequence[str], k: int
) -> Iterator[tuple[str, Bool[np.ndarray, "..."]]]:
    """Yields (name, keep) of every layer: all but the `k` lowest scores of all layers together.

    Ties go by order of the layers, then by flat index, as in `masks.lowest` of all the scores laid
    end to end. Unlike layers should be scored on one scale (`scores.normalised`), or else those of
    small weights may lose nearly all of them.

    Args:
        score: gives a layer's scores, not negative, in torch's layout. It is called three times a
            layer, so that scores need not be kept, and must give the same each time.
        names: layers, in the order that parts equal scores.
        k: how many to remove from all of them.

    Raises:
        ValueError: if `k` is outside [0, size).
    """
    upper = np.zeros(2**_HALF, np.int64)
    for name in names:
        for bits in _chunks(score(name)):
            upper += np.bincount(bits >> _HALF, minlength=len(upper))
    if not 0 <= k < upper.sum():
        raise UserError(f"cannot remove {k} of {upper.sum()}, expected a number in [0, size)")
    high, k_left = _find(upper, k)
    lower = np.zeros(2**_HALF, np.int64)
    for name in names:
        for bits in _chunks(score(name)):
            candidates = bits[bits >> _HALF == high]
            lower += np.bincount(candidates & (2**_HALF - 1), minlength=len(lower))
    low, num_tied = _find(lower, k_left)
    threshold = np.int32(high << _HALF | low).view(np.float32)
    for name in names:
        scores = abs(score(name).astype(np.float32, copy=False))
        keep = scores >= threshold
        if num_tied:
            tied = np.flatnonzero(np.ravel(scores == threshold))[:num_tied]
            keep[np.unravel_index(tied, keep.shape)] = False
            num_tied -= len(tied)
        yield name, keep


def _find(counts: Int[np.ndarray, " bins"], k: int) -> tuple[int, int]:
    """The bin that holds what has `k` before it, and how many of these are in that bin."""
    ends = np.cumsum(counts)
    index = int(np.searchsorted(ends, k, side="right"))
    return index, k - int(ends[index] - counts[index])


def _chunks(scores: Float[np.ndarray, "..."]) -> Iterator[Int[np.ndarray, " n"]]:
    """The bits of the float32 magnitudes, in the order of memory."""
    flat = scores.ravel(order="K")
    for start in range(0, flat.size, _CHUNK):
        part = abs(flat[start : start + _CHUNK].astype(np.float32, copy=False))
        yield part.view(np.int32)
