"""Pictures and prompts that the router and the experts learn from."""

import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32, UInt8
from PIL import Image

from sdprune_jax import UserError, sharding
from sdprune_jax.data import cache, captioned, captions, emoji
from sdprune_jax.files import checksums


@dataclasses.dataclass(frozen=True)
class PictureSource:
    """Which pictures and prompts the router and the experts learn from."""

    dataset: str = "embedded"  # "embedded", "cc3m" or "coco"
    directory: str = ""  # what `sdprune prepare-data` wrote; the embedded pictures need none
    image_size: int = 256  # pixels of a side; embedded pictures always have 64
    num_images: int = 0  # pictures of each split that are used, the first ones; 0 uses all
    captions_per_image: int = 4  # prompts of a training picture; those of other splits have one
    flips: bool = False  # train on mirrored pictures too
    # What embeds prompts for the router: `text_encoder`, the model's own, or a directory of
    # sentence-transformers.
    encoder: str = "text_encoder"

    @property
    def side(self) -> int:
        """Pixels of a side of the pictures that are trained on."""
        return emoji.SIZE if self.dataset == "embedded" else self.image_size


class Prompts(NamedTuple):
    """The prompts of a split; those of one picture follow one another."""

    texts: list[str]
    # Row of `emoji.concepts()`; None if the pictures are not the embedded ones.
    concept: Int32[np.ndarray, " rows"] | None = None
    # Row of `emoji.styles()`; None if the pictures are not the embedded ones.
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
    """Pictures of a dataset that is not embedded in the package."""

    images: Images  # the pictures, which are indexed by rows as an array is
    captions: Sequence[tuple[str, ...]]  # the captions of every picture, in the dataset's order
    state: str  # changes if the pictures do


@functools.cache  # every stage reads them: decoding takes seconds, and all of them 140 MB
def embedded(split: str) -> emoji.Pairs:
    return emoji.load(split)


def load(source: PictureSource, split: str) -> emoji.Pairs | Stored:
    """Loads the pictures of a split.

    Raises:
        UserError: if they are stored, and not where the source says.
    """
    if source.dataset == "embedded":
        return emoji.Pairs(*(x[: source.num_images or None] for x in embedded(split)))
    if not source.directory:
        raise UserError(
            f"config.router.data.dataset is {source.dataset}: set config.router.data.directory to"
            " what sdprune prepare-data wrote"
        )
    return _stored(source, _module(source.dataset).TRAINED_ON[split])


def prompts(
    pictures: emoji.Pairs | Stored, split: str, seed: int, captions_per_image: int
) -> Prompts:
    """Returns the first caption of every picture and, for `train`, more of them.

    Further captions of an embedded picture are drawn. A stored picture with too few captions
    repeats those that it has.
    """
    count = captions_per_image if split == "train" else 1
    if isinstance(pictures, Stored):
        return Prompts([own[i % len(own)] for own in pictures.captions for i in range(count)])
    rng = np.random.default_rng([seed, emoji.SPLITS.index(split)])
    texts = []
    for c, s in zip(pictures.concept, pictures.style, strict=True):
        concept, style = emoji.concepts()[c], emoji.styles()[s].word
        texts.append(captions.caption(concept, style))
        texts += [captions.augmented(rng, concept, style) for _ in range(count - 1)]
    return Prompts(texts, np.repeat(pictures.concept, count), np.repeat(pictures.style, count))


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


def state(pictures: emoji.Pairs | Stored) -> Any:
    """Returns what a fingerprint of the pictures is made of."""
    return pictures.state if isinstance(pictures, Stored) else pictures.images


def square(
    image: UInt8[np.ndarray, "h w 3"], size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """Cuts a random square out of a picture whose shorter side is resized to it, bilinearly.

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
def _stored(source: PictureSource, split: str) -> Stored:
    dataset = _module(source.dataset).load(source.directory, split)
    used = slice(source.num_images or None)
    records, positions = dataset.records[used], dataset.positions[used]
    dataset = dataclasses.replace(dataset, records=records, positions=positions)
    texts = [captioned.row(dataset, i).captions for i in range(len(records))]
    content = checksums_of(source.dataset, source.directory)
    key = cache.fingerprint(source.dataset, content, split, positions, source.image_size)
    return Stored(Images(dataset, source.image_size), texts, key)


def _module(dataset: str) -> Any:
    return importlib.import_module(f"sdprune_jax.data.{dataset}")
