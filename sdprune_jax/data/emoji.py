"""The embedded dataset: 11,313 emoji of 64x64 pixels, 1,914 concepts in up to 8 drawing styles.

`emoji64/index.json` names concepts, styles and licences; the pictures are tiles of the lossless
WebP sheets beside it, in the order of the index. `tools/render_emoji.py` makes both; the credits
are in NOTICE.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int32, UInt8
from PIL import Image

from sdprune_jax import UserError

SIZE = 64  # pixels, of a side
SPLITS = ("train", "val", "test")
HELD_OUT = 0.05  # fraction of the concepts for test, and of the remaining pictures for val
CACHE = pathlib.Path.home() / ".cache" / "sdprune_jax" / "tfds"
_DIRECTORY = pathlib.Path(__file__).parent / "emoji64"


@dataclass(frozen=True)
class Concept:
    """What a picture shows, in the words of Unicode's CLDR."""

    label: str  # "red apple"; unique
    tags: tuple[str, ...]  # ("apple", "fruit", "red")
    group: str  # "food & drink"
    subgroup: str  # "fruit"


@dataclass(frozen=True)
class Style:
    """One artist's set of pictures, and where it is from."""

    word: str  # "flat"; unique
    package: str  # on npm
    version: str
    licence: str  # SPDX


class Pairs(NamedTuple):
    """Pictures and what they show: rows of `concepts()` and of `styles()`."""

    images: UInt8[np.ndarray, "n 64 64 3"]
    concept: Int32[np.ndarray, " n"]
    style: Int32[np.ndarray, " n"]


@functools.cache
def concepts() -> tuple[Concept, ...]:
    return tuple(
        Concept(label, tuple(tags), group, subgroup)
        for group, subgroups in _index()["groups"].items()
        for subgroup, labels in subgroups.items()
        for label, tags in labels.items()
    )


@functools.cache
def styles() -> tuple[Style, ...]:
    keys = ("word", "package", "version", "licence")
    return tuple(Style(*(entry[key] for key in keys)) for entry in _index()["styles"])


@functools.cache
def split_of() -> dict[tuple[int, int], str]:
    """Returns the split of every (concept, style), in the order of the sheets.

    A concept of `test` is held out in all its styles; one of `val` is in `train` in another style.
    Splits follow from hashes of the names, so a picture added later moves no other concept.
    """
    drawn: dict[int, list[int]] = {}  # concept -> its styles
    pairs = [(c, s) for s, entry in enumerate(_index()["styles"]) for c in entry["concepts"]]
    for concept, style in pairs:
        drawn.setdefault(concept, []).append(style)

    def position(concept: int, style: int) -> float:
        return _hash(f"{styles()[style].word}/{concepts()[concept].label}")

    def split(concept: int, style: int) -> str:
        if _hash(concepts()[concept].label) < HELD_OUT:
            return "test"
        here = position(concept, style)
        last = max(position(concept, other) for other in drawn[concept])  # always in train
        return "val" if here < HELD_OUT and here < last else "train"

    return {pair: split(*pair) for pair in pairs}


class EmojiCaptions(tfds.core.GeneratorBasedBuilder):
    """The dataset for tensorflow-datasets; it writes and reads ArrayRecord without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="png"),
                "label": tfds.features.Text(),
                "tags": tfds.features.Text(),  # comma-separated
                "group": tfds.features.Text(),
                "subgroup": tfds.features.Text(),
                "style": tfds.features.Text(),
                "concept_id": tfds.features.Scalar(np.int32),  # row of concepts()
                "style_id": tfds.features.Scalar(np.int32),  # row of styles()
            }
        )
        return self.dataset_info_from_configs(
            description=__doc__, features=features, supervised_keys=("label", "image")
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # everything is in the package
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        tiles = _tiles()
        for tile, (pair, its_split) in zip(tiles, split_of().items(), strict=True):
            if its_split == split:
                concept, style = concepts()[pair[0]], styles()[pair[1]]
                yield (
                    f"{style.word}/{concept.label}",
                    {
                        "image": io.BytesIO(_png(tile)),  # an array would need TensorFlow
                        "label": concept.label,
                        "tags": ", ".join(concept.tags),
                        "group": concept.group,
                        "subgroup": concept.subgroup,
                        "style": style.word,
                        "concept_id": pair[0],
                        "style_id": pair[1],
                    },
                )


def prepare(cache_dir: str | os.PathLike[str]) -> tfds.core.DatasetBuilder:
    """Writes the dataset below `cache_dir`, once.

    An interrupted attempt leaves nothing behind, and of several at a time the first one stays.
    """
    make = functools.partial(EmojiCaptions, data_dir=cache_dir, file_format="array_record")
    options = tfds.download.DownloadConfig(try_download_gcs=False)
    with contextlib.suppress(FileExistsError):  # another process has written it meanwhile
        make().download_and_prepare(download_config=options)
    return make()


def load(split: str, cache_dir: str | os.PathLike[str] = CACHE) -> Pairs:
    """Reads a whole split: 10,000 pictures take 120 MB.

    Raises:
        ValueError: if `split` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    decoders = {"image": tfds.decode.SkipDecoding()}
    source = prepare(cache_dir).as_data_source(split, decoders=decoders)
    rows = source.__getitems__(range(len(source)))
    with futures.ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        images = list(pool.map(_decode, (row["image"] for row in rows)))
    return Pairs(
        images=np.stack(images),
        concept=np.array([row["concept_id"] for row in rows], np.int32),
        style=np.array([row["style_id"] for row in rows], np.int32),
    )


@functools.cache
def _index() -> dict[str, Any]:
    return json.loads((_DIRECTORY / "index.json").read_text(encoding="utf-8"))


def _hash(text: str) -> float:
    """Returns a number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def _tiles() -> Iterator[UInt8[np.ndarray, "64 64 3"]]:
    """Yields the pictures of all sheets, in the order of the index."""
    tile, per_row = _index()["tile"], _index()["tiles_per_row"]
    left = len(split_of())
    for path in sorted(_DIRECTORY.glob("sheet_*.webp")):
        sheet = np.asarray(Image.open(path).convert("RGB"))
        grid = sheet.reshape(-1, tile, per_row, tile, 3).swapaxes(1, 2)
        yield from grid.reshape(-1, tile, tile, 3)[:left]
        left -= min(left, per_row * grid.shape[0])


def _png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", compress_level=1)
    return file.getvalue()


def _decode(png: bytes) -> UInt8[np.ndarray, "h w 3"]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
