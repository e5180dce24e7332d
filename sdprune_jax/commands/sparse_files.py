"""safetensors files in which zeros take one bit: what sdprune pack reads and writes.

A tensor `NAME.weight` that gets smaller is held as `NAME.shape`, `NAME.compressed`, `NAME.bitmask`
and `NAME.row_offsets` (`files.bitmask`); the others as they are. Under `KEY` the metadata of the
header hold JSON: `version`; `format`; `packed`, the names; `sha256` of the dense contents, by name
and in the order of the file that was packed, so that its contents return in that order.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors

from sdprune_jax import UserError
from sdprune_jax.files import bitmask, json_files, tensors

VERSION = 1
KEY = "sdprune_jax.sparse"
_HEADER_BYTES = 400  # three tensors more to describe, and the name once more


class Entry(NamedTuple):
    """A tensor to write."""

    dtype: str  # as safetensors calls it, such as "F16"
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def pack(path: pathlib.Path, new: pathlib.Path) -> bool:
    """Writes `new` if any tensor of `path` gets smaller, and tells whether.

    One tensor is in memory at a time, dense and packed, and the row offsets of all. What was
    written is read back and compared.

    Raises:
        ValueError: if `path` is damaged, or holds dtypes that numpy lacks.
    """
    stored, metadata = _opened(path)
    packed, sums = [], {}
    offsets, values, masks = {}, {}, {}  # items of 8, of 8 to 2, of 1 byte: so all stay aligned
    for name, tensor in stored.items():
        x = _read(tensor)
        sums[name] = hashlib.sha256(x.tobytes()).hexdigest()
        parts = bitmask.to_bitmask(x) if _can_be_packed(name, tensor) else None
        if parts is None or sum(part.nbytes for part in parts) + _HEADER_BYTES >= x.nbytes:
            values[name] = Entry(tensor.dtype, tensor.shape, functools.partial(_read, tensor))
            continue
        packed.append(name)
        shape, compressed, bits, starts = _part_names(name)
        offsets[shape] = Entry("I64", parts.shape.shape, lambda x=parts.shape: x)
        offsets[starts] = Entry("I64", parts.row_offsets.shape, lambda x=parts.row_offsets: x)
        read = functools.partial(_read_part, tensor, "compressed")
        values[compressed] = Entry(tensor.dtype, parts.compressed.shape, read)
        read = functools.partial(_read_part, tensor, "bitmask")
        masks[bits] = Entry("U8", parts.bitmask.shape, read)
    if packed:
        record = {"version": VERSION, "format": "sparse-bitmask", "packed": packed, "sha256": sums}
        metadata[KEY] = json.dumps(record, separators=(",", ":"))
        _write(new, metadata, offsets | values | masks)
        for entry in _dense_entries(new)[0].values():
            entry.read()  # compares with the sums
    return bool(packed)


def unpack(path: pathlib.Path, new: pathlib.Path) -> None:
    """Writes the dense tensors of `path`; one is in memory at a time.

    Raises:
        ValueError: if `path` is not what `pack` wrote; `new` may be there in part then.
    """
    entries, metadata = _dense_entries(path)
    _write(new, metadata, entries)


def _can_be_packed(name: str, tensor: tensors.StoredTensor) -> bool:
    return name.endswith(".weight") and tensor.dtype in tensors.FLOATS and bool(tensor.shape)


def _part_names(name: str) -> list[str]:
    module = name.removesuffix(".weight")
    return [f"{module}.{part}" for part in bitmask.Bitmask._fields]


def _read(tensor: tensors.StoredTensor) -> np.ndarray:
    if 0 in tensor.shape:  # which safetensors cannot slice
        return np.zeros(tensor.shape, tensors.DTYPES[tensor.dtype])
    return tensor.read()


def _read_part(tensor: tensors.StoredTensor, part: str) -> np.ndarray:
    return getattr(bitmask.to_bitmask(_read(tensor)), part)


def _dense_entries(path: pathlib.Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The dense tensors of a packed file, and the metadata it had; reading compares the sums."""
    stored, metadata = _opened(path)
    record = _parse_record(path, metadata.pop(KEY, ""))
    entries, listed, problems = {}, set(), []
    for name, digest in record["sha256"].items():
        is_packed = name in record["packed"]
        keys = _part_names(name) if is_packed else [name]
        listed.update(keys)
        if lacking := [key for key in keys if key not in stored]:
            problems += [f"missing {key}" for key in lacking]
            continue
        held = [stored[key] for key in keys]
        dtype, shape = held[is_packed].dtype, held[0].shape  # `compressed` comes after `shape`
        if is_packed:
            try:
                shape = bitmask.dense_shape(_read(held[0]))
            except ValueError as error:
                problems.append(f"{name}: {error}")
        read = functools.partial(_read_dense, f"{path}: {name}", held, digest)
        entries[name] = Entry(dtype, shape, read)
    problems += [f"unlisted {key}" for key in sorted(stored.keys() - listed)]
    if problems:
        raise UserError(
            f"{path} does not hold what its header says:\n  {json_files.listing(problems)}\n"
            "pack the model again"
        )
    return entries, metadata


def _read_dense(where: str, held: Sequence[tensors.StoredTensor], digest: str) -> np.ndarray:
    arrays = [_read(tensor) for tensor in held]
    try:
        x = arrays[0] if len(arrays) == 1 else bitmask.from_bitmask(bitmask.Bitmask(*arrays))
    except ValueError as error:
        raise UserError(f"{where}: {error}\npack the model again") from error
    if (found := hashlib.sha256(x.tobytes()).hexdigest()) != digest:
        raise UserError(
            f"{where} is damaged: sha256 {found}, expected {digest}; copy the file again"
        )
    return x


def _parse_record(path: pathlib.Path, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict) or "version" not in record:
        raise UserError(f"{path}: its header does not say, under {KEY!r}, what is packed")
    if record["version"] != VERSION:
        raise UserError(
            f"{path} is of version {record['version']!r}, expected {VERSION}: "
            "unpack it with the release that packed it"
        )
    kinds = {"packed": list, "sha256": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(record.get(name), kind)]
    if wrong:
        raise UserError(f"{path}: {' and '.join(wrong)} of its header cannot be read")
    return record


def _opened(path: pathlib.Path) -> tuple[dict[str, tensors.StoredTensor], dict[str, str]]:
    """Tensors in the order of the contents, and the metadata."""
    stored = tensors.open_file(path)
    unknown = [f"{name}: {x.dtype}" for name, x in stored.items() if x.dtype not in tensors.DTYPES]
    if unknown:
        known = ", ".join(tensors.DTYPES)
        raise UserError(f"{path} has dtypes other than {known}:\n  {json_files.listing(unknown)}")
    with safetensors.safe_open(path, framework="numpy") as file:
        return {name: stored[name] for name in file.offset_keys()}, dict(file.metadata() or {})


def _write(path: pathlib.Path, metadata: Mapping[str, str], entries: Mapping[str, Entry]) -> None:
    """Writes a file in the order of `entries`, one tensor in memory at a time."""
    stored = {name: entry[:2] for name, entry in entries.items()}
    with path.open("wb") as file:
        file.write(tensors.header(stored, metadata))
        for entry in entries.values():
            file.write(entry.read().tobytes())
