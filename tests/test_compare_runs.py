"""sdprune compare: the table, and which runs it refuses to put into one."""

import json

import aptp_model
import jax
import numpy as np
import pytest

from sdprune_jax import UserError, sites
from sdprune_jax.commands import compare
from sdprune_jax.files import model_directory
from sdprune_jax.sites import macs

PROTOCOL = {
    "name": "embedded",
    "evaluated": 8,
    "num_steps": 25,
    "guidance_scale": 3.0,
    "seed": 0,
    "dtype": "float32",
    "height": 64,
    "width": 64,
    "references": 64,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The dense one, and two of other sizes."""
    directory = tmp_path_factory.mktemp("models")
    model = aptp_model.make(directory / "dense")
    dense = jax.tree.map(np.asarray, model_directory.load(model, "unet"))
    for name, units in (("half", 2), ("quarter", 1)):
        keep = {
            "mid_block.resnets.0": np.arange(4) < units,
            "up_blocks.0.resnets.1.depth": np.array([units > 1]),
        }
        params, unet_config = sites.slice_params(dense, model.unet, keep)
        cut = model_directory.ModelConfig(
            model.text_encoder, unet_config, model.vae, model.schedule, model.directory
        )
        model_directory.save(cut, {"unet": params}, directory / name, dtype=np.float32)
    return directory


def _run(workdir, models, routed, values=None, dense="0123456789", **protocol):
    value = lambda x: {"latent_mse_to_dense": {"value": x, "low": x - 1, "high": x + 1, "num": 8}}
    record = {
        "made_from": workdir.name,
        "dense": dense,
        "weights": {"embedded": "f59afde43b74"},
        "protocol": PROTOCOL | protocol,
        "models": {
            "dense": {
                "directory": str(models / "dense"),
                "figures": {"fd_clip_embedded": {"value": 0.25, "num": 8}},
            },
            "routed": routed | {"figures": value(12.5)},
        },
    }
    (workdir / "evaluate").mkdir(parents=True)
    if values is not None:
        path = workdir / "evaluate" / "values.npz"
        np.savez(
            path, **{"routed/latent_mse_to_dense": values, "dense/clip_embedded_r_at_1": values}
        )
    (workdir / "evaluate.json").write_text(json.dumps(record))
    return workdir


def _cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def _cost(directory):
    model = model_directory.open_model(directory)
    sizes = [x.size for x in jax.tree.leaves(model_directory.param_shapes(model, "unet"))]
    tokens = model.text_encoder.max_position_embeddings
    return sum(macs.of_unet(model.unet, (8, 8), tokens)), sum(sizes)


def test_costs_of_experts_are_the_means_over_their_prompts(models, tmp_path, capsys):
    experts = [
        {"directory": str(models / "half"), "prompts": 6},
        {"directory": str(models / "quarter"), "prompts": 2},
        {"directory": str(models / "nowhere"), "prompts": 0},
    ]
    one = _run(tmp_path / "one", models, {"experts": experts})
    two = _run(tmp_path / "two", models, {"directory": str(models / "quarter")})
    output = tmp_path / "table.md"
    compare.main([str(one), str(two), "--repeats=0", "--output", str(output)])
    said = capsys.readouterr().out
    assert output.read_text() == said
    heads, rule, dense, first, second = _cells(said)
    assert heads[1:] == [
        "experts",
        "GMACs",
        "of dense",
        "M parameters",
        "of dense",
        "latent MSE to dense",
        "FD (CLIP)",
    ]
    assert len(rule) == len(heads)
    assert dense[:2] + dense[-2:] == ["dense", "1", "", "0.25"]
    whole, half, quarter = (_cost(models / name) for name in ("dense", "half", "quarter"))
    assert (dense[3], dense[5]) == ("1.000", "1.000")
    mean = [0.75 * a + 0.25 * b for a, b in zip(half, quarter, strict=True)]
    assert first[:2] == ["one", "2"]
    assert float(first[2]) == pytest.approx(mean[0] / 1e9, rel=1e-3)
    assert float(first[5]) == pytest.approx(mean[1] / whole[1], abs=6e-4)
    assert first[6:] == ["12.5 [11.5, 13.5]", ""]
    assert float(second[3]) == pytest.approx(quarter[0] / whole[0], abs=6e-4)
    assert quarter[0] < half[0] < whole[0]


def test_milliseconds_are_the_fastest_of_turns_weighed_by_prompts(models, tmp_path, monkeypatch):
    experts = [
        {"directory": str(models / "half"), "prompts": 1},
        {"directory": str(models / "quarter"), "prompts": 4},
    ]
    run = _run(tmp_path / "run", models, {"experts": experts})
    clock, calls = [0.0], []
    taken = {"dense": [9, 4, 5], "half": [9, 3, 2], "quarter": [9, 1, 1]}

    def call(directory):
        def work():
            calls.append(directory.name)
            clock[0] += taken[directory.name][calls.count(directory.name) - 1] / 1000
            return 0

        return work

    monkeypatch.setattr(compare, "_call", call)
    monkeypatch.setattr(compare.time, "perf_counter", lambda: clock[0])
    found = compare.rows([run])
    milliseconds = compare._milliseconds(found, 2)
    assert [milliseconds[models / n] for n in taken] == pytest.approx([4, 2, 1])
    assert calls[:6] == ["dense", "half", "quarter"] * 2
    rows = _cells(compare.table(found, milliseconds))
    assert rows[0][6:8] == ["ms a call", "of dense"]
    assert (rows[2][6:8], rows[3][6:8]) == (["4.00", "1.000"], ["1.20", "0.300 [0.250, 0.500]"])


def test_rows_are_compared_image_by_image(models, tmp_path, capsys):
    """Each image of one is 2 to 3 above the other's, although both spread over a hundred."""
    rng, routed = np.random.default_rng(0), {"directory": str(models / "half")}
    base = rng.uniform(0, 100, 50)
    runs = [
        _run(tmp_path / "near", models, routed, base),
        _run(tmp_path / "far", models, routed, base + rng.uniform(2, 3, 50)),
    ]
    arguments = [*map(str, runs), "--repeats=0"]
    compare.main([*arguments, "--against=near"])
    heads, _, dense, far = _cells(capsys.readouterr().out.split("\n\n")[1])
    assert heads == ["less near", "latent MSE to dense"]
    assert dense == ["dense", ""]
    mean, low, high = (float(x.strip("[,]")) for x in far[1].split())
    assert 2.3 < low < mean < high < 2.7
    with pytest.raises(UserError, match="expected one of dense, near, far"):
        compare.main([*arguments, "--against=nearest"])
    _run(tmp_path / "old", models, routed)
    with pytest.raises(UserError, match=r"no values of each image of old: delete evaluate\.json"):
        compare.main([str(runs[0]), str(tmp_path / "old"), "--repeats=0", "--against=near"])


def test_runs_that_do_not_compare_are_refused_with_every_reason(models, tmp_path):
    routed = {"directory": str(models / "half")}
    first = _run(tmp_path / "first", models, routed)
    other = _run(tmp_path / "other", models, routed, evaluated=7)
    with pytest.raises(UserError, match="do not compare") as error:
        compare.main([str(first), str(tmp_path / "none"), str(other)])
    assert "none has no evaluate.json" in str(error.value)
    assert "evaluated 7" in str(error.value)


def test_runs_of_two_dense_models_and_twins_are_not_compared(models, tmp_path):
    routed, values = {"directory": str(models / "half")}, np.zeros(8)
    one = _run(tmp_path / "one", models, routed, values)
    two = _run(tmp_path / "two", models, routed, values, dense="9876543210")
    with pytest.raises(ValueError, match="dense model 98765432"):
        compare.rows([one, two])
    twin = _run(tmp_path / "other" / "one", models, routed, values)
    with pytest.raises(ValueError, match="no twin"):
        compare.against(compare.rows([one, twin]), "one")
