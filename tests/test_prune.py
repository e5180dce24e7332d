"""The stage, on the embedded model: exact counts, and a directory that diffusers loads."""

import json

import numpy as np
import pytest

from sdprune_jax import config, sharding, sites
from sdprune_jax.files import convert, model_directory
from sdprune_jax.pruning import allocate
from sdprune_jax.pruning.methods import STATISTIC
from sdprune_jax.scoring import calibrate
from sdprune_jax.scoring.calibration import Calibration
from sdprune_jax.scoring.settings import CalibrationSettings
from sdprune_jax.stages import prune

_MESH = sharding.make_mesh()
UNIFORM = {"text_encoder": 0.475, "unet": 0.35}


def test_every_layer_is_within_one_weight_of_its_share():
    sizes = {"a": 10, "b": 10, "c": 7, "d": 1}
    removed = allocate.uniform(sizes, 0.475)
    assert removed == {"a": 4, "b": 5, "c": 3, "d": 1}  # 4.75, 9.5, 12.825, 13.3 rounded down
    assert sum(removed.values()) == int(28 * 0.475)
    assert allocate.each_floored(sizes, 0.475) == {"a": 4, "b": 4, "c": 3, "d": 0}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("prune")


def _prune(workdir, **changes):
    sections = {
        name: config.PruneComponent(**{"sparsity": sparsity} | changes)
        for name, sparsity in UNIFORM.items()
    }
    section = config.Prune(**sections, save_dtype="float16")
    return prune.run(config.Run(workdir=str(workdir), prune=section), _MESH)


def test_the_pruned_directory_holds_exactly_the_zeros_that_are_reported(workdir):
    output = _prune(workdir)
    record = json.loads((workdir / "prune.json").read_text())
    directories = (model_directory.directory_of("embedded"), output)
    dense, pruned = (model_directory.open_model(directory) for directory in directories)
    for name, sparsity in UNIFORM.items():
        before, after = (convert.flatten(model_directory.load(m, name)) for m in (dense, pruned))
        layers = sites.prunable(model_directory.param_shapes(dense, name), name, "linear")
        values = record["components"][name]
        prunable = sum(before[path].size for path in layers)
        zeros = sum(int((np.asarray(after[path]) == 0).sum()) for path in layers)
        assert values["prunable"] == prunable
        assert zeros == values["zeros"] + values["underflow_zeros"]
        assert values["zeros"] == int(prunable * sparsity)
        assert values["of_prunable"] == pytest.approx(sparsity, abs=1 / prunable)
        for path, x in before.items():
            x, y = np.asarray(x, np.float32), np.asarray(after[path], np.float32)
            kept = y != 0
            np.testing.assert_array_equal(y[kept], x[kept])
            if path not in layers:
                np.testing.assert_array_equal(x, y)
            else:
                assert np.abs(x[~kept]).max() <= np.abs(x[kept]).min()
    total = sum(v["zeros"] for v in record["components"].values())
    assert record["of_pipeline"] == pytest.approx(total / record["pipeline_parameters"])


def test_a_finished_stage_is_reused_until_its_config_changes(workdir):
    output = _prune(workdir)
    before = (output / "unet" / "config.json").stat().st_mtime_ns
    _prune(workdir)
    assert (output / "unet" / "config.json").stat().st_mtime_ns == before
    _prune(workdir, threshold="rz")
    assert (output / "unet" / "config.json").stat().st_mtime_ns != before
    record = json.loads((workdir / "prune.json").read_text())
    rows = record["components"]["unet"]["layers"]
    assert all(row["zeros"] >= int(row["weights"] * 0.35) for row in rows)


def test_diffusers_loads_the_pruned_directory_with_its_zeros(workdir):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    output = _prune(workdir, scope="linear+conv")
    model, info = diffusers.UNet2DConditionModel.from_pretrained(
        output / "unet", output_loading_info=True, torch_dtype=torch.float16
    )
    assert not any(info.values()), info
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, layers)}
    record = json.loads((workdir / "prune.json").read_text())["components"]["unet"]
    names = {row["name"]: row for row in record["layers"]}
    assert len(names) > 200
    for name, row in names.items():
        weight = modules[name].weight
        assert list(weight.shape) == row["shape"]
        assert int((weight == 0).sum()) >= row["zeros"]


def test_a_component_too_many_is_named():
    with pytest.raises(ValueError, match="no component"):
        prune.run(config.Run(prune=config.Prune()), _MESH)


def test_only_obsdiff_weighs_the_calls_of_the_sampler(monkeypatch):
    seen = {}

    def statistics(*args):
        return seen.update({method: (args[5], args[7].timestep_weights)}) or {}

    monkeypatch.setattr(calibrate, "unet_statistics", statistics)
    monkeypatch.setattr(Calibration, "text_states", lambda _: np.zeros((2, 3, 4)))
    model = model_directory.open_model(model_directory.directory_of("embedded"))
    loaded = convert.flatten(model_directory.load(model, "unet"))
    flat = {path: np.asarray(x) for path, x in loaded.items()}
    calibration = Calibration(CalibrationSettings(), model, "unet", _MESH, ["a cat"])
    for method in ("wanda", "sparsegpt", "obsdiff"):
        calibration.stats(flat, [], STATISTIC[method])
    assert seen == {
        "wanda": ("moments", "uniform"),
        "sparsegpt": ("gram", "uniform"),
        "obsdiff": ("gram", "log_decreasing"),
    }
