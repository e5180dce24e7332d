"""Makes a dataset of captions and pictures for evaluation, and shows what was skipped.

    sdprune prepare-data coco downloads/coco data --split val2014
    sdprune prepare-data coco downloads/coco data --split train2017 --captions-only
    sdprune prepare-data cc3m downloads/cc3m data --split validation

The official files have to be there: nothing is downloaded.
"""

import argparse
import importlib
import pathlib
from collections.abc import Sequence

from sdprune_jax import config
from sdprune_jax.data import sources


def main(arguments: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "sdprune prepare-data", description=__doc__, formatter_class=raw
    )
    parser.add_argument("dataset", choices=config.DATASETS)
    parser.add_argument("source", type=pathlib.Path, help="directory of the official files")
    parser.add_argument("data_dir", type=pathlib.Path, help="directory of datasets")
    parser.add_argument("--split", required=True, help="such as val2014 or validation")
    parser.add_argument("--captions-only", action="store_true", help="store no pictures")
    parser.add_argument(
        "--max-skipped",
        type=float,
        default=sources.MAX_SKIPPED,
        metavar="FRACTION",
        help="share of the source that may be unusable (%(default)s)",
    )
    args = parser.parse_args(arguments)
    dataset = importlib.import_module(f"sdprune_jax.data.{args.dataset}").prepare(
        args.source,
        args.data_dir,
        args.split,
        has_images=not args.captions_only,
        max_skipped=args.max_skipped,
    )
    print(f"{len(dataset.records):>9,}  rows of {dataset.num_positions:,}")
    print(sources.table(dataset.skips))
