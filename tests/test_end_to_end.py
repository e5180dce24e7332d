"""Every config, as `:tiny`, from its file to its last output."""

import functools
import pathlib
import shutil

import aptp_model
import damaged_outputs
import jax
import pytest

from sdprune_jax import main, sharding
from sdprune_jax.config import checks, command_line
from sdprune_jax.evaluate import task
from sdprune_jax.evaluate.protocols import PROTOCOLS
from sdprune_jax.files import model_directory

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))

# Of the stages, and as `:tiny` of the model, of aptp_emoji, slice_embedded, rz_sweep and
# quickstart; test_aptp_configs.py and test_sweep.py hold them to the rest.
_RUN_ALIKE = ("aptp_cc3m", "aptp_coco", "aptp_study", "study_embedded", "sd21_magnitude")
_RUN = [path for path in CONFIGS if path.stem not in _RUN_ALIKE]


def _few_references(load, *args):
    """Features of all ten thousand pictures would take longer than the rest of a config."""
    asked = load(*args)
    return asked._replace(num_references=min(asked.num_references, 64))


@pytest.mark.parametrize("path", _RUN, ids=lambda path: path.stem)
def test_config_runs_as_tiny(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = command_line.load(f"{path}:tiny")
    run.workdir = str(tmp_path / "run")
    run.mesh.data = -1
    one_device = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])  # compiles faster
    monkeypatch.setattr(sharding, "make_mesh", one_device)
    monkeypatch.setattr(task, "load", functools.partial(_few_references, task.load))
    if path.stem == "evaluate_embedded":  # aptp_emoji evaluates experts too
        run.router = run.assign = run.materialise = run.finetune = None
    if not run.pretrain:  # one that may be damaged
        shutil.copytree(model_directory.directory_of("embedded"), tmp_path / "model")
        run.model = str(tmp_path / "model")
    if run.router:  # trains every expert, and each has programs of its own
        run.model = str(aptp_model.make(tmp_path / "micro", aptp_model.ONE_LEVEL).directory)
        if run.generate and run.evaluate:  # the programs of one serve the other
            run.generate.num_steps = PROTOCOLS[run.evaluate.protocol].num_steps
            run.generate.batch_size = run.evaluate.batch_size
    checks.check(run)
    outputs = main.run_stages(run)
    assert outputs
    assert all(output.exists() for output in outputs)
    again = main.run_stages(run)  # complete stages are reused
    assert again == outputs
    damaged_outputs.check(run, one_device(-1, 1), monkeypatch)
    if run.report:
        page = outputs[-1].read_text()
        shown = 3 * run.generate.num_prompts if run.generate else 0
        assert page.count("data:image/") >= (shown or bool(run.sweep))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_possible_at_full_size(path):
    checks.check(command_line.load(str(path)))
