"""What every stage does when its output was damaged, or belongs to another model."""

import contextlib
import importlib
import os
import pathlib

from sdprune_jax import UserError, artefacts, config, pipeline
from sdprune_jax.evaluate import images
from sdprune_jax.slicing import criteria
from sdprune_jax.sweep import trial
from sdprune_jax.training import loop

_WORK = (  # what a stage would begin with if it made its output again
    (artefacts, "writing"),
    (loop, "fit"),
    (criteria, "slice_unet"),
    (trial, "open_bench"),
    (images, "complete"),
    (pipeline, "render"),
)


class _MadeAgainError(Exception):
    pass


def _again(*_, **__):
    raise _MadeAgainError


def check(run: config.Run, mesh, monkeypatch) -> None:
    """Damages every output of a finished run in every way, and puts it right again.

    Whatever happened to it, the same command must not call the output complete: the stage makes it
    again, or stops with a message that names the file; and nothing foreign is deleted.
    """
    with monkeypatch.context() as patch:
        for owner, name in _WORK:
            patch.setattr(owner, name, _again)
        stages = {
            name: importlib.import_module(module)
            for name, module in config.stages_of(run).items()
            if name != "report"  # it is written anew each time
        }
        for name, stage in stages.items():
            output = artefacts.output_of(name, run.workdir)
            files = [*artefacts._values(output.record)["files"]]
            happened = _what_happens(stage, run, mesh)
            assert happened == "complete", (name, happened)
            for file in {*files[:1], *files[-1:], *sorted(files)[len(files) // 2 :][:1]}:
                path = output.directory / file
                with _flipped(path):
                    _expect(name, _what_happens(stage, run, mesh), path)
                with _gone(path):
                    _expect(name, _what_happens(stage, run, mesh), path)
            with _flipped(output.record, place=-3):
                _expect(name, _what_happens(stage, run, mesh), output.record)
            foreign = output.directory / "notes of mine.txt"
            foreign.parent.mkdir(exist_ok=True)
            foreign.write_text("mine")
            assert foreign.name in _what_happens(stage, run, mesh), name
            assert foreign.read_text() == "mine", name
            foreign.unlink()
        model = pathlib.Path(run.model) / "unet" / "diffusion_pytorch_model.safetensors"
        if model.is_file():
            with _flipped(model, place=-1):
                for name, stage in stages.items():
                    happened = _what_happens(stage, run, mesh)
                    is_told = "another model" in happened or f"model.unet/{model.name}" in happened
                    assert happened == "made again" or is_told, (name, happened)
        for name in stages.keys() - {"sweep"}:  # a sweep of another model begins anew at once
            assert _what_happens(stages[name], run, mesh) == "complete", name


def _what_happens(stage, run: config.Run, mesh) -> str:
    try:
        stage.run(run, mesh)
    except _MadeAgainError:
        return "made again"
    except UserError as error:
        return str(error)
    return "complete"


def _expect(stage: str, happened: str, path: pathlib.Path) -> None:
    assert happened == "made again" or path.name in happened, (stage, happened, path)


@contextlib.contextmanager
def _flipped(path: pathlib.Path, place: int = -1):
    """Another bit at a place of a file, its size and time of modification the same."""
    before, times = path.read_bytes(), path.stat()
    data = bytearray(before)
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    yield
    path.write_bytes(before)


@contextlib.contextmanager
def _gone(path: pathlib.Path):
    before = path.read_bytes()
    path.unlink()
    yield
    path.write_bytes(before)
