"""Conceptual Captions (CC3M): the captions of the official TSV, and the pictures one could get.

A source is a directory with the TSV of a split, `caption<TAB>url` a line, and, for pictures, a
folder of that name. The addresses are never visited. A picture belongs to the line that its file
name begins with, counted from 0: `17_2938475` or, in folders by shard, `00000/000000017.jpg`. A row
is a line; its position is the number of the line, so a dead link moves no other.
"""

import hashlib
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from sdprune_jax import UserError
from sdprune_jax.data import cache, captioned, sources

FILES = {  # split -> TSV, folder of pictures
    "train": ("Train_GCC-training.tsv", "training"),
    "validation": ("Validation_GCC-1.1.0-Validation.tsv", "validation"),
}
# The split that experts train on, and those that they are evaluated on: no test split has captions.
TRAINED_ON = {"train": "train", "val": "validation", "test": "validation"}
_URL = "https://ai.google.com/research/ConceptualCaptions/download"
_NOT_PICTURES = (".json", ".txt", ".parquet", ".tsv", ".csv")  # what downloaders leave beside them


class CaptionedCc3m(tfds.core.GeneratorBasedBuilder):
    """The dataset for tensorflow-datasets; it writes and reads ArrayRecord without TensorFlow."""

    VERSION = captioned.VERSION
    BUILDER_CONFIGS = captioned.configs(tuple(FILES))

    def __init__(self, *, source: captioned.Source, max_skipped: float, **where: Any):
        self.source, self.max_skipped = source, max_skipped
        super().__init__(**where)

    def _info(self) -> tfds.core.DatasetInfo:
        return captioned.info(self, self.source, __doc__ or "")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {captioned.SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return captioned.examples(self, self.source, self.max_skipped)


def prepare(
    source: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    split: str,
    *,
    has_images: bool = True,
    max_skipped: float = sources.MAX_SKIPPED,
) -> captioned.Captioned:
    """Writes the dataset of a split below `data_dir`, once, from the files in `source`.

    What cannot be used is skipped and counted: see `Captioned.skips` and `sources.table`. A line
    without a picture is counted, but is no mistake: links die.

    Args:
        source: directory of the TSV and of the folder.
        data_dir: directory of datasets.
        split: train or validation.
        has_images: False stores captions alone, of all lines.
        max_skipped: fraction of lines and pictures that may be skipped, in [0, 1).

    Raises:
        ValueError: if files are missing, too much is skipped, or the dataset exists and was made
            from other files.
    """
    found = read(source, split, has_images)
    return captioned.prepare(CaptionedCc3m, found, data_dir, split, max_skipped)


def load(
    data_dir: str | os.PathLike[str], split: str, *, has_images: bool = True
) -> captioned.Captioned:
    """Opens a prepared split; reads nothing yet.

    Raises:
        ValueError: if it was not prepared.
    """
    _check_split(split)
    return captioned.load(CaptionedCc3m, data_dir, split, has_images)


def read(source: str | os.PathLike[str], split: str, has_images: bool) -> captioned.Source:
    """Reads the TSV of a split and the names of the pictures; opens no picture.

    Raises:
        ValueError: if the TSV or the folder is missing.
    """
    _check_split(split)
    tsv, folder = (pathlib.Path(source, name) for name in FILES[split])
    if not tsv.is_file():
        raise UserError(f"CC3M needs {tsv}, and it is not there; it is from {_URL}")
    if has_images and not folder.is_dir():
        raise UserError(
            f"the pictures of CC3M need the folder {folder}/, and it is not there; they are"
            f" downloaded from the addresses in {tsv.name}; captions alone need no pictures"
        )
    skips: sources.Skips = {}
    captions, num_lines = _captions(tsv, skips)
    names = _pictures(folder, num_lines, skips) if has_images else dict.fromkeys(captions, "")
    rows = []
    for line, caption in captions.items():
        if line in names:
            rows.append(captioned.Row(line, line, names[line], (caption,)))
        else:
            sources.note(skips, sources.ABSENT, f"line {line}")
    sizes = [[name, (folder / name).stat().st_size] for name in names.values() if name]
    with tsv.open("rb") as file:
        state = cache.fingerprint(hashlib.file_digest(file, "sha256").hexdigest(), sizes)
    reader = sources.from_folder(folder) if has_images else None
    return captioned.Source(rows, num_lines, skips, reader, state)


def _captions(tsv: pathlib.Path, skips: sources.Skips) -> tuple[dict[int, str], int]:
    """Captions by number of the line, and the number of lines; a heading is not counted."""
    captions, columns, num_lines = {}, (0, 1), 0
    with tsv.open("rb") as file:  # as text, more would end a line than a line feed
        for number, line in enumerate(file):
            try:
                fields = line.decode().rstrip("\r\n").split("\t")
            except UnicodeDecodeError:
                fields = []
            if number == 0 and sorted(field.lower() for field in fields) == ["caption", "url"]:
                columns = (0, 1) if fields[0].lower() == "caption" else (1, 0)
                continue
            if len(fields) != 2:
                sources.note(skips, "line is not caption<TAB>address", f"line {num_lines}")
            elif not _is_address(fields[columns[1]]):
                sources.note(skips, "address is not one of the web", fields[columns[1]])
            elif problem := sources.caption_problem(fields[columns[0]]):
                sources.note(skips, problem, f"line {num_lines}")
            else:
                captions[num_lines] = fields[columns[0]]
            num_lines += 1
    return captions, num_lines


def _pictures(folder: pathlib.Path, num_lines: int, skips: sources.Skips) -> dict[int, str]:
    """Names of the pictures, relative to `folder`, by number of the line."""
    names: dict[int, str] = {}
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            if file.startswith(".") or file.lower().endswith(_NOT_PICTURES):
                continue
            name = (pathlib.Path(parent) / file).relative_to(folder).as_posix()
            number = re.match(r"(\d{1,12})(?=[_.]|$)", file, re.ASCII)
            if not number:
                sources.note(skips, "file name does not begin with the number of a line", name)
            elif int(number[1]) >= num_lines:
                sources.note(skips, "picture is of a line that is not there", name)
            elif int(number[1]) in names:
                sources.note(skips, "line has two pictures", name)
            else:
                names[int(number[1])] = name
    return names


def _is_address(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def _check_split(split: str) -> None:
    if split not in FILES:
        raise UserError(f"split must be one of {', '.join(FILES)}, got {split!r}")
