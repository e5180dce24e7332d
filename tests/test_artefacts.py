"""The protocol of outputs: complete, damaged, foreign, interrupted, of another model."""

import dataclasses
import os
import time

import pytest

from sdprune_jax import artefacts
from sdprune_jax.files import checksums

MADE_FROM = {"section": {"sparsity": 0.5}, "seed": 0, "model": {"unet/config.json": "1" * 64}}


@dataclasses.dataclass(frozen=True)
class Record:
    zeros: int
    shares: dict[str, float]
    remark: str | None = None


@pytest.fixture
def output(tmp_path):
    return artefacts.Output("prune", tmp_path / "pruned", tmp_path / "prune.json", ("cache",))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def _write(output, made_from=None, texts=(("unet/a.txt", "first"), ("b.txt", "second"))):
    with artefacts.writing(output, made_from or MADE_FROM) as partial:
        for name, text in texts:
            path = partial.directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        partial.record = Record(3, {"unet": 1})


def test_an_output_is_complete_only_when_made_from_the_same(output):
    assert not artefacts.is_complete(output, MADE_FROM)
    _write(output)
    assert artefacts.is_complete(output, MADE_FROM)
    assert artefacts.read(output.record, Record) == Record(3, {"unet": 1.0})
    assert "remark" not in output.record.read_text()
    assert not artefacts.is_complete(output, MADE_FROM | {"seed": 1})
    here = {path.name for path in output.directory.parent.iterdir()} - {"home"}
    assert here == {"prune.json", "pruned"}


def test_what_differs_is_said_by_name():
    other = {"section": {"sparsity": 0.4}, "seed": 0, "model": {}}
    assert artefacts.differences(MADE_FROM, other) == [
        "section.sparsity was 0.5, is 0.4",
        f'model.unet/config.json was "{"1" * 39}…, is null',
    ]


@pytest.mark.parametrize("name", ["unet/a.txt", "b.txt"])
def test_a_flipped_byte_or_a_lost_file_is_never_complete(output, name, caplog):
    for harm in (lambda path: path.write_text("F" + path.read_text()[1:]), os.unlink):
        _write(output)
        path, times = output.directory / name, (output.directory / name).stat()
        harm(path)
        if path.exists():  # the same size and time of modification
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert not artefacts.is_complete(output, MADE_FROM)
        assert str(path) in caplog.text
        with pytest.raises(ValueError, match=f"{name}.*run stage prune again"):
            artefacts.require(output, Record)
    _write(output)
    assert artefacts.is_complete(output, MADE_FROM)


def test_a_damaged_record_is_named_and_nothing_is_deleted(output):
    _write(output)
    output.record.write_text(output.record.read_text().replace('"zeros": 3', '"zeros": 4'))
    for act in (
        lambda: artefacts.is_complete(output, MADE_FROM),
        lambda: artefacts.read(output.record, Record),
        lambda: _write(output),
    ):
        with pytest.raises(ValueError, match=r"prune\.json is damaged"):
            act()
    assert (output.directory / "b.txt").exists()


def test_a_foreign_file_stops_the_stage_and_stays(output):
    _write(output)
    foreign = output.directory / "unet" / "notes.txt"
    foreign.write_text("mine")
    (output.directory / "cache").mkdir()
    (output.directory / "cache" / "x").touch()  # what the stage works with is no part of it
    for act in (lambda: artefacts.is_complete(output, MADE_FROM), lambda: _write(output)):
        with pytest.raises(ValueError, match=r"stage prune did not write.*\n.*unet/notes\.txt"):
            act()
    assert foreign.read_text() == "mine"
    foreign.unlink()
    assert artefacts.is_complete(output, MADE_FROM)


def test_a_directory_without_a_record_is_left_alone(output):
    output.directory.mkdir()
    (output.directory / "b.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"b\.txt"):
        _write(output)
    assert (output.directory / "b.txt").read_text() == "mine"
    partial = output.directory.with_name("pruned.partial")
    output.directory.rename(partial)
    with pytest.raises(ValueError, match="in the way"):
        _write(output)
    assert (partial / "b.txt").read_text() == "mine"


def test_files_of_the_output_before_are_gone_and_no_others(output):
    _write(output, MADE_FROM | {"seed": 1}, [("vae/old.txt", "old"), ("b.txt", "old")])
    _write(output)
    assert sorted(p.name for p in output.directory.rglob("*")) == ["a.txt", "b.txt", "unet"]
    assert artefacts.is_complete(output, MADE_FROM)


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_killed_between_two_files_it_is_made_again(output, moves, monkeypatch):
    _write(output, MADE_FROM | {"seed": 1}, [("unet/a.txt", "old"), ("c.txt", "old")])
    left, move = [moves], checksums.move

    def dies(source, target):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        move(source, target)

    monkeypatch.setattr(checksums, "move", dies)
    if moves < 2:
        with pytest.raises(KeyboardInterrupt):
            _write(output)
        assert not artefacts.is_complete(output, MADE_FROM)
        with pytest.raises(ValueError, match="begun and not finished"):
            artefacts.require(output, Record)
    monkeypatch.setattr(checksums, "move", move)
    _write(output)
    assert artefacts.is_complete(output, MADE_FROM)
    assert not (output.directory / "c.txt").exists()


def test_what_a_killed_run_left_is_kept_only_for_the_same_inputs(output):
    seen = []

    def begin(made_from, resume):
        with artefacts.writing(output, made_from, resume=resume) as partial:
            seen.append([path.name for path in partial.directory.glob("*.txt")])
            (partial.directory / "begun.txt").touch()
            raise KeyboardInterrupt

    for made_from, resume in ((MADE_FROM, True), (MADE_FROM, True), ({"seed": 2}, True)):
        with pytest.raises(KeyboardInterrupt):
            begin(made_from, resume)
    assert seen == [[], ["begun.txt"], []]


def test_an_output_of_another_model_is_refused_by_name(output):
    _write(output)
    assert artefacts.require(output, Record, MADE_FROM["model"]).zeros == 3
    with pytest.raises(ValueError, match=r"another model .* differs in unet/config\.json"):
        artefacts.require(output, Record, {"unet/config.json": "2" * 64})


def test_records_are_held_against_their_annotations(output):
    _write(output)

    @dataclasses.dataclass(frozen=True)
    class Other:
        zeros: str
        shares: dict[str, bool]
        lost: int

    with pytest.raises(
        ValueError, match=r"(?s)zeros is 3, expected text.*unet.*true.*lost is miss"
    ):
        artefacts.read(output.record, Other)


def test_an_untouched_file_is_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    time.sleep(0.15)
    first = checksums.sha256(path)
    assert first == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.setattr(checksums.hashlib, "sha256", _only_names(checksums.hashlib.sha256))
    assert checksums.sha256(path) == first
    path.write_bytes(b"abd")
    with pytest.raises(AssertionError, match="hashed"):
        checksums.sha256(path)


def _only_names(sha256):
    def hash_name(data=None):
        assert data is not None, "a file is hashed"
        return sha256(data)

    return hash_name


def test_a_file_is_hashed_while_it_is_written(tmp_path):
    path = tmp_path / "weights"
    with checksums.writing(path) as file:
        file.write(b"a")
        file.write(b"bc")
    assert checksums._read(path, checksums._signature(path)) == checksums.sha256(path)
    path.rename(tmp_path / "elsewhere")
    assert checksums.sha256(tmp_path / "elsewhere").startswith("ba7816bf")
