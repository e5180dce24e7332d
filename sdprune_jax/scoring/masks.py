"""From scores to keep masks: True means the weight stays.

Exactly k scores are dropped and nothing is sorted. A float that is not negative orders as the
integer with its bits. Scores on the host are partitioned there, row by row. On devices, counting
finds the k-th smallest, a byte of that integer at a time, so that a sharded tensor stays where it
is, and gets the mask that it would on one device.

Equal scores go by index of the array as given, in row-major order, lowest first. A Flax kernel is
the transpose of a torch weight: transpose it (and the mask back) for the order of torch.

The sign of a score is ignored, so -0.0 equals 0.0. An infinite score ranks last and a NaN after it:
callers refuse weights that are not finite before they prune.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Shaped

from sdprune_jax import UserError

_LAST = 2**31 - 1  # a key after every other, and the bits of a float32 without its sign


def num_removed(size: int, sparsity: float | Fraction) -> int:
    """The floor of `size * sparsity`, with `sparsity` read as the decimal written.

    Raises:
        ValueError: if `sparsity`, the fraction to remove, is outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        percent = f"; for {float(sparsity):g} percent write {float(sparsity) / 100:g}"
        hint = percent if 1 < sparsity < 100 else ""
        raise UserError(f"sparsity is the fraction removed, in [0, 1), got {sparsity}{hint}")
    return math.floor(size * Fraction(str(sparsity)))  # 0.35 * 20 is 6.999... in floats


def lowest_of_rows(scores: Shaped[np.ndarray, "rows n"], k: int) -> Bool[np.ndarray, "rows n"]:
    """Keeps all but the `k` lowest scores of every row, ties by index, on the host.

    Rows are the groups that compete: the outputs of a layer, or all of its weights as one row.

    Raises:
        ValueError: if scores are not float32, float16 or bfloat16, or `k` is not in [0, n).
    """
    if scores.dtype not in (np.float32, np.float16, jnp.bfloat16):
        raise UserError(f"scores are {scores.dtype}: give float32, float16 or bfloat16")
    if not 0 <= k < scores.shape[1]:
        raise UserError(f"cannot remove {k} of {scores.shape[1]}, expected a number in [0, size)")
    if k == 0:
        return np.ones(scores.shape, bool)
    bits = scores.astype(np.float32, order="C").view(np.int32)
    bits &= _LAST
    threshold = np.partition(bits, k - 1, axis=1)[:, k - 1 : k]
    keep, is_tied = bits > threshold, bits == threshold
    num_kept = scores.shape[1] - k - np.count_nonzero(keep, axis=1)  # the last at the threshold
    for row in np.flatnonzero(num_kept):
        keep[row, np.flatnonzero(is_tied[row])[-num_kept[row] :]] = True
    return keep


@jax.jit
def lowest(scores: Float[Array, "*shape"], k: Int[ArrayLike, ""]) -> Bool[Array, "*shape"]:
    """Keeps all but the `k` lowest scores, ties by index; `k` in [0, size) may be traced.

    Scores are not negative. Runs under any sharding and moves only counts between devices.
    """
    number = jnp.asarray(k, jnp.int32)
    bits = lambda: jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32) & _LAST
    threshold = _kth(bits, number)
    num_tied = number - _count(bits() < threshold)  # how many at it to drop
    is_tied, index = lambda: bits() == threshold, lambda: _flat_index(scores.shape)
    first_kept: Any = jax.lax.cond(
        num_tied > 0,
        lambda: _kth(lambda: jnp.where(is_tied(), index(), _LAST), num_tied),
        lambda: jnp.int32(0),
    )
    return (bits() > threshold) | (is_tied() & (index() >= first_kept))


def without_ties(
    scores: Shaped[np.ndarray, "*shape"], keep: Bool[np.ndarray, "*shape"]
) -> Bool[np.ndarray, "*shape"]:
    """Drops from `keep` also what ties with the highest score that was removed.

    Source: the authors' code of Ramesh and Zhao 2024 (https://arxiv.org/abs/2411.15113), which
        removes every weight up to the k-th magnitude.
    """
    return keep & (scores > scores[~keep].max(initial=-np.inf))


def zero(tensor: Shaped[np.ndarray, "*shape"], keep: Bool[np.ndarray, "*shape"]) -> None:
    """Writes +0.0, which no cast changes, in place: a second copy of a model may not fit."""
    bits = tensor.view(f"i{tensor.itemsize}")
    np.bitwise_and(bits, -keep.view(np.int8), out=bits)  # 6 times faster than a masked copy


def _kth(keys: Callable[[], Int[Array, "*shape"]], k: Any) -> Int[Array, ""]:
    """Finds the key with `k` keys sorted before it; keys are in [0, 2**31).

    That is the largest integer with at most `k` keys below it, built from its highest byte down.
    """

    def add_byte(i: Int[Array, ""], key: Int[Array, ""]) -> Int[Array, ""]:
        shift = 24 - 8 * i
        # One byte a key says all that matters here, and is a quarter of the traffic: keys that
        # differ from `key` in a higher byte clip to the right side.
        code = jnp.clip((keys() >> shift) - (key >> shift), 0, 255).astype(jnp.uint8)

        def add_bit(j: Int[Array, ""], byte: Int[Array, ""]) -> Int[Array, ""]:
            higher = byte + (128 >> j)
            return jnp.where(_count(code < higher.astype(jnp.uint8)) <= k, higher, byte)

        return key + (jax.lax.fori_loop(0, 8, add_bit, jnp.int32(0)) << shift)

    # `keys` is called in the loop so that it fuses: as a captured array it would be stored.
    return jax.lax.fori_loop(0, 4, add_byte, jnp.int32(0))


def _count(below: Bool[Array, "*shape"]) -> Int[Array, ""]:
    # XLA on CPU sums to the last axis in 16 bits 20 times faster than to a scalar in 32.
    num_summed = math.prod(below.shape[:-1])
    dtype = jnp.int16 if num_summed < 2**15 else jnp.int32
    per_last = jnp.sum(below, axis=tuple(range(below.ndim - 1)), dtype=dtype)
    return jnp.sum(per_last, dtype=jnp.int32)


def _flat_index(shape: tuple[int, ...]) -> Int[Array, "*shape"]:
    assert math.prod(shape) < _LAST, "flat indices are int32"
    index = jnp.zeros(shape, jnp.int32)
    for axis in range(len(shape)):  # not a reshaped arange, which would undo a sharding
        stride = math.prod(shape[axis + 1 :])
        index += stride * jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return index
