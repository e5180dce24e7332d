"""Reading what others made: captions, file names and pictures that may be anything.

What cannot be used is skipped and counted by reason. Only its share decides whether to go on.
"""

import pathlib
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from sdprune_jax import UserError
from sdprune_jax.data import images

MAX_SKIPPED = 0.05  # fraction of a source that may be unusable
LONGEST = 2000  # characters of a caption; the tokenizer keeps 77 tokens
MAX_BYTES = 2**27  # of the file of a picture
MAX_TEXT_BYTES = 2**31  # of a file of captions; that of COCO train2014 has 67 MB
ABSENT = "no picture was downloaded"  # shown, but not part of the share: dead links are expected
_NUM_EXAMPLES = 3

Skips = dict[str, dict[str, Any]]  # reason -> {"count": int, "examples": [str, ...]}
Read = Callable[[str], bytes]  # from a file name to the bytes of the picture


def note(skips: Skips, reason: str, example: object) -> None:
    """Counts one thing that is skipped, and names the first few."""
    entry = skips.setdefault(reason, {"count": 0, "examples": []})
    entry["count"] += 1
    if entry["count"] <= _NUM_EXAMPLES:
        entry["examples"].append(ascii(example)[:80])


def num_skipped(skips: Skips) -> int:
    return sum(entry["count"] for reason, entry in skips.items() if reason != ABSENT)


def table(skips: Skips) -> str:
    """A line for each reason, the most frequent first: count, reason, examples."""
    lines = []
    for reason, entry in sorted(skips.items(), key=lambda item: -item[1]["count"]):
        more = ", ..." if entry["count"] > len(entry["examples"]) else ""
        lines.append(f"{entry['count']:>9,}  {reason}: {', '.join(entry['examples'])}{more}")
    return "\n".join(lines) or f"{0:>9}  skipped"


def check_share(skips: Skips, num_entries: int, max_skipped: float) -> None:
    """Checks that at most the fraction `max_skipped` of the entries of a source is skipped.

    Args:
        skips: what is skipped.
        num_entries: rows and what was skipped before they were rows.
        max_skipped: in [0, 1).

    Raises:
        ValueError: with the table, if it is more.
    """
    if not 0 <= max_skipped < 1:
        raise UserError(f"max_skipped is a fraction in [0, 1), got {max_skipped}")
    share = num_skipped(skips) / max(num_entries, 1)
    if share > max_skipped:
        raise UserError(
            f"at least {share:.1%} of the source cannot be used, more than"
            f" max_skipped={max_skipped:.1%}: repair it, or allow more\n{table(skips)}"
        )


def caption_problem(caption: object) -> str | None:
    """Why a caption cannot be used, or None; space and marks around it are no reason."""
    if not isinstance(caption, str):
        return "caption is no text"
    if not caption.strip():
        return "caption is empty"
    if "\0" in caption:
        return "caption has a NUL"
    if len(caption) > LONGEST:
        return f"caption is longer than {LONGEST:,} characters"
    return None if caption.isascii() or _is_unicode(caption) else "caption is not Unicode"


def name_problem(name: object) -> str | None:
    """Why a file name must not be opened, or None if it is a plain name."""
    if not isinstance(name, str) or not name:
        return "file name is no text"
    if name in (".", "..") or any(mark in name for mark in "/\\:"):
        return "file name leads out of its folder"
    legal = name.isprintable() and len(name.encode()) <= 255  # half a surrogate pair does not print
    return None if legal else "file name is not legal"


def from_folder(folder: pathlib.Path) -> Read:
    """Reads pictures below a folder; the names are known to be safe."""

    def read(name: str) -> bytes:
        path = folder / name
        _check_bytes(path.stat().st_size, MAX_BYTES, name)
        return path.read_bytes()

    return read


def from_zip(path: pathlib.Path, prefix: str) -> Read:
    """Reads the members `prefix` + name of a zip file.

    Raises:
        ValueError: if `path` is no zip file.
    """
    archive = _open_zip(path)

    def read(name: str) -> bytes:
        try:
            member = archive.getinfo(prefix + name)
        except KeyError as error:
            raise FileNotFoundError(f"{path} has no {prefix}{name}") from error
        return _extract(archive, member, MAX_BYTES)

    return read


def text(path: pathlib.Path) -> bytes:
    """Reads a file of captions. Raises: ValueError: if it is too large to be one."""
    _check_bytes(path.stat().st_size, MAX_TEXT_BYTES, str(path))
    return path.read_bytes()


def text_from_zip(path: pathlib.Path, name: str) -> bytes:
    """Reads one member.

    Raises:
        ValueError: if it is not there or is damaged, or `path` is no zip file.
    """
    with _open_zip(path) as archive:
        if name not in archive.namelist():
            raise UserError(f"{path} has no {name}: it is another archive, or download it again")
        return _extract(archive, archive.getinfo(name), MAX_TEXT_BYTES)


def picture(read: Read, name: str) -> tuple[bytes, str | None]:
    """The bytes of a picture, and why it cannot be used, or None: every picture is decoded once."""
    try:
        contents = read(name)
    except FileNotFoundError:
        return b"", "picture is missing"
    except (ValueError, IsADirectoryError):
        return b"", "picture cannot be read"
    try:
        images.decode(contents, "picture")
    except ValueError:
        return b"", "picture cannot be decoded"
    return contents, None


def _open_zip(path: pathlib.Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is no zip file ({error}): download it again") from error


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, max_bytes: int) -> bytes:
    """One member; a size that the archive understates ends in a wrong checksum."""
    _check_bytes(member.file_size, max_bytes, member.filename)
    try:
        return archive.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last: encrypted
        raise UserError(f"{archive.filename}: {member.filename} is damaged: {error}") from error


def _check_bytes(num_bytes: int, max_bytes: int, name: str) -> None:
    if num_bytes > max_bytes:
        raise UserError(f"{name} has {num_bytes:,} bytes, more than {max_bytes:,}")


def _is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8; half of a surrogate pair, as JSON may hold, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
