"""Pictures and prompts that the router and the experts learn from."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32, UInt8
from PIL import Image

from sdprune_jax import UserError, config, sharding
from sdprune_jax.data import cache, captioned, captions, cc3m, coco, emoji
from sdprune_jax.files import checksums

# Splits of the datasets that sdprune prepare-data writes. Neither has a test split with captions.
_SPLITS: Mapping[str, Mapping[str, str]] = {
    "cc3m": {"train": "train", "val": "validation", "test": "validation"},
    "coco": {"train": "train2014", "val": "val2014", "test": "val2014"},
}


class Prompts(NamedTuple):
    """The prompts of a split, `num_captions` of every picture after one another.

    Attributes:
        texts: the prompts.
        concept: row of `emoji.concepts()`; None of other pictures.
        style: row of `emoji.styles()`; None of other pictures.
    """

    texts: list[str]
    concept: Int32[np.ndarray, " rows"] | None = None
    style: Int32[np.ndarray, " rows"] | None = None


@dataclasses.dataclass(frozen=True)
class Images:
    """Squares of stored pictures, read and cut out when rows of them are taken.

    The shorter side is resized to the square's; where along the other one it lies is drawn, once
    for every picture, so that what is computed of it can be kept.
    """

    stored: captioned.Captioned
    size: int  # pixels

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self), self.size, self.size, 3)

    def __len__(self) -> int:
        return len(self.stored.records)

    def __getitem__(self, rows: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w 3"]:
        with futures.ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
            return np.stack(list(pool.map(self._read, rows.tolist())))

    def _read(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        rng = np.random.default_rng([0, int(self.stored.positions[row])])
        return square(captioned.image(self.stored, row), self.size, rng)


class Stored(NamedTuple):
    """Pictures of a dataset other than ours.

    Attributes:
        images: that can be indexed by rows, as an array.
        captions: of every picture, in their order there.
        state: changes if the pictures do.
    """

    images: Images
    captions: Sequence[tuple[str, ...]]
    state: str


@functools.cache  # every stage reads them: decoding takes seconds, and all of them 140 MB
def embedded(split: str) -> emoji.Pairs:
    return emoji.load(split)


def size(section: config.RouterData) -> int:
    """Pixels of a side."""
    return emoji.SIZE if section.dataset == "embedded" else section.image_size


def load(section: config.RouterData, split: str) -> emoji.Pairs | Stored:
    """The pictures of a split, or the first of them.

    Raises:
        ValueError: if they are stored, and not where the section says.
    """
    if section.dataset == "embedded":
        return emoji.Pairs(*(x[: section.num_images or None] for x in embedded(split)))
    if not section.directory:
        raise UserError(
            f"config.router.data.dataset is {section.dataset}: set config.router.data.directory to"
            " what sdprune prepare-data wrote"
        )
    where = (section.dataset, section.directory, _SPLITS[section.dataset][split])
    return _stored(*where, section.num_images, section.image_size)


def prompts(
    section: config.RouterData, pairs: emoji.Pairs | Stored, split: str, seed: int
) -> Prompts:
    """Of every picture its first caption and, for `train`, more: drawn, or those that it has.

    A stored picture with fewer captions than asked for has some of them again.
    """
    count = section.captions_per_image if split == "train" else 1
    if isinstance(pairs, Stored):
        return Prompts([own[i % len(own)] for own in pairs.captions for i in range(count)])
    rng = np.random.default_rng([seed, emoji.SPLITS.index(split)])
    texts = []
    for c, s in zip(pairs.concept, pairs.style, strict=True):
        concept, style = emoji.concepts()[c], emoji.styles()[s].word
        texts.append(captions.caption(concept, style))
        texts += [captions.augmented(rng, concept, style) for _ in range(count - 1)]
    return Prompts(texts, np.repeat(pairs.concept, count), np.repeat(pairs.style, count))


def checksums_of(dataset: str, directory: str) -> dict[str, str]:
    """Returns the checksum of every file that pictures and captions are read from, by name."""
    folder = pathlib.Path(directory)
    if dataset == "embedded":
        folder = pathlib.Path(emoji.__file__).with_name("emoji64")
    return sharding.shared(
        lambda: {
            path.relative_to(folder).as_posix(): checksums.sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    )


def state(pairs: emoji.Pairs | Stored) -> Any:
    """What a fingerprint of the pictures is made of."""
    return pairs.state if isinstance(pairs, Stored) else pairs.images


def square(
    image: UInt8[np.ndarray, "h w 3"], size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """A random square of a picture whose shorter side is resized to it, bilinearly.

    Source: the transforms of APTP's code (https://arxiv.org/abs/2406.12042).
    """
    height, width = image.shape[:2]
    short = min(height, width)
    resized = Image.fromarray(image).resize(
        (size * width // short, size * height // short), Image.Resampling.BILINEAR
    )
    left, top = (int(rng.integers(side - size + 1)) for side in resized.size)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@functools.cache  # captions are read picture by picture
def _stored(dataset: str, directory: str, split: str, num_images: int, image_size: int) -> Stored:
    found = {"cc3m": cc3m, "coco": coco}[dataset].load(directory, split)
    rows = slice(num_images or None)
    found = dataclasses.replace(found, records=found.records[rows], positions=found.positions[rows])
    texts = [captioned.row(found, i).captions for i in range(len(found.records))]
    content = checksums_of(dataset, directory)
    key = cache.fingerprint(dataset, content, split, found.positions, image_size)
    return Stored(Images(found, image_size), texts, key)
