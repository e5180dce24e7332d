"""Captions of COCO 2014 and 2017, from the files that cocodataset.org offers.

A source is a directory with `annotations/captions_SPLIT.json` or `annotations_trainvalYEAR.zip`
and, for pictures, `SPLIT/`, `images/SPLIT/` or `SPLIT.zip`. `prepare` makes a dataset of it, which
`load` opens anywhere. A row is an image, at the place of its first annotation in the file; that
order, and the first caption, are what the published samplings of COCO start from.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from sdprune_jax import UserError
from sdprune_jax.data import cache, captioned, sources

SPLITS = ("train2014", "val2014", "train2017", "val2017")
# The split that experts train on, and those that they are evaluated on: no test split has captions.
TRAINED_ON = {"train": "train2014", "val": "val2014", "test": "val2014"}
_URL = "http://images.cocodataset.org"


class CaptionedCoco(tfds.core.GeneratorBasedBuilder):
    """The dataset for tensorflow-datasets; it writes and reads ArrayRecord without TensorFlow."""

    VERSION = captioned.VERSION
    BUILDER_CONFIGS = captioned.configs(SPLITS)

    def __init__(self, *, source: captioned.Source, max_skipped: float, **where: Any):
        self.source, self.max_skipped = source, max_skipped
        super().__init__(**where)

    def _info(self) -> tfds.core.DatasetInfo:
        return captioned.info(self, self.source, __doc__ or "")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # COCO is on disk, or not to be had
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

    What cannot be used is skipped and counted: see `Captioned.skips` and `sources.table`.

    Args:
        source: directory of the official files.
        data_dir: directory of datasets.
        split: one of SPLITS.
        has_images: False stores captions alone, which is enough for prompts.
        max_skipped: fraction of images and annotations that may be skipped, in [0, 1).

    Raises:
        ValueError: if files are missing or damaged, too much is skipped, or the dataset exists and
            was made from other files.
    """
    found = read(source, split, has_images)
    return captioned.prepare(CaptionedCoco, found, data_dir, split, max_skipped)


def load(
    data_dir: str | os.PathLike[str], split: str, *, has_images: bool = True
) -> captioned.Captioned:
    """Opens a prepared split; reads nothing yet.

    Raises:
        ValueError: if it was not prepared.
    """
    _check_split(split)
    return captioned.load(CaptionedCoco, data_dir, split, has_images)


def read(source: str | os.PathLike[str], split: str, has_images: bool) -> captioned.Source:
    """Reads the annotations of a split; opens no picture.

    Raises:
        ValueError: if files are missing, or the annotations are not those of COCO captions.
    """
    _check_split(split)
    directory = pathlib.Path(source)
    text, origin = _annotations(directory, split)
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin} is no JSON ({error}): download it again") from error
    keys = ("images", "annotations")
    lists: Any = [contents.get(key) if isinstance(contents, dict) else None for key in keys]
    if not all(isinstance(entries, list) for entries in lists):
        raise UserError(f"{origin} has no lists `images` and `annotations`: it is not from COCO")
    reader, state = _pictures(directory, split) if has_images else (None, "")
    rows, num_positions, skips = _rows(*lists)
    state = cache.fingerprint(hashlib.sha256(text).hexdigest(), state)
    return captioned.Source(rows, num_positions, skips, reader, state)


def _rows(
    listed: list[Any], annotations: list[Any]
) -> tuple[list[captioned.Row], int, sources.Skips]:
    """The rows, the number of positions, and what is skipped.

    The positions are those of the annotated images, by first annotation, whatever is wrong with it.
    """
    skips: sources.Skips = {}
    names, refused = _names(listed, skips)
    found: dict[int, list[str]] = {}  # image -> its captions
    seen = set()
    for annotation in annotations:
        entry: Any = annotation if isinstance(annotation, dict) else {}
        image, number, caption = (entry.get(key) for key in ("image_id", "id", "caption"))
        if not _is_id(image) or not _is_id(number):
            sources.note(skips, "annotation has no id or image_id", annotation)
            continue
        captions = found.setdefault(image, [])
        if number in seen:
            sources.note(skips, "annotation id is there twice", number)
        elif problem := sources.caption_problem(caption):
            sources.note(skips, problem, f"annotation {number}")
        else:
            captions.append(caption)
        seen.add(number)
    rows = []
    for position, (image, captions) in enumerate(found.items()):
        if image in refused:
            continue  # counted as such
        if image not in names:
            sources.note(skips, "annotated image is not listed", image)
        elif not captions:
            sources.note(skips, "image has no caption that can be used", image)
        else:
            rows.append(captioned.Row(position, image, names[image], tuple(captions)))
    for image in names:
        if image not in found:
            sources.note(skips, "image has no annotation", image)
    return rows, len(found), skips


def _names(listed: list[Any], skips: sources.Skips) -> tuple[dict[int, str], set[int]]:
    """File names by image id, and the ids of images whose names cannot be used."""
    names: dict[int, str] = {}
    refused, used = set(), set()
    for image in listed:
        entry: Any = image if isinstance(image, dict) else {}
        number, name = entry.get("id"), entry.get("file_name")
        if not _is_id(number):
            sources.note(skips, "image has no id", image)
        elif number in names or number in refused:
            sources.note(skips, "image id is there twice", number)
        elif problem := sources.name_problem(name):
            sources.note(skips, problem, name)
            refused.add(number)
        elif name in used:
            sources.note(skips, "file name is there twice", name)
            refused.add(number)
        else:
            names[number] = name
            used.add(name)
    return names, refused


def _annotations(directory: pathlib.Path, split: str) -> tuple[bytes, str]:
    """The contents of the annotation file, and where it is."""
    name = f"annotations/captions_{split}.json"
    archive = directory / f"annotations_trainval{split[-4:]}.zip"
    if (directory / name).is_file():
        return sources.text(directory / name), f"{directory / name}"
    if archive.is_file():
        return sources.text_from_zip(archive, name), f"{name} in {archive}"
    raise UserError(
        f"COCO needs {directory / name} or {archive}, and neither is there;"
        f" it is from {_URL}/annotations/{archive.name}"
    )


def _pictures(directory: pathlib.Path, split: str) -> tuple[sources.Read, str]:
    """How to read a picture, and a hash of what is there."""
    folders = (directory / split, directory / "images" / split)
    archive = directory / f"{split}.zip"
    if folder := next((folder for folder in folders if folder.is_dir()), None):
        with os.scandir(folder) as entries:
            files = sorted((e.name, e.stat().st_size) for e in entries if e.is_file())
        return sources.from_folder(folder), cache.fingerprint(files)
    if archive.is_file():
        stat = archive.stat()
        return sources.from_zip(archive, f"{split}/"), f"{stat.st_size} {stat.st_mtime_ns}"
    raise UserError(
        f"the pictures of COCO need {folders[0]}/, {folders[1]}/ or {archive}, and none is there;"
        f" they are from {_URL}/zips/{archive.name}; captions alone need no pictures"
    )


def _is_id(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
