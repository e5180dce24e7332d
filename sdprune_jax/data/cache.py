"""Arrays computed once and kept on disk, under a key of everything that they depend on."""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from sdprune_jax import sharding

Arrays = dict[str, np.ndarray]

_LARGE = 2**26  # bytes, above which hashing a file would take long


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
    """A hash of every file below a directory: of its name, and its content or, if large, its time.

    It is that of the first process, in all of them: hosts may have copies of their own.
    """

    def state(path: pathlib.Path) -> list[Any]:
        name, stat = str(path.relative_to(directory)), path.stat()
        if stat.st_size > _LARGE:
            return [name, stat.st_size, stat.st_mtime_ns]
        return [name, stat.st_size, hashlib.sha256(path.read_bytes()).hexdigest()]

    def find() -> np.ndarray:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        digest = fingerprint([state(path) for path in files])
        return np.unpackbits(np.frombuffer(bytes.fromhex(digest), np.uint8))

    return np.packbits(sharding.of_first(find, (64,))).tobytes().hex()


def cached(directory: pathlib.Path, name: str, key: str, compute: Callable[[], Arrays]) -> Arrays:
    """The arrays `name`, read back if they were computed under the same key, else computed.

    Each is a file of its own, opened without being read: only the rows in use take memory. Every
    process calls it; the first one decides and writes, in a directory that all can read.
    """
    final = directory / f"{name}-{key}"
    if not sharding.of_first(final.exists):
        found = compute()  # by all: it may gather
        if jax.process_index() == 0:
            partial = directory / f"{name}-{key}.tmp{os.getpid()}"
            partial.mkdir(parents=True, exist_ok=True)
            for field, array in found.items():
                np.save(partial / f"{field}.npy", array)
            partial.rename(final)
        sharding.wait_for_all(final.name)
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
