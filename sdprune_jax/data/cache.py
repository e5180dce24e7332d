"""Arrays computed once and kept on disk, under a key of everything that they depend on."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from sdprune_jax import artefacts, sharding
from sdprune_jax.files import checksums

Arrays = dict[str, np.ndarray]


def fingerprint(*inputs: Any) -> str:
    """A hash of arrays and JSON values, and of trees of them: of their names, too, and of None."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(inputs, is_leaf=lambda x: x is None):
        digest.update(jax.tree_util.keystr(path).encode())
        if hasattr(leaf, "dtype"):
            array = np.ascontiguousarray(leaf)
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(array.tobytes())
        else:
            digest.update(json.dumps(leaf).encode())
    return digest.hexdigest()[:16]


def directory_state(directory: pathlib.Path) -> str:
    """Returns a hash of the names and contents of all files below a directory.

    It is that of the first process, in all of them: hosts may have copies of their own.
    """

    def state() -> str:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        names = [path.relative_to(directory).as_posix() for path in files]
        return fingerprint(dict(zip(names, map(checksums.sha256, files), strict=True)))

    return sharding.shared(state)


@dataclasses.dataclass(frozen=True)
class CacheRecord:
    """The record of arrays that are kept; it says no more than what they were computed from."""


def cached(directory: pathlib.Path, name: str, key: str, compute: Callable[[], Arrays]) -> Arrays:
    """Returns the arrays `name`, read back if they are whole and of the same key, else computed.

    Each is a file of its own, opened without being read: only the rows in use take memory. Every
    process calls it; the first one decides and writes, in a directory that all can read.
    """
    final = directory / f"{name}-{key}"
    output = artefacts.Output(f"cache of {name}", final, final / "record.json")
    if not artefacts.is_complete(output, {"key": key}):
        arrays = compute()  # by all: it may gather
        with artefacts.writing(output, {"key": key}) as partial:
            partial.record = CacheRecord()
            if jax.process_index() == 0:
                for field, array in arrays.items():
                    np.save(partial.directory / f"{field}.npy", array)
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(final.glob("*.npy"))}


def in_batches(num_rows: int, batch_size: int) -> Iterator[np.ndarray]:
    """Rows in batches of one size; the last repeats its last row, which the caller cuts off."""
    for first in range(0, num_rows, batch_size):
        yield np.minimum(np.arange(first, first + batch_size), num_rows - 1)


def in_whole_batches(num_rows: int, batch_size: int, limit: int) -> Iterator[np.ndarray]:
    """Rows for a mean over at most `limit` batches of one size, in which all weigh the same.

    What does not fill a batch is left out; if that would be all, the rows go round.
    """
    if 0 < num_rows < batch_size:
        yield np.resize(np.arange(num_rows), batch_size)
    for batch in range(min(num_rows // batch_size, limit)):
        yield np.arange(batch * batch_size, (batch + 1) * batch_size)
