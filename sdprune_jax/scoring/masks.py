"""From scores to keep masks: True means the weight stays.

Exactly k scores are dropped from each tensor and nothing is sorted. A non-negative float orders as
the integer with its bits, so counting finds the k-th smallest, a byte of that integer at a time; a
second search, over the index, parts equal scores at the boundary. A sharded tensor stays where it
is, and gets the mask that it would on one device.

Ties go by flat index of the array as given, in row-major order, lowest first. A Flax kernel is the
transpose of a torch weight: transpose it (and the mask back) for the order of torch.

The sign of a score is ignored, so -0.0 equals 0.0. An infinite score ranks last and a NaN after it:
callers refuse weights that are not finite before they prune.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Shaped

from sdprune_jax import UserError

_ROW = 8192  # scores a row of a batch; a tensor starts on a row
_SMALL = 2**22  # scores in a batch; its four-byte scores stay in a CPU's last cache
_LAST = 2**31 - 1  # a key after every other

_Count = Callable[[Bool[Array, "..."]], Int[Array, "..."]]  # how many are true in each group
_Spread = Callable[[Int[Array, "..."]], Int[Array, "..."]]  # a group's value against its scores


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


@jax.jit
def lowest(scores: Float[Array, "*shape"], k: Int[ArrayLike, ""]) -> Bool[Array, "*shape"]:
    """Keeps all but the `k` lowest scores, ties by index; `k` in [0, size) may be traced.

    Scores are not negative. Runs under any sharding and moves only counts between devices.
    """
    return _lowest(scores, jnp.int32(k), _count, lambda threshold: threshold)


@jax.jit
def lowest_per_output(
    scores: Float[Array, "n_out n_in *taps"], k: Int[ArrayLike, ""]
) -> Bool[Array, "n_out n_in *taps"]:
    """`lowest` in each output, a row in torch's layout; `k` in [0, inputs of an output).

    Source: Wanda (https://arxiv.org/abs/2306.11695), section 3, the comparison group.
    """
    rows = scores.reshape(len(scores), -1)
    dtype = jnp.int16 if rows.shape[1] < 2**15 else jnp.int32  # twice as fast on a CPU
    count = lambda below: jnp.sum(below, axis=1, dtype=dtype).astype(jnp.int32)
    per_row = jnp.full(len(rows), k, jnp.int32)
    return _lowest(rows, per_row, count, lambda values: values[:, None]).reshape(scores.shape)


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


def lowest_of_each(
    scores: Mapping[str, np.ndarray], num_removed: Mapping[str, int]
) -> Iterator[tuple[str, Bool[np.ndarray, "..."]]]:
    """Yields (name, keep) as by `lowest(scores[name], num_removed[name])`, for host arrays.

    Tensors are laid end to end in batches of one shape, so a whole model compiles one program for
    its tensors up to 4 M scores and one for those above, whatever their shapes and sparsities.

    Raises:
        ValueError: if a tensor is not float32, float16 or bfloat16, or a number not in [0, size).
    """
    problems = []
    for name, k in num_removed.items():
        size, dtype = scores[name].size, scores[name].dtype
        if dtype not in (np.float32, np.float16, jnp.bfloat16):
            problems.append(f"{name} is {dtype}: convert it to float32, float16 or bfloat16")
        if not 0 <= k < size:
            problems.append(f"{name}: cannot remove {k} of {size}, expected a number in [0, size)")
    if problems:
        raise UserError("cannot select: " + "; ".join(problems))
    batches = list(_batches(scores, num_removed))
    buffers = {capacity: _aligned(capacity) for capacity in {c for _, c in batches}}
    for first_rows, capacity in batches:
        groups, k = _pack(buffers[capacity], first_rows, scores, num_removed)
        # Reading the mask waits for it, so the buffer is free again. Filling a second buffer
        # meanwhile took as long: both cores are busy, and the buffers share a cache.
        keep = np.asarray(_lowest_of_groups(jax.device_put(buffers[capacity]), groups, k))
        for name, row in first_rows.items():
            flat = keep.reshape(-1)[row * _ROW : row * _ROW + scores[name].size]
            yield name, flat.reshape(scores[name].shape)


def _bits(scores: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """The integer with the bits of the float32 magnitude: the same order, no rounding."""
    return jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32) & _LAST


def _lowest(
    scores: Float[Array, "*shape"], k: Int[Array, "*groups"], count: _Count, spread: _Spread
) -> Bool[Array, "*shape"]:
    """`lowest` in each group of scores."""
    threshold = _kth(lambda: _bits(scores), k, count, spread)
    num_tied = k - count(_bits(scores) < spread(threshold))  # of those at it, how many to drop
    is_tied = lambda: _bits(scores) == spread(threshold)
    index = lambda: _flat_index(scores.shape)
    first_kept = jax.lax.cond(
        jnp.any(num_tied > 0),
        lambda: _kth(lambda: jnp.where(is_tied(), index(), _LAST), num_tied, count, spread),
        lambda: jnp.zeros_like(k),
    )
    return (_bits(scores) > spread(threshold)) | (is_tied() & (index() >= spread(first_kept)))


def _kth(
    keys: Callable[[], Int[Array, "*shape"]],
    k: Int[Array, "*groups"],
    count: _Count,
    spread: _Spread,
) -> Int[Array, "*groups"]:
    """Finds, in each group, the key with `k` keys sorted before it; keys are in [0, 2**31).

    That is the largest integer with at most `k` keys below it, built from its highest byte down.
    """

    def add_byte(i: Int[Array, ""], found: Int[Array, "*groups"]) -> Int[Array, "*groups"]:
        shift = 24 - 8 * i
        # One byte a key says all that matters here, and is a quarter of the traffic: keys that
        # differ from `found` in a higher byte clip to the right side.
        code = jnp.clip((keys() >> shift) - (spread(found) >> shift), 0, 255).astype(jnp.uint8)

        def add_bit(j: Int[Array, ""], byte: Int[Array, "*groups"]) -> Int[Array, "*groups"]:
            higher = byte + (128 >> j)
            fits = count(code < spread(higher).astype(jnp.uint8)) <= k
            return jnp.where(fits, higher, byte)

        byte = jax.lax.fori_loop(0, 8, add_bit, jnp.zeros_like(found))
        return found + (byte << shift)

    # `keys` is called in the loop so that it fuses: as a captured array it would be stored.
    return jax.lax.fori_loop(0, 4, add_byte, jnp.zeros_like(k))


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


@jax.jit
def _lowest_of_groups(
    scores: Float[Array, "rows row"], groups: Int[Array, " rows"], k: Int[Array, " rows"]
) -> Bool[Array, "rows row"]:
    """`lowest` of runs of rows. Args: groups: of each row, ascending; k: of each group."""

    def count(below: Bool[Array, "rows row"]) -> Int[Array, " rows"]:
        parts = jnp.sum(below.reshape(len(scores), 64, -1), axis=1, dtype=jnp.int8)  # as in _count
        per_row = jnp.sum(parts, axis=1, dtype=jnp.int32)
        return jax.ops.segment_sum(per_row, groups, len(scores), indices_are_sorted=True)

    return _lowest(scores, k, count, lambda values: values[groups][:, None])


def _batches(
    scores: Mapping[str, np.ndarray], num_removed: Mapping[str, int]
) -> Iterator[tuple[dict[str, int], int]]:
    """Yields the tensors that share a buffer, each with its first row; and the buffer's rows."""
    num_rows = {name: _rows(scores[name]) for name in num_removed}
    small = _SMALL // _ROW
    large = max([small, *num_rows.values()])
    for capacity in sorted({small, large}):
        first_rows, used = {}, 0
        for name, rows in num_rows.items():
            if (rows <= small) != (capacity == small):
                continue
            if used + rows > capacity:
                yield first_rows, capacity
                first_rows, used = {}, 0
            first_rows[name] = used
            used += rows
        if first_rows:
            yield first_rows, capacity


def _rows(tensor: np.ndarray) -> int:
    return -(-tensor.size // _ROW)


def _aligned(rows: int) -> Float[np.ndarray, "rows row"]:
    """A buffer that JAX on CPU takes without a copy, which needs 64-byte alignment."""
    raw = np.empty(rows * _ROW + 16, np.float32)
    start = -raw.ctypes.data % 64 // 4
    return raw[start : start + rows * _ROW].reshape(rows, _ROW)


def _pack(
    buffer: Float[np.ndarray, "rows row"],
    first_rows: dict[str, int],
    scores: Mapping[str, np.ndarray],
    num_removed: Mapping[str, int],
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """Fills `buffer`; returns the group of each row and the number to drop in each group."""
    flat = buffer.reshape(-1)
    groups = np.full(len(buffer), len(buffer) - 1, np.int32)  # unused rows: a group that drops none
    k = np.zeros(len(buffer), np.int32)
    for group, (name, row) in enumerate(first_rows.items()):
        tensor, end_row = scores[name], row + _rows(scores[name])
        stop = row * _ROW + tensor.size
        np.copyto(flat[row * _ROW : stop].reshape(tensor.shape), tensor)
        flat[stop : end_row * _ROW] = np.inf  # never among the lowest
        groups[row:end_row] = group
        k[group] = num_removed[name]
    return groups, k
