"""What a protocol asks for, and the real pictures that it compares with."""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from sdprune_jax import UserError
from sdprune_jax.data import cache, captioned, captions, cc3m, coco, emoji, sampling

SEED = 0  # draws the embedded captions, the same in every run


class Task(NamedTuple):
    """Prompts and reference pictures."""

    prompts: Sequence[str]
    concept: Int32[np.ndarray, " n"] | None  # for each prompt, where that is known
    style: Int32[np.ndarray, " n"] | None
    num_references: int
    reference: Callable[[int], UInt8[np.ndarray, "h w 3"]] | None  # reads picture i
    state: str  # changes if a prompt or a reference picture does, and not with `num_images`


def load(data: str, directory: str, num_images: int, has_references: bool) -> Task:
    """Opens the data of a protocol; no picture is read yet.

    Args:
        data: the field `data` of a `Protocol`.
        directory: where `sdprune prepare-data` wrote it; the embedded data needs none.
        num_images: prompts wanted, the first of those of the protocol.
        has_references: whether pictures are needed, not the captions alone.

    Raises:
        ValueError: if the data is not there, or not what the protocol draws from.
    """
    if data == "embedded":
        texts, concept, style = captions.drawn("train", num_images, SEED)
        pictures = emoji.load("train")
        state = cache.fingerprint(pictures.concept, pictures.style)
        return Task(
            texts, concept, style, len(pictures.images), lambda i: pictures.images[i], state
        )
    if not directory:
        raise UserError(
            f"the protocol draws from {data}: set config.evaluate.data to a directory that"
            " sdprune prepare-data wrote"
        )
    if data == "bksdm":
        texts = [row.caption for row in sampling.bksdm(pathlib.Path(directory) / "metadata.csv")]
        return Task(texts[:num_images], None, None, 0, None, cache.fingerprint(texts))
    kind, split = data.split("-")
    stored = {"coco": coco, "cc3m": cc3m}[kind].load(directory, split, has_images=has_references)
    if kind == "cc3m":
        positions = sampling.aptp_cc3m(stored.positions)
    else:
        rule = sampling.sd2_pruning if split == "train2017" else sampling.aptp_coco
        positions = rule(stored.num_positions)
    chosen = captioned.select(stored, positions)
    texts = captioned.captions(chosen)
    return Task(
        texts[:num_images],
        None,
        None,
        len(chosen.records),
        lambda i: captioned.image(chosen, i),
        cache.fingerprint(chosen.positions, texts, directory),
    )
