"""The one protocol of every output of every stage: what it is made from, whether it is whole.

An output is a directory and a record. The record is a JSON file that is written last: it says what
the output was made from, and has the checksum of every file of the output and of itself. An output
is complete if its record is there, says what the stage would make it from now, and every file that
it lists has its checksum. A record that is missing or older than its files is all that a killed run
can leave, so this needs neither locks nor directories that are renamed at once.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
from absl import logging

from sdprune_jax import UserError, sharding
from sdprune_jax.files import checksums, json_files, model_directory, typed_json

T = TypeVar("T")
MadeFrom = Mapping[str, Any]  # plain values, by name, of all that an output depends on

_MARK = ".made_from.json"  # in the directory of an output that is being made


@dataclasses.dataclass(frozen=True)
class Output:
    """Where a stage writes.

    Attributes:
        stage: its section of the config.
        directory: holds its files.
        record: the JSON file, in that directory or beside it.
        working: names in the directory that are no part of the output: checkpoints and caches.
    """

    stage: str
    directory: pathlib.Path
    record: pathlib.Path
    working: tuple[str, ...] = ()

    def again(self) -> str:
        """Says how to make the output again."""
        return f"run stage {self.stage} again (--config.{self.stage}=build)"


class Partial:
    """An output that is being made.

    Attributes:
        directory: where to write its files.
        record: to be set to the dataclass that becomes its record.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.record: Any = None


def output_of(stage: str, workdir: str | os.PathLike[str]) -> Output:
    """Returns where a stage writes in the directory of a run."""
    work = pathlib.Path(workdir)
    directory, record, *working = _OUTPUTS[stage]
    return Output(stage, work / directory, work / record, tuple(working))


_OUTPUTS = {  # stage: directory, record, and what in the directory is no part of the output
    "pretrain": ("model", "pretrain.json"),
    "prune": ("pruned", "prune.json"),
    "router": ("router", "router/router.json", "training", "cache"),
    "assign": ("assign", "assign/assign.json"),
    "materialise": ("experts", "experts/experts.json"),
    "slice": ("experts", "experts/experts.json"),
    "finetune": ("finetuned", "finetuned/finetune.json"),
    "generate": ("images", "images/generate.json"),
    "evaluate": ("evaluate", "evaluate.json", "cache", "pictures"),
    "sweep": ("sweep", "sweep.json", "cache", "drawing"),
}


def is_complete(output: Output, made_from: MadeFrom) -> bool:
    """Returns whether an output is there, made from the same inputs, and undamaged.

    Every process calls it; the first one decides. What is not complete is named in the log.

    Raises:
        UserError: naming files in the output's directory that no record lists.
    """
    return sharding.shared(lambda: _is_complete(output, _plain(made_from)))


def _is_complete(output: Output, made_from: dict[str, Any]) -> bool:
    if not output.record.exists():
        refuse_foreign(output)
        return False
    values = _values(output.record)
    refuse_foreign(output)
    if values.get("is_partial"):
        logging.warning("%s was begun and not finished: it is made again", output.directory)
    elif changes := differences(values["made_from"], made_from):
        what = json_files.listing(changes, limit=5)
        logging.info("%s is made again, from other inputs:\n  %s", output.directory, what)
    elif damage := _damage(output, values["files"]):
        logging.warning("%s is made again: %s", output.directory, "; ".join(damage))
    else:
        logging.info("%s is complete: made from the same inputs", output.directory)
        return True
    return False


def require(output: Output, kind: type[T], model: Mapping[str, str] | None = None) -> T:
    """Returns the record, a dataclass `kind`, of an output that a stage needs; see `verify`."""
    verify(output, model)
    return read(output.record, kind)


def verify(output: Output, model: Mapping[str, str] | None = None) -> None:
    """Checks an output that a stage needs.

    Args:
        output: what a stage before has written.
        model: state of the model of the run; None does not compare it.

    Raises:
        UserError: naming what is missing or damaged, or the other model that it was made from.
    """
    sharding.shared(lambda: _verify(output, model))


def _verify(output: Output, model: Mapping[str, str] | None) -> None:
    if not output.record.is_file():
        raise UserError(f"{output.record} is missing: {output.again()}")
    values = _values(output.record)
    if values.get("is_partial"):
        raise UserError(f"{output.directory} was begun and not finished: {output.again()}")
    if damage := _damage(output, values["files"]):
        raise UserError(f"{'; '.join(damage)}: {output.again()}")
    before = values["made_from"].get("model")
    if model is not None and before is not None and before != model:
        files = [line.split(" ")[0] for line in differences(before, model)]
        raise UserError(
            f"{output.directory} was made from another model than config.model, which differs in"
            f" {', '.join(files[:5])}: {output.again()}, or choose another workdir"
        )


def read(record: pathlib.Path, kind: type[T]) -> T:
    """Reads a record.

    Raises:
        UserError: if it is damaged, naming every value that is missing or of another type.
    """
    return typed_json.from_json(kind, _values(record), record.name)


def identity(output: Output) -> str:
    """Returns what changes if an output does: a hash of its inputs and files."""
    values = sharding.shared(lambda: _values(output.record))
    return _hash([values["made_from"], values["files"]])


def inputs_of(output: Output) -> dict[str, Any]:
    """Returns what an output was made from, as its record says."""
    return sharding.shared(lambda: _values(output.record)["made_from"])


@contextlib.contextmanager
def writing(output: Output, made_from: MadeFrom, *, resume: bool = False) -> Iterator[Partial]:
    """Makes an output, which takes the place of an earlier one when its body ends.

    Every process enters; only the first one may write into the directory that it yields. Of an
    earlier output, only files that its record lists are deleted.

    Args:
        output: what to write.
        made_from: all that it depends on.
        resume: keep what a killed run from the same inputs has left in the directory.

    Raises:
        UserError: as `is_complete`.
    """
    inputs = _plain(made_from)
    partial = Partial(output.directory.with_name(f"{output.directory.name}.partial"))
    sharding.shared(lambda: _begin(output, partial.directory, inputs, resume))
    try:
        yield partial
    except BaseException:
        if jax.process_index() == 0 and not resume:
            shutil.rmtree(partial.directory, ignore_errors=True)
        raise
    sharding.wait_for_all(f"{output.directory.name} is made")
    sharding.shared(lambda: _commit(output, partial, inputs))


def begun(output: Output, made_from: MadeFrom) -> tuple[dict[str, Any], list[str]]:
    """Returns what an output that grows in place has so far: its record, and its damaged files.

    What was made from other inputs is deleted, as far as its record lists it.

    Raises:
        UserError: naming files in the output's directory that no record lists.
    """
    return sharding.shared(lambda: _begun(output, _plain(made_from)))


def _begun(output: Output, made_from: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    refuse_foreign(output)
    if not output.record.exists():
        return {}, []
    values = _values(output.record)
    changed = [
        name
        for name, checksum in values["files"].items()
        if not (path := output.directory / name).is_file() or checksums.sha256(path) != checksum
    ]
    if not differences(values["made_from"], made_from):
        return values, changed
    for name in values["files"]:
        (output.directory / name).unlink(missing_ok=True)
    output.record.unlink()
    return {}, []


def seal(output: Output, made_from: MadeFrom, record: Any) -> None:
    """Writes the record of an output that grows in place; its files are what is there.

    Every process calls it; the first one writes.
    """

    def write() -> None:
        files = {name: checksums.sha256(output.directory / name) for name in _names(output)}
        values = {"made_from": _plain(made_from), "files": files}
        _write(output.record, values | typed_json.to_json(record))

    sharding.shared(write)


def model_state(directory: pathlib.Path, variant: str = "") -> dict[str, str]:
    """Returns the checksum of every file of a diffusers directory that is read, by its name."""
    return sharding.shared(
        lambda: {
            str(path.relative_to(directory)): checksums.sha256(path)
            for path in model_directory.files_of(directory, variant or None)
        }
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], key: str = "") -> list[str]:
    """Returns a line for every value that is not the same, such as "seed was 0, is 1"."""
    found = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{key}{name}.")
        elif old != new:
            found.append(f"{key}{name} was {_short(old)}, is {_short(new)}")
    return found


def refuse_foreign(output: Output) -> None:
    """Refuses to touch files that no record lists.

    Raises:
        UserError: naming them.
    """
    known = set(_values(output.record)["files"]) if output.record.exists() else set()
    foreign = [name for name in _names(output) if name not in known]
    if foreign:
        raise UserError(
            f"{output.directory} has files that stage {output.stage} did not write, or whose record"
            f" is gone:\n  {json_files.listing(foreign)}\nmove them away, or choose another workdir"
        )


def _begin(
    output: Output, directory: pathlib.Path, made_from: dict[str, Any], resume: bool
) -> None:
    refuse_foreign(output)
    mark = directory / _MARK
    if directory.exists():
        if not mark.is_file() and any(directory.iterdir()):
            raise UserError(f"{directory} is in the way, and no stage made it: move it away")
        is_same = mark.is_file() and json_files.read_json(mark) == made_from
        if not (resume and is_same):
            shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    json_files.write_json(mark, made_from)


def _commit(output: Output, partial: Partial, made_from: dict[str, Any]) -> None:
    """Puts the files in their place one by one; the record before and after says so."""
    assert partial.record is not None, f"stage {output.stage} set no record"
    old = _values(output.record)["files"] if output.record.exists() else {}
    new = {name: checksums.sha256(path) for name, path in _files(partial.directory)}
    _write(output.record, {"is_partial": True, "made_from": {}, "files": old | new})
    for name in new:
        target = output.directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        checksums.move(partial.directory / name, target)
    for name in old.keys() - new.keys():
        (output.directory / name).unlink(missing_ok=True)
    for folder in sorted({path.parent for path in map(pathlib.PurePath, old)}, reverse=True):
        with contextlib.suppress(OSError):  # it is in use, or gone
            (output.directory / folder).rmdir()
    for folder in {path.parent for path in map(output.directory.joinpath, new)}:
        _sync(folder)
    _write(
        output.record, {"made_from": made_from, "files": new} | typed_json.to_json(partial.record)
    )
    shutil.rmtree(partial.directory)


def _write(record: pathlib.Path, values: dict[str, Any]) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    json_files.write_json(record, values | {"checksum": _hash(values)})
    _sync(record)
    _sync(record.parent)


def _values(record: pathlib.Path) -> dict[str, Any]:
    """Reads a record, and refuses one that is damaged."""
    values = json_files.read_json(record)
    checksum = values.pop("checksum", None)
    if checksum != _hash(values):
        raise UserError(
            f"{record} is damaged, or was not written by this version, so that nobody can tell"
            " which files are its own: move it and its output away, or choose another workdir"
        )
    return values


def _damage(output: Output, files: Mapping[str, str]) -> list[str]:
    """Says which files are not as they were written."""
    found = []
    for name, checksum in files.items():
        path = output.directory / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif checksums.sha256(path) != checksum:
            found.append(f"{path} has changed since it was written")
    return found


def _names(output: Output) -> list[str]:
    """The files in the directory of an output, but for its record and what it works with."""
    if not output.directory.is_dir():
        return []
    return [
        name
        for name, path in _files(output.directory)
        if path != output.record and pathlib.PurePath(name).parts[0] not in output.working
    ]


def _files(directory: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    """All files below a directory, and their names from there."""
    return [
        (path.relative_to(directory).as_posix(), path)
        for path in sorted(directory.rglob("*"))
        if not path.is_dir() and path.name != _MARK and not path.name.startswith(".nfs")
    ]


def _plain(values: Any) -> Any:
    """Returns what JSON makes of values, so that they compare with what was read."""
    return json.loads(json.dumps(typed_json.to_json(values)))


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}…"


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):  # directories of some file systems cannot be synced
        os.fsync(descriptor)
    os.close(descriptor)
