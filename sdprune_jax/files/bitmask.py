"""The layouts sparse-bitmask and sparse-24-bitmask of compressed-tensors: zeros take one bit each.

Needs no JAX. Only the bit pattern 0 is a zero; -0.0 is stored as any other value is. So arrays
come back bit for bit, NaNs with their payloads too, and who masks by multiplication packs badly.
An array is laid out as rows in the order of torch: [out, rest] of more than two axes, [1, n] of
one; `shape` holds its own. The readers of compressed-tensors, the last in 0.14, know two axes only.

Source: https://github.com/neuralmagic/compressed-tensors, sparse compressors of 0.9 to 0.14.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

from sdprune_jax import UserError

_GROUP, _KEPT = 4, 2  # two of every four values are stored in sparse-24


class Bitmask(NamedTuple):
    """sparse-bitmask; the fields are how the names of its tensors end in a file.

    Attributes:
        shape: int64 [axes], that of the dense array.
        compressed: [non-zeros], row by row, in the dtype of the array.
        bitmask: uint8 [rows, ceil(columns / 8)], 1 = non-zero; column 8 b + j is bit j of byte b,
            and what the last byte of a row has over is 0.
        row_offsets: int64 [rows], where the values of a row begin in `compressed`.
    """

    shape: Shaped[np.ndarray, " axes"]
    compressed: Shaped[np.ndarray, " nonzeros"]
    bitmask: Shaped[np.ndarray, "rows bytes"]
    row_offsets: Shaped[np.ndarray, " rows"]


class Sparse24(NamedTuple):
    """sparse-24-bitmask: exactly two values of every aligned four of a row, zeros among them.

    Attributes:
        shape: int64 [axes, 1], that of the dense array.
        compressed: [rows, columns / 2], in the dtype of the array.
        bitmask: uint8 [rows, ceil(columns / 8)], 1 = stored, bits as in `Bitmask`.
    """

    shape: Shaped[np.ndarray, "axes 1"]
    compressed: Shaped[np.ndarray, "rows stored"]
    bitmask: Shaped[np.ndarray, "rows bytes"]


def to_bitmask(x: Float[np.ndarray, "..."]) -> Bitmask:
    """Packs an array of any sparsity.

    Raises:
        ValueError: if `x` has no axes.
    """
    rows = _as_rows(x)
    keep = _is_nonzero(rows)
    counts = np.count_nonzero(keep, axis=1)
    return Bitmask(
        shape=np.array(x.shape, np.int64),
        compressed=rows[keep],
        bitmask=np.packbits(keep, axis=1, bitorder="little"),
        row_offsets=_starts(counts),
    )


def from_bitmask(parts: Bitmask) -> Float[np.ndarray, "..."]:
    """The array that `to_bitmask` packed.

    Raises:
        ValueError: naming every part that does not fit the others.
    """
    shape = dense_shape(parts.shape)
    keep = _unpack_bits(parts.bitmask, shape)
    counts = np.count_nonzero(keep, axis=1)
    starts, problems = _starts(counts), []
    if parts.compressed.shape != (counts.sum(),):
        problems.append(
            f"compressed has shape {parts.compressed.shape}, expected {(int(counts.sum()),)}: "
            "a value for every bit of bitmask that is set"
        )
    if parts.row_offsets.dtype != np.int64 or parts.row_offsets.shape != starts.shape:
        problems.append(
            f"row_offsets is {parts.row_offsets.dtype} {parts.row_offsets.shape}, "
            f"expected int64 {starts.shape}: one for every row"
        )
    elif (wrong := np.flatnonzero(parts.row_offsets != starts)).size:
        row = wrong[0]
        problems.append(
            f"row_offsets[{row}] is {parts.row_offsets[row]}, expected {starts[row]}: "
            f"the bits that bitmask has set in the rows before ({wrong.size} rows differ)"
        )
    _refuse(problems)
    return _scatter(keep, parts.compressed, shape)


def to_sparse24(x: Float[np.ndarray, "..."]) -> Sparse24:
    """Packs an array with at most two non-zeros in every aligned four of a row.

    Where there are fewer, zeros are stored too: the last ones of the four.

    Raises:
        ValueError: if rows are no multiple of four wide, or four hold more than two non-zeros.
    """
    rows = _as_rows(x)
    _check_width(rows.shape, x.shape)
    is_nonzero = _is_nonzero(rows).reshape(-1, _GROUP)
    crowded = np.flatnonzero(np.count_nonzero(is_nonzero, axis=1) > _KEPT)
    if crowded.size:
        row, column = divmod(int(crowded[0]) * _GROUP, rows.shape[1])
        raise UserError(
            f"{crowded.size} runs of {_GROUP} hold more than {_KEPT} non-zeros, the first in row "
            f"{row}, columns {column} to {column + _GROUP - 1} of {rows.shape}: prune to 2:4 "
            "along the rows, or use to_bitmask"
        )
    stored = np.argsort(is_nonzero, axis=1, stable=True)[:, -_KEPT:]
    keep = np.zeros_like(is_nonzero)
    np.put_along_axis(keep, stored, True, axis=1)
    keep = keep.reshape(rows.shape)
    return Sparse24(
        shape=np.array(x.shape, np.int64)[:, None],
        compressed=rows[keep].reshape(len(rows), rows.shape[1] // _GROUP * _KEPT),
        bitmask=np.packbits(keep, axis=1, bitorder="little"),
    )


def from_sparse24(parts: Sparse24) -> Float[np.ndarray, "..."]:
    """The array that `to_sparse24` packed.

    Raises:
        ValueError: naming every part that does not fit the others.
    """
    if parts.shape.ndim != 2 or parts.shape.shape[1] != 1:
        raise UserError(f"shape is itself of shape {parts.shape.shape}, expected (axes, 1)")
    shape = dense_shape(parts.shape[:, 0])
    rows, columns = _rows_and_columns(shape)
    _check_width((rows, columns), shape)
    keep = _unpack_bits(parts.bitmask, shape)
    problems = []
    counts = np.count_nonzero(keep.reshape(-1, _GROUP), axis=1)
    if (wrong := np.flatnonzero(counts != _KEPT)).size:
        row, column = divmod(int(wrong[0]) * _GROUP, columns)
        problems.append(
            f"bitmask has {counts[wrong[0]]} bits set in row {row}, columns {column} to "
            f"{column + _GROUP - 1}, expected {_KEPT} ({wrong.size} runs differ)"
        )
    expected = (rows, columns // _GROUP * _KEPT)
    if parts.compressed.shape != expected:
        problems.append(f"compressed has shape {parts.compressed.shape}, expected {expected}")
    _refuse(problems)
    return _scatter(keep, parts.compressed.reshape(-1), shape)


def dense_shape(shape: Shaped[np.ndarray, "..."]) -> tuple[int, ...]:
    """The shape that a part `shape` holds.

    Raises:
        ValueError: if it is not int64 [axes], or the shape of no array.
    """
    if shape.dtype != np.int64 or shape.ndim != 1 or not shape.size or (shape < 0).any():
        raise UserError(
            f"shape is {shape.dtype} {shape.tolist()}, expected the int64 sizes of one axis or "
            "more: pack the array again"
        )
    return tuple(shape.tolist())


def _rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


def _as_rows(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "rows columns"]:
    if x.ndim == 0:
        raise UserError("an array without axes has no rows to pack: store it as it is")
    return np.ascontiguousarray(x).reshape(_rows_and_columns(x.shape))


def _is_nonzero(x: Float[np.ndarray, "rows columns"]) -> Bool[np.ndarray, "rows columns"]:
    return x.view(f"u{x.dtype.itemsize}") != 0  # by bits: -0.0 equals 0


def _starts(counts: Shaped[np.ndarray, " rows"]) -> Shaped[np.ndarray, " rows"]:
    return np.cumsum(counts, dtype=np.int64) - counts


def _check_width(rows: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if rows[1] % _GROUP:
        raise UserError(
            f"an array of shape {shape} has rows of {rows[1]}, expected a multiple of {_GROUP}: "
            "use the layout sparse-bitmask"
        )


def _unpack_bits(
    bits: Shaped[np.ndarray, "..."], shape: tuple[int, ...]
) -> Bool[np.ndarray, "rows columns"]:
    """The mask; what `shape` claims is believed only if `bits` are as many."""
    rows, columns = _rows_and_columns(shape)
    expected = (rows, -(-columns // 8))
    if bits.dtype != np.uint8 or bits.shape != expected:
        raise UserError(
            f"bitmask is {bits.dtype} {bits.shape}, expected uint8 {expected}: a bit for each of "
            f"{columns} columns, every row from a new byte; flatten arrays of {shape} to "
            f"{(rows, columns)} before packing"
        )
    mask = np.unpackbits(bits, axis=1, bitorder="little").view(bool)
    if mask[:, columns:].any():
        row = int(np.flatnonzero(mask[:, columns:].any(axis=1))[0])
        raise UserError(
            f"bitmask has bits set after column {columns - 1} of row {row}, expected 0: is the "
            "shape that of another array, or the order of bits big?"
        )
    return mask[:, :columns]


def _scatter(
    keep: Bool[np.ndarray, "rows columns"],
    values: Float[np.ndarray, " stored"],
    shape: tuple[int, ...],
) -> Float[np.ndarray, "..."]:
    x = np.zeros(keep.shape, values.dtype)
    x[keep] = values
    return x.reshape(shape)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UserError("the parts do not fit each other:\n  " + "\n  ".join(problems))
