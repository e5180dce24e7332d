"""Which rows of COCO and of CC3M the published results are of.

Positions count images in the order of their first annotation (COCO) or lines of the TSV (CC3M),
and the caption is the first of an image. NumPy's legacy generator is frozen, so a draw never
changes; it does depend on the number of positions, so a split of another size is refused.
"""

import csv
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from sdprune_jax import UserError

NUM_TRAIN2017 = 118_287  # images with captions
NUM_VAL2014 = 40_504
_BKSDM_URL = (
    "https://netspresso-research-code-release.s3.us-east-2.amazonaws.com/data/"
    "mscoco_val2014_30k/metadata.csv"
)


class Prompt(NamedTuple):
    """A caption, and the file name of the picture that it is of."""

    file_name: str
    caption: str


def sd2_pruning(num_positions: int) -> Int64[np.ndarray, " 10000"]:
    """10,000 images of COCO train2017, for prompts and as the reference.

    Known: seed 0 of the legacy generator, one `choice` without replacement among the images, in
    this order. Unknown: the noise, as the images were generated without a seed.

    Args:
        num_positions: images with captions in train2017.

    Raises:
        ValueError: if it is not 118,287.

    Source: the authors' code of Ramesh and Zhao 2024 (https://arxiv.org/abs/2411.15113).
    """
    _check_size("COCO train2017", num_positions, NUM_TRAIN2017)
    return _draw(num_positions, 10_000, seed=0)


def aptp_coco(num_positions: int) -> Int64[np.ndarray, " 30000"]:
    """30,000 images of COCO val2014, as the reference and for prompts.

    Known: seed 42 of the legacy generator, one `choice` without replacement among the images.
    Unknown: whether images were generated for these captions; no configuration of that is public.

    Args:
        num_positions: images with captions in val2014.

    Raises:
        ValueError: if it is not 40,504.

    Source: the authors' code of APTP (https://arxiv.org/abs/2406.12042).
    """
    _check_size("COCO val2014", num_positions, NUM_VAL2014)
    return _draw(num_positions, 30_000, seed=42)


def aptp_cc3m(positions: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " 14000"]:
    """14,000 rows of CC3M validation.

    Known: the paper uses all of the 15,840 whose pictures its authors could download, about 14,000.
    Unknown: which. Here they are the first 14,000 of the rows that there are.

    Args:
        positions: places of the dataset's rows, ascending.

    Raises:
        ValueError: if there are fewer.

    Source: APTP (https://arxiv.org/abs/2406.12042).
    """
    if len(positions) < 14_000:
        raise UserError(
            f"APTP's CC3M evaluation has 14,000 rows, and the dataset has {len(positions):,}:"
            " download more pictures, or use the captions alone"
        )
    return positions[:14_000]


def bksdm(path: str | os.PathLike[str]) -> list[Prompt]:
    """The 30,000 prompts of BK-SDM, all of COCO val2014, from the list that its authors publish.

    Known: the list. Unknown: how it was drawn, so nothing stands in for the file. The reference of
    its FID is all of val2014, not these images.

    Args:
        path: a `metadata.csv`: a heading, then file name and caption in each line.

    Raises:
        ValueError: if the file is missing or is not that list; names every kind of mistake.

    Source: the authors' code of BK-SDM (https://arxiv.org/abs/2305.15798).
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"BK-SDM needs its list {file}, and it is not there; it is {_BKSDM_URL}")
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))[1:]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no table ({error}); the list is {_BKSDM_URL}") from error
    legal = re.compile(r"COCO_val2014_\d{12}\.jpg", re.ASCII)
    bad = [n for n, row in enumerate(rows, 2) if len(row) < 2 or not legal.fullmatch(row[0])]
    empty = [n for n, row in enumerate(rows, 2) if len(row) > 1 and not row[1].strip()]
    num_names = len({row[0] for row in rows if row})
    problems = [
        f"{len(found):,} rows {what}, the first is row {found[0]}"
        for found, what in ((bad, "have no name of a picture of val2014"), (empty, "no caption"))
        if found
    ]
    if (len(rows), num_names) != (30_000, 30_000):
        problems.append(f"{len(rows):,} rows of {num_names:,} pictures, expected 30,000 of 30,000")
    if problems:
        raise UserError(f"{file} is not {_BKSDM_URL}: {'; '.join(problems)}")
    return [Prompt(row[0], row[1]) for row in rows]


def _draw(num_positions: int, num_samples: int, seed: int) -> Int64[np.ndarray, " n"]:
    return np.random.RandomState(seed).choice(num_positions, num_samples, replace=False)


def _check_size(what: str, num_positions: int, expected: int) -> None:
    if num_positions != expected:
        raise UserError(
            f"{what} has {expected:,} images with captions, this source has {num_positions:,}:"
            " the draw would be another; use the official annotations"
        )
