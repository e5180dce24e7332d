"""safetensors files: opened with suspicion, written in a stream."""

import json
import math
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors
from jaxtyping import Shaped

from sdprune_jax import UserError
from sdprune_jax.files import checksums, json_files

FLOATS = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}
_INTEGERS = {"I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1", "BOOL": "?"}
DTYPES = {name: np.dtype(dtype) for name, dtype in (FLOATS | _INTEGERS).items()}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STEMS = ("diffusion_pytorch_model", "model")  # as diffusers and as transformers call the file
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


class StoredTensor(NamedTuple):
    """A tensor in a file, not yet read: `slices[index]` reads the part at `index`."""

    dtype: str
    shape: tuple[int, ...]
    slices: Any

    def read(self) -> Shaped[np.ndarray, "..."]:
        return self.slices[...]


def find_weights(directory: str | os.PathLike[str], variant: str | None = None) -> pathlib.Path:
    """Finds the safetensors file of a component, or the index of its several files.

    Raises:
        ValueError: if there is none, or more than one.
    """
    directory = pathlib.Path(directory)
    mark = f".{variant}" if variant else ""
    names = [f"{stem}{mark}.safetensors" for stem in _STEMS]
    names += [f"{stem}.safetensors.index{mark}.json" for stem in _STEMS]
    paths = [directory / name for name in names if (directory / name).exists()]
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise UserError(
            f"{directory} holds the weights more than once: {', '.join(p.name for p in paths)}; "
            "keep one"
        )
    here = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
    hint = f"it holds {', '.join(here[:10])}" if here else "it is empty or missing"
    if any(name.endswith(_PICKLES) for name in here):
        hint += "; pickles are not read because they can run code: convert them to safetensors"
    if any(name.endswith(".msgpack") for name in here):
        hint += "; sdprune convert converts Flax weights"
    raise UserError(f"{directory} has neither {names[0]} nor {names[1]}: {hint}")


def open_tensors(
    directory: str | os.PathLike[str], variant: str | None = None
) -> dict[str, StoredTensor]:
    """Opens all tensors of a component, unread, in one file or in the several of an index.

    Raises:
        ValueError: if a file is not intact, or the index does not tell what the files hold.
    """
    path = find_weights(directory, variant)
    if path.suffix != ".json":
        return open_file(path)
    weight_map = read_weight_map(path)
    stored, problems = {}, []
    for name in sorted(set(weight_map.values())):
        held = open_file(path.parent / name)
        listed = {key for key, file in weight_map.items() if file == name}
        problems += [f"{name} lacks {key}" for key in sorted(listed - held.keys())]
        problems += [f"{name} has {key} unlisted" for key in sorted(held.keys() - listed)]
        stored |= held
    if problems:
        raise UserError(f"{path} does not describe its files:\n  {json_files.listing(problems)}")
    return stored


def read_weight_map(index: pathlib.Path) -> dict[str, str]:
    """Reads which file holds each tensor from an index.

    Raises:
        ValueError: if a name is not that of a safetensors file in the directory of the index.
    """
    weight_map = json_files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    names = {name if isinstance(name, str) else repr(name) for name in weight_map.values()}
    bad = [n for n in names if set(n) & set("/\\\0") or not n.endswith(".safetensors")]
    if bad:
        raise UserError(f"{index} names files that are not beside it: {sorted(bad)}")
    return weight_map


def open_file(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Opens the tensors of one file, unread.

    Raises:
        ValueError: if the file is not an intact safetensors file, saying what it is instead.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "is no file"
        raise UserError(f"{path} {what}, expected a safetensors file")
    _check_header(path)
    try:
        file = safetensors.safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}; download it again") from error
    return {n: StoredTensor(s.get_dtype(), tuple(s.get_shape()), s) for n, s in slices.items()}


def write_file(
    path: pathlib.Path,
    specs: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], Shaped[np.ndarray, "..."]],
) -> dict[str, int]:
    """Writes one safetensors file; one tensor at a time is in memory.

    Args:
        path: written by the first process only.
        specs: shape and dtype of every tensor.
        read: returns the tensor of a name; every process calls it, in the same order.

    Returns:
        CRC-32 of every tensor.
    """
    # The order of the safetensors library, so that equal tensors make equal files.
    names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    stored = {name: (_NAMES[specs[name].dtype], specs[name].shape) for name in names}
    sums = {}
    is_writer = jax.process_index() == 0
    with checksums.writing(path if is_writer else pathlib.Path(os.devnull)) as file:
        file.write(header(stored, {"format": "pt"}))  # older transformers insist on it
        for name in names:
            data = read(name).tobytes()
            sums[name] = zlib.crc32(data)
            file.write(data)
    return sums


def header(stored: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Returns the start of a safetensors file, up to its contents.

    Args:
        stored: dtype, as safetensors calls it, and shape of every tensor, in the order of contents.
        metadata: written under `__metadata__`, unless empty.
    """
    values: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (kind, shape) in stored.items():
        start, end = end, end + math.prod(shape) * DTYPES[kind].itemsize
        values[name] = {"dtype": kind, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check_file(
    path: pathlib.Path, specs: Mapping[str, jax.ShapeDtypeStruct], sums: Mapping[str, int]
) -> None:
    """Reads a file back and compares names, shapes, dtypes and contents with what was written."""
    stored = open_file(path)
    assert stored.keys() == specs.keys(), f"{path} holds other tensors than were written"
    for name, tensor in stored.items():
        want = (_NAMES[specs[name].dtype], specs[name].shape, sums[name])
        assert (*tensor[:2], zlib.crc32(tensor.read().tobytes())) == want, f"{path}: {name} differs"


def num_bytes(spec: jax.ShapeDtypeStruct) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _check_header(path: pathlib.Path) -> None:
    """Refuses what the safetensors library accepts or explains badly."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if start.startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`")
        if length > size and start.lstrip()[:1] in (b"<", b"{"):
            raise UserError(f"{path} is a web page or a message: {start!r}; download it again")
        if length > size and start.startswith(b"PK"):
            raise UserError(f"{path} is a zip archive or a pickle, not safetensors")
        if size < 8 or length > size - 8:
            raise UserError(
                f"{path} is cut short: {size} bytes, of which the header needs {8 + length}; "
                "download it again"
            )
        if length > json_files.MAX_BYTES:
            raise UserError(
                f"{path}: the header has {length} bytes, at most {json_files.MAX_BYTES}"
            )
        file.seek(8)
        json_files.parse_json(file.read(length), f"{path}: the header")
