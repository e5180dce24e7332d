"""SHA-256 of files, computed once for each content of a file on a machine.

A checksum is kept in the user's cache under the file's path, with its size, times and inode: a file
that was touched since is read again.
"""

import contextlib
import hashlib
import os
import pathlib
import time
from collections.abc import Iterator

_CHUNK = 2**22  # bytes
# A file that was written again within one tick of the file system's clock keeps its times, so a
# checksum is not kept for a file that changed this recently.
_TICK_SECONDS = 0.1


def sha256(path: pathlib.Path) -> str:
    """Returns the checksum of a file's content, from the cache if the file is untouched."""
    path = path.absolute()
    before = _signature(path)
    if known := _read(path, before):
        return known
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if _signature(path) == before and time.time() - path.stat().st_ctime > _TICK_SECONDS:
        _keep(path, before, digest.hexdigest())
    return digest.hexdigest()


def move(source: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a file whose checksum is known, and keeps the checksum under the new name."""
    source, target = source.absolute(), target.absolute()
    known = _read(source, _signature(source))
    os.replace(source, target)
    with contextlib.suppress(OSError):
        _entry(source).unlink()
    if known:
        _keep(target, _signature(target), known)


class Writer:
    """A new file that is hashed while it is written."""

    def __init__(self, path: pathlib.Path):
        self._path, self._digest = path.absolute(), hashlib.sha256()
        self._file = path.open("wb")

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def close(self) -> None:
        """Waits until the file is on the disk."""
        self._file.flush()
        if self._path.is_file():  # not /dev/null
            os.fsync(self._file.fileno())
        self._file.close()
        if self._path.is_file():
            _keep(self._path, _signature(self._path), self._digest.hexdigest())


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[Writer]:
    """Opens a file for writing, of which `sha256` then knows the checksum."""
    file = Writer(path)
    with contextlib.closing(file):
        yield file


def _signature(path: pathlib.Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def _entry(path: pathlib.Path) -> pathlib.Path:
    """Returns the file that keeps the checksum of the file at `path`."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    name = hashlib.sha256(os.fsencode(path)).hexdigest()
    return cache / "sdprune_jax" / "checksums" / name[:2] / name[2:]


def _read(path: pathlib.Path, signature: str) -> str | None:
    try:
        kept, _, checksum = _entry(path).read_text().rpartition(" ")
    except (OSError, ValueError):
        return None
    return checksum if kept == signature and len(checksum) == 64 else None


def _keep(path: pathlib.Path, signature: str, checksum: str) -> None:
    entry = _entry(path)
    partial = entry.with_name(f"{entry.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # a home that cannot be written: hashed again each time
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(f"{signature} {checksum}")
        partial.replace(entry)
