"""A stage in two files, without a change to the package: a config and a module."""

import json
import sys

import pytest
from absl import flags

from sdprune_jax import main
from sdprune_jax.config import command_line

CONFIG = """
import dataclasses

from sdprune_jax import config


@dataclasses.dataclass
class Count:
    '''Counts the parameters of the model.'''

    component: str = config.of("unet", "unet", "vae")


@dataclasses.dataclass
class Run(config.Run):
    count: Count | None = config.stage("counting_stage")


def get_config(size=None):
    return config.resize(Run(workdir={workdir!r}, count=Count()), size)
"""

STAGE = """
import dataclasses
import pathlib

from sdprune_jax import artefacts
from sdprune_jax.files import model_directory, convert
from sdprune_jax.stages import inputs


@dataclasses.dataclass(frozen=True)
class Record:
    parameters: int


def check(run, num_devices):
    inputs.check_model(run, reads_texts=False)


def plan(run, planned):
    return f"count: the {run.count.component}"


def run(run, mesh):
    directory = pathlib.Path(run.workdir)
    output = artefacts.Output("count", directory / "count", directory / "count.json")
    model = inputs.open_model(run)
    made_from = {
        "section": dataclasses.asdict(run.count),
        "model": artefacts.model_state(model.directory, run.variant),
    }
    if not artefacts.is_complete(output, made_from):
        shapes = model_directory.param_shapes(model, run.count.component)
        with artefacts.writing(output, made_from) as partial:
            partial.record = Record(sum(x.size for x in convert.flatten(shapes).values()))
    return output.record
"""


@pytest.fixture
def parse(tmp_path, monkeypatch):
    (tmp_path / "count.py").write_text(CONFIG.format(workdir=str(tmp_path / "work")))
    (tmp_path / "counting_stage.py").write_text(STAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "counting_stage", raising=False)
    arguments = ["main", f"--config={tmp_path / 'count.py'}"]
    return lambda *words: command_line.parse([*arguments, *words], flags.FlagValues())


def test_a_stage_of_two_files_is_checked_planned_run_and_kept(parse, tmp_path, capsys):
    main.main(parse("--dry_run"))
    assert "count: the unet" in capsys.readouterr().out
    (record,) = main.run_stages(parse().run)
    unet = json.loads(record.read_text())["parameters"]
    before = record.stat().st_mtime_ns
    main.run_stages(parse().run)
    assert record.stat().st_mtime_ns == before
    main.run_stages(parse("--config.count.component=vae").run)
    assert 0 < json.loads(record.read_text())["parameters"] != unet
    assert json.loads((tmp_path / "work" / "config.json").read_text())["count"] == {
        "component": "vae"
    }


def test_its_fields_are_held_to_their_legal_values(parse):
    with pytest.raises(ValueError, match=r"config\.count\.component is 'clip', expected one of"):
        parse("--config.count.component=clip")
    with pytest.raises(ValueError, match=r"config\.count has no field `part`"):
        parse("--config.count.part=vae")
