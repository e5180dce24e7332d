"""tools/rehearse.py: how it compares runs; what it starts is tested in test_processes.py."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tools"))
import rehearse


def _run(workdir, losses, fid=0.5):
    directory = workdir / "router" / "training" / "router"
    directory.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in losses]
    (directory / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 2, "val_macs": 1}']))
    models = {"dense": {"figures": {"fid": {"value": fid}}}}
    (workdir / "evaluate.json").write_text(json.dumps({"models": models}))
    return workdir


def test_runs_are_as_far_apart_as_their_furthest_loss(tmp_path, capsys):
    one = _run(tmp_path / "one", [(1, 2.0), (2, 4.0)])
    other = _run(tmp_path / "other", [(1, 2.0), (2, 4.004)], fid=0.51)
    assert rehearse._compare(one, other) == pytest.approx(1e-3)
    told = capsys.readouterr().out
    assert "other: 2 losses, at most 1.0e-03" in told
    assert "figures of the dense model at most 2.0e-02" in told


def test_steps_that_are_missing_or_logged_twice_are_refused(tmp_path):
    one = _run(tmp_path / "one", [(1, 2.0), (2, 4.0)])
    with pytest.raises(ValueError, match="logged other steps than"):
        rehearse._compare(one, _run(tmp_path / "short", [(1, 2.0)]))
    with pytest.raises(ValueError, match="has step 1 twice"):
        rehearse._compare(one, _run(tmp_path / "twice", [(1, 2.0), (1, 2.0), (2, 4.0)]))
    with pytest.raises(ValueError, match="logged no step"):
        rehearse._losses(tmp_path / "none")
