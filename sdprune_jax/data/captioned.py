"""Captions and pictures kept as ArrayRecord: what the datasets of COCO and of CC3M share.

A row is one picture of the source with its captions. Papers draw rows by their position in the
source, so a row keeps its position when rows before it are skipped.
"""

import dataclasses
import io
import os
import pathlib
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int64, UInt8

from sdprune_jax import UserError
from sdprune_jax.data import images, sources

SPLIT = "rows"  # the only split that tensorflow-datasets sees: those of COCO come one at a time
VERSION = tfds.core.Version("1.0.0")
_CHUNK = 64  # rows whose pictures are in memory at once


class Row(NamedTuple):
    """One picture of a source."""

    position: int  # in the source, skipped rows counted
    image_id: int
    file_name: str  # in the source; empty if there is no picture
    captions: tuple[str, ...]  # as they are in the source, at least one; papers use the first


class Source(NamedTuple):
    """What a source holds, before its pictures are opened."""

    rows: Sequence[Row]
    num_positions: int
    skips: sources.Skips
    read: sources.Read | None  # None: captions alone are wanted
    state: str  # a hash of its files


@dataclasses.dataclass(frozen=True)
class Captioned:
    """Rows of a prepared dataset; captions and pictures are read when they are asked for."""

    stored: Any  # random access to the records of all rows
    records: Int64[np.ndarray, " n"]  # of `stored`, in the order of use
    positions: Int64[np.ndarray, " n"]  # of each row in its source
    num_positions: int  # of the source, skipped rows counted
    skips: sources.Skips


def configs(splits: Sequence[str]) -> list[tfds.core.BuilderConfig]:
    """One for each split with its pictures, and one without."""
    return [tfds.core.BuilderConfig(name=_config(s, has)) for s in splits for has in (True, False)]


def info(builder: tfds.core.DatasetBuilder, source: Source, text: str) -> tfds.core.DatasetInfo:
    """What is stored of a row; a picture is stored as the file that it was."""
    picture = {"image": tfds.features.Image(shape=(None, None, 3))} if source.read else {}
    features = {
        "position": tfds.features.Scalar(np.int64),
        "image_id": tfds.features.Scalar(np.int64),
        "file_name": tfds.features.Text(),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        **picture,
    }
    return tfds.core.DatasetInfo(
        builder=builder,
        description=text,
        features=tfds.features.FeaturesDict(features),
        metadata=tfds.core.MetadataDict(),
        disable_shuffling=True,  # in the order of the source
    )


def examples(
    builder: tfds.core.DatasetBuilder, source: Source, max_skipped: float
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (key, example), and leaves the counts in the metadata of the builder.

    Raises:
        ValueError: with the table, if more than `max_skipped` is skipped or nothing is left.
    """
    skips, positions = source.skips, []
    num_entries = len(source.rows) + sources.num_skipped(skips)
    sources.check_share(skips, num_entries, max_skipped)

    def read(row: Row) -> tuple[bytes, str | None]:
        return sources.picture(source.read, row.file_name) if source.read else (b"", None)

    with futures.ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        for first in range(0, len(source.rows), _CHUNK):
            chunk = source.rows[first : first + _CHUNK]
            for row, (picture, problem) in zip(chunk, pool.map(read, chunk), strict=True):
                if problem:
                    sources.note(skips, problem, row.file_name)
                    continue
                positions.append(row.position)
                image = {"image": io.BytesIO(picture)} if source.read else {}  # no array: needs TF
                yield row.position, row._asdict() | {"captions": list(row.captions)} | image
            sources.check_share(skips, num_entries, max_skipped)
    if not positions:
        raise UserError(f"no row is left of the source\n{sources.table(skips)}")
    missing = np.setdiff1d(np.arange(source.num_positions), positions)
    builder.info.metadata.update(
        skips=skips,
        num_entries=num_entries,
        num_positions=source.num_positions,
        missing=missing.tolist(),
        state=source.state,
    )


def prepare(
    builder: type[tfds.core.GeneratorBasedBuilder],
    source: Source,
    data_dir: str | os.PathLike[str],
    split: str,
    max_skipped: float,
) -> Captioned:
    """Writes a dataset below `data_dir`, once; an attempt that fails or is stopped leaves none.

    Raises:
        ValueError: if the dataset exists and was made from another source, or as `examples`.
    """
    path = _path(builder, data_dir, split, source.read is not None)
    if not path.exists():
        builder(
            source=source,
            max_skipped=max_skipped,
            config=_config(split, source.read is not None),
            data_dir=data_dir,
            file_format="array_record",
        ).download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    dataset, metadata = _open(path)
    if metadata["state"] != source.state:
        raise UserError(f"{path} was made from other files: delete it, or choose another data_dir")
    sources.check_share(dataset.skips, metadata["num_entries"], max_skipped)
    return dataset


def load(
    builder: type[tfds.core.GeneratorBasedBuilder],
    data_dir: str | os.PathLike[str],
    split: str,
    has_images: bool,
) -> Captioned:
    """Opens what `prepare` wrote, by random access and without the source.

    Raises:
        ValueError: if it is not there, or is damaged.
    """
    path = _path(builder, data_dir, split, has_images)
    if not path.exists():
        other = _path(builder, data_dir, split, not has_images)
        hint = f"; {other} is there, with{' no' if has_images else ''} pictures"
        raise UserError(
            f"there is no dataset {path}: make it with sdprune prepare-data"
            f"{hint if other.exists() else ''}"
        )
    return _open(path)[0]


def select(
    dataset: Captioned,
    positions: Int64[np.ndarray, " drawn"],
    max_skipped: float = sources.MAX_SKIPPED,
) -> Captioned:
    """The rows at `positions` of the source, in that order, less those that were skipped.

    Raises:
        ValueError: if more than the fraction `max_skipped` of them was skipped.
    """
    order = np.argsort(dataset.positions)
    at = np.searchsorted(dataset.positions, positions, sorter=order)
    chosen = order[np.minimum(at, len(order) - 1)]
    is_there = dataset.positions[chosen] == positions
    if np.mean(~is_there) > max_skipped:
        raise UserError(
            f"{np.sum(~is_there):,} of the {len(positions):,} rows to use are not in the dataset,"
            f" more than max_skipped={max_skipped:.1%}\n{sources.table(dataset.skips)}"
        )
    chosen = chosen[is_there]
    return dataclasses.replace(
        dataset, records=dataset.records[chosen], positions=dataset.positions[chosen]
    )


def row(dataset: Captioned, i: int) -> Row:
    """Reads row `i`, without its picture."""
    return _row(dataset.stored[int(dataset.records[i])])


def captions(dataset: Captioned) -> list[str]:
    """Reads the first caption of every row."""
    chunks = range(0, len(dataset.records), _CHUNK)
    read = lambda first: dataset.stored.__getitems__(dataset.records[first:][:_CHUNK].tolist())
    return [_row(record).captions[0] for first in chunks for record in read(first)]


def image(dataset: Captioned, i: int) -> UInt8[np.ndarray, "h w 3"]:
    """Reads the picture of row `i`.

    Raises:
        ValueError: if the dataset has captions only.
    """
    record = dataset.stored[int(dataset.records[i])]
    if "image" not in record:
        raise UserError("the dataset has no pictures: prepare it with them")
    return images.decode(record["image"], _row(record).file_name)


def _config(split: str, has_images: bool) -> str:
    return split if has_images else f"{split}_captions"


def _path(
    builder: type[tfds.core.GeneratorBasedBuilder],
    data_dir: str | os.PathLike[str],
    split: str,
    has_images: bool,
) -> pathlib.Path:
    return pathlib.Path(data_dir, builder.name, _config(split, has_images), str(VERSION))


def _open(path: pathlib.Path) -> tuple[Captioned, dict[str, Any]]:
    builder: Any = tfds.builder_from_directory(path)  # its stubs misread bound methods
    decoders = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
    stored = builder.as_data_source(SPLIT, decoders=decoders)
    metadata = builder.info.metadata
    num_positions = metadata["num_positions"]
    positions = np.setdiff1d(np.arange(num_positions), np.array(metadata["missing"], np.int64))
    if len(stored) != len(positions):
        raise UserError(
            f"{path} is damaged: {len(stored):,} rows, expected {len(positions):,};"
            " delete it and prepare it again"
        )
    records = np.arange(len(positions))
    return Captioned(stored, records, positions, num_positions, metadata["skips"]), metadata


def _row(record: dict[str, Any]) -> Row:
    texts = tuple(text.decode() for text in record["captions"])
    return Row(record["position"], record["image_id"], record["file_name"].decode(), texts)
