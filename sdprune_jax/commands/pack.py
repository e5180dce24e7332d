r"""Packs the weights of a pruned model, so that a zero takes one bit, and unpacks them bit for bit.

    sdprune pack runs/quickstart/pruned packed
    sdprune pack --unpack packed models/pruned

Files of text_encoder/, unet/ and vae/ that get smaller are packed and called *.sparse.safetensors,
so that nothing loads them for whole weights: unpack them first. All else is copied. Every file is
compared with its dense weights when packed, and again when unpacked. One tensor at a time is in
memory. The model runs no faster for it.
"""

import argparse
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sdprune_jax import UserError
from sdprune_jax.commands import sparse_files
from sdprune_jax.files import model_directory

WHOLE = ".safetensors"
PACKED = ".sparse.safetensors"


class Sizes(NamedTuple):
    """Bytes of a file, before and after."""

    name: str
    before: int
    after: int


def main(arguments: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sdprune pack", description=__doc__, formatter_class=raw)
    parser.add_argument("source", type=pathlib.Path, help="a diffusers directory")
    parser.add_argument("target", type=pathlib.Path, help="must not exist")
    parser.add_argument("--unpack", action="store_true")
    args = parser.parse_args(arguments)
    print(table((unpack if args.unpack else pack)(args.source, args.target)))


def pack(source: pathlib.Path, target: pathlib.Path) -> list[Sizes]:
    """Copies a model, its weights packed where that makes them smaller.

    Raises:
        ValueError: if `target` exists, or `source` has no weights, or packed ones.
    """
    weights = _weights(source, WHOLE)
    if not weights:
        folders = ", ".join(f"{name}/" for name in model_directory.COMPONENTS)
        raise UserError(f"{source} has no *{WHOLE} in {folders}: give a diffusers directory")
    if any(path.name.endswith(PACKED) for path in weights):
        raise UserError(f"{source} is packed: unpack it with --unpack")
    return _copy(source, target, weights, _pack_file)


def unpack(source: pathlib.Path, target: pathlib.Path) -> list[Sizes]:
    """Copies a model, its weights as they were before `pack`.

    Raises:
        ValueError: if `target` exists, or `source` is not packed, or not intact.
    """
    weights = _weights(source, PACKED)
    if not weights:
        raise UserError(f"{source} has no *{PACKED}: there is nothing to unpack")
    return _copy(source, target, weights, _unpack_file)


def table(files: Sequence[Sizes]) -> str:
    """Lays out bytes before and after: of each file that changed, of the others, and of all."""
    changed = [row for row in files if row.before != row.after]
    others = [row for row in files if row.before == row.after]
    total = lambda name, part: Sizes(name, sum(x.before for x in part), sum(x.after for x in part))
    rows = [*changed, total(f"{len(others)} other files", others), total("all", files)]
    width = max(len(row.name) for row in rows)
    lines = [f"{'file':{width}} {'bytes before':>15} {'after':>15} {'ratio':>6}"]
    for name, before, after in rows:
        ratio = after / before if before else 1.0
        lines.append(f"{name:{width}} {before:15,} {after:15,} {ratio:6.3f}")
    return "\n".join(lines)


def _weights(source: pathlib.Path, ending: str) -> list[pathlib.Path]:
    folders = [source / component for component in model_directory.COMPONENTS]
    return [path for folder in folders for path in sorted(folder.glob(f"*{ending}"))]


def _pack_file(path: pathlib.Path, new: pathlib.Path) -> pathlib.Path:
    made = new.with_name(new.name.removesuffix(WHOLE) + PACKED)
    return made if sparse_files.pack(path, made) else shutil.copyfile(path, new)


def _unpack_file(path: pathlib.Path, new: pathlib.Path) -> pathlib.Path:
    made = new.with_name(new.name.removesuffix(PACKED) + WHOLE)
    sparse_files.unpack(path, made)
    return made


def _copy(
    source: pathlib.Path,
    target: pathlib.Path,
    weights: Sequence[pathlib.Path],
    convert: Callable[[pathlib.Path, pathlib.Path], pathlib.Path],
) -> list[Sizes]:
    """Copies all files, `weights` by `convert`, and returns their sizes."""
    if target.exists():
        raise UserError(f"{target} exists: choose another name")
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{target} is inside {source}: choose a place outside")
    sizes = []

    def copy(old: str, new: str) -> None:
        path, made = pathlib.Path(old), pathlib.Path(new)
        made = convert(path, made) if path in weights else shutil.copyfile(path, made)
        name = path.relative_to(source).as_posix()
        sizes.append(Sizes(name, path.stat().st_size, made.stat().st_size))

    target.parent.mkdir(parents=True, exist_ok=True)
    with model_directory.replacing(target) as new:
        shutil.copytree(source, new, copy_function=copy)
    return sorted(sizes)
