"""Stage `sweep`, with a sampler and a network whose figures are known by hand."""

import functools
import json
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_cost_card
from jax.sharding import Mesh

from sdprune_jax import config, pipeline, sharding, sites
from sdprune_jax.config import checks, command_line
from sdprune_jax.config.pruning import Override
from sdprune_jax.evaluate import measuring, networks, task
from sdprune_jax.files import convert, model_directory
from sdprune_jax.pruning import methods
from sdprune_jax.scoring import calibration
from sdprune_jax.scoring.recorder import LayerStats
from sdprune_jax.stages import cost_card, sweep
from sdprune_jax.stages import prune as pruning
from sdprune_jax.sweep import points, trial

# Of one device: to put a model on eight takes longer than all else here.
_MESH = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
_NUM = 6  # images
_PAPER = pathlib.Path(__file__).parents[1] / "configs" / "rz_sweep.py"
_UNET = "mid_block.attentions.0.transformer_blocks.0.ff.net.2.kernel"
_TEXT = "text_model.encoder.layers.0.mlp.fc1.kernel"


def _zeros(params):
    """The share of zeros in a layer of either component."""
    flat = {name: convert.flatten(params[name]) for name in ("unet", "text_encoder")}
    kernels = (flat["unet"][_UNET], flat["text_encoder"][_TEXT])
    return sum(float((np.asarray(x) == 0).mean()) for x in kernels)


@functools.cache
def _params():
    """Of the embedded model; no test changes them."""
    model = model_directory.open_model(model_directory.directory_of("embedded"))
    return {
        name: model_directory.load(model, name, dtype=np.float32)
        for name in model_directory.COMPONENTS
    }


@pytest.fixture
def calls(monkeypatch):
    """Counts batches rendered and calibrations, which are stand-ins."""
    counts = {"render": 0, "stats": [], "stop_at": 0}

    def sample(params, ids, negative, noise, scale):
        del negative, scale
        counts["render"] += 1
        if counts["render"] == counts["stop_at"]:
            raise KeyboardInterrupt
        zeros = _zeros(params)
        latents = np.asarray(noise) + 2 * zeros
        if zeros > 0.75:
            latents = latents * np.nan
        hue = (np.asarray(ids).sum(axis=1) % 7)[:, None, None, None] / 7
        images = np.clip(hue * (1 - zeros) + np.linspace(-1, 0, 3) + 0 * latents[..., :3], -1, 1)
        return pipeline.Sampled(jnp.asarray(latents), jnp.asarray(images.repeat(4, 1).repeat(4, 2)))

    def embed(params, images):
        del params
        x = images.astype(jnp.float32).mean(axis=(1, 2)) + jnp.asarray([1.0, 0, 0])[None]
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    def stats(self, flat, paths, statistic):
        del self
        counts["stats"].append((len(paths), statistic))
        size = lambda path: int(np.prod(flat[path].shape[:-1]))
        return {path: LayerStats(jnp.ones(size(path)), jnp.ones(())) for path in paths}

    hits = lambda embedded, *_: {"r_at_1": np.ones(len(embedded), bool)}
    texts = lambda prompts: np.eye(3, dtype=np.float32)[[len(p) % 3 for p in prompts]]
    scorer = types.SimpleNamespace(recall_of=hits)
    fake = networks.Network(embed, {}, texts, "weights", scorer)  # pyrefly: ignore
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3)).astype(np.uint8)
    prompts = [f"a picture of {'very ' * i}little" for i in range(_NUM)]
    marks = np.zeros(_NUM, np.int32)
    asked = task.Task(prompts, marks, marks, len(noise), lambda i: noise[i], "state")
    monkeypatch.setattr(pipeline, "load", lambda *_: _params())
    monkeypatch.setattr(pipeline, "make_sample", lambda *_, **__: sample)
    monkeypatch.setattr(measuring, "load_networks", lambda *_: {"embedded": fake})
    monkeypatch.setattr(task, "load", lambda *_: asked)
    monkeypatch.setattr(calibration.Calibration, "stats", stats)
    return counts


def _unet(*sparsities):
    return [config.SweepPoint(unet=config.PruneComponent(s)) for s in sparsities]


def _sweep(workdir, points_, **changes):
    measure = config.Evaluate(num_images=_NUM, batch_size=8, num_resamples=0)
    section = config.Sweep(points=tuple(points_), num_kept=2, measure=measure)
    for name, value in changes.items():
        setattr(section, name, value)
    asked = config.Run(workdir=str(workdir), seed=5, sweep=section)
    checks.check(asked)
    return json.loads(sweep.run(asked, _MESH).read_text())


def test_a_row_says_how_sparse_and_how_far_from_dense(tmp_path, calls):
    both = config.SweepPoint(config.PruneComponent(0.475), config.PruneComponent(0.25))
    table = _sweep(tmp_path, [*_unet(0.125), both])
    assert calls["render"] == 3  # dense, and two points
    model = model_directory.open_model(model_directory.directory_of("embedded"))
    flat = {n: convert.flatten(model_directory.param_shapes(model, n)) for n in points.COMPONENTS}
    count = {name: sum(x.size for x in leaves.values()) for name, leaves in flat.items()}
    in_scope = {
        name: sum(
            flat[name][path].size
            for path in sites.prunable(model_directory.param_shapes(model, name), name, "linear")
        )
        for name in points.COMPONENTS
    }
    total = sum(count.values())
    first, second = table["rows"]
    assert first["zeros"] == in_scope["unet"] // 8
    assert first["true"] == pytest.approx(first["zeros"] / total, rel=1e-12)
    assert first["nominal"] == pytest.approx(0.125 * count["unet"] / total, rel=1e-12)
    want = (0.475 * count["text_encoder"] + 0.25 * count["unet"]) / total
    assert second["nominal"] == pytest.approx(want, rel=1e-12)
    assert second["zeros"] == in_scope["unet"] // 4 + int(0.475 * in_scope["text_encoder"])
    assert second["components"]["text_encoder"]["method"] == "magnitude"
    distance = [row["figures"][trial.DISTANCE]["value"] for row in table["rows"]]
    assert distance[0] == pytest.approx((2 * 0.125) ** 2, rel=1e-3)  # within a weight of the layer
    assert distance[1] == pytest.approx((2 * 0.725) ** 2, rel=1e-3)
    assert {"fd_clip_embedded", "cosine_clip_embedded", "clip_embedded_r_at_1"} <= set(
        first["figures"]
    )
    assert not any(name.startswith(("kd_", "mmd_")) for name in first["figures"])
    chance = table["dense"][0]["chance"]
    assert chance[trial.DISTANCE] == pytest.approx(1, abs=0.1)  # variance of the noise
    assert set(chance) == {trial.DISTANCE, "cosine_clip_embedded"}
    assert all(row["seed"] == 5 for row in (*table["rows"], *table["dense"]))


def test_a_model_pruned_in_memory_is_the_one_that_stage_prune_writes(tmp_path, calls):
    part = config.PruneComponent(0.6, method="wanda", allocation="owl")
    section = config.Sweep(points=(config.SweepPoint(text_encoder=part),))
    asked = config.Run(workdir=str(tmp_path), sweep=section, prune=config.Prune(part))
    model = model_directory.open_model(model_directory.directory_of("embedded"))
    protocol, nothing = sweep._protocol(section), task.load("", "", 0, False)
    calibration = lambda component, seed: pruning.open_calibration(
        section.calibration, model, component, _MESH, seed, ""
    )
    bench = trial.open_bench(
        _MESH,
        model,
        protocol,
        nothing,
        (64, 64),
        tmp_path,
        sweep.points_of(section),
        calibration,
        sweep._measurement(section),
    )
    before = {path: x.copy() for path, x in bench.flat["text_encoder"].items()}
    got, done = trial.prune(bench, "text_encoder", pruning.method_of(part), 0)
    written = model_directory.load(
        model_directory.open_model(pruning.run(asked, _MESH)), "text_encoder"
    )
    for path, x in convert.flatten(got).items():
        np.testing.assert_array_equal(x, convert.flatten(written)[path])
    record = json.loads((tmp_path / "prune.json").read_text())["components"]["text_encoder"]
    assert done.zeros == record["zeros"] > 0
    for path, x in before.items():  # the dense model is as it was
        np.testing.assert_array_equal(bench.flat["text_encoder"][path], x)
    assert len(calls["stats"]) == 2


def test_a_stopped_sweep_goes_on_with_what_is_missing(tmp_path, calls):
    whole = _sweep(tmp_path / "whole", _unet(0.1, 0.2, 0.3))
    calls |= {"render": 0, "stop_at": 3}
    with pytest.raises(KeyboardInterrupt):
        _sweep(tmp_path / "stopped", _unet(0.1, 0.2, 0.3))
    file = tmp_path / "stopped" / "sweep.json"
    assert len(json.loads(file.read_text())["rows"]) == 1
    file.with_suffix(".json.tmp").write_text("half a table")
    resumed = _sweep(tmp_path / "stopped", _unet(0.1, 0.2, 0.3))
    assert calls["render"] == 3 + 2  # dense and one before, two after
    strip = lambda table: [
        {k: v for k, v in row.items() if k != "seconds"} for row in table["dense"] + table["rows"]
    ]
    assert strip(resumed) == strip(whole)
    _sweep(tmp_path / "stopped", _unet(0.1, 0.2, 0.3))
    assert calls["render"] == 5
    more = _sweep(tmp_path / "stopped", [*_unet(0.4, 0.1), *_unet(0.2)])  # one is new
    assert calls["render"] == 6
    assert len(more["rows"]) == 4
    again = _sweep(tmp_path / "stopped", _unet(0.1), num_steps=7)  # no row is of this protocol
    assert calls["render"] == 8
    assert len(again["rows"]) == 1


def test_a_sweep_stopped_before_its_first_row_leaves_no_record_of_the_one_before(tmp_path, calls):
    _sweep(tmp_path, _unet(0.1))
    calls |= {"render": 0, "stop_at": 1}
    with pytest.raises(KeyboardInterrupt):
        _sweep(tmp_path, _unet(0.1), num_steps=7)
    assert not (tmp_path / "sweep.json").exists()  # its pictures are gone


def test_statistics_are_computed_once_per_component_statistic_and_seed(tmp_path, calls):
    asked = [
        config.SweepPoint(text_encoder=config.PruneComponent(s, method=method, scope=scope))
        for s, method, scope in (
            (0.2, "wanda", "linear"),
            (0.4, "wanda", "linear"),
            (0.3, "wanda", "linear+conv"),
            (0.4, "magnitude", "linear"),
        )
    ]
    table = _sweep(tmp_path, asked, num_seeds=2)
    assert len(table["rows"]) == 8
    assert len(table["dense"]) == 2
    layers = (
        6
        * model_directory.open_model(
            model_directory.directory_of("embedded")
        ).text_encoder.num_hidden_layers
    )
    assert calls["stats"] == [(layers, "moments")] * 2


def test_statistics_of_other_seeds_go_once_all_exceed_the_limit():
    gram = LayerStats(jnp.zeros((50, 50)), jnp.zeros(()))  # 10,004 bytes
    keys = [("unet", "gram", 0), ("unet", "moments", 1), ("unet", "gram", 1)]
    held = {key: {"to_q": gram._replace(moment=gram.moment + 1)} for key in keys[:2]}
    held[keys[2]] = {"to_q": gram, "to_k": gram}  # shared, so counted once
    trial._forget(held, 1, 3.1e-5)
    assert list(held) == keys
    trial._forget(held, 1, 2.9e-5)
    assert list(held) == keys[1:]


def test_statistics_that_do_not_fit_are_computed_in_parts_for_every_point(
    tmp_path, calls, monkeypatch
):
    halves = lambda _, layers, statistic: [layers[:4], layers[4:]] if statistic else []
    monkeypatch.setattr(calibration.Calibration, "packages", halves)
    asked = [
        config.SweepPoint(text_encoder=config.PruneComponent(s, method="wanda")) for s in (0.2, 0.4)
    ]
    table = _sweep(tmp_path, asked)
    assert [num for num, _ in calls["stats"][::2]] == [4, 4]
    assert len(calls["stats"]) == 4
    parts = [row["components"]["text_encoder"] for row in table["rows"]]
    assert [part["of_prunable"] for part in parts] == pytest.approx([0.2, 0.4], abs=1e-2)


def test_only_the_first_pictures_stay_and_no_model_is_written(tmp_path, calls):
    table = _sweep(tmp_path, _unet(0.2))
    assert calls["render"] == 2
    folder = tmp_path / table["rows"][0]["images"]
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["000000.npy", "000000.png", "000001.npy", "000001.png"]
    assert not (folder.parent / "cache").exists()
    assert len(list((tmp_path / table["dense"][0]["images"]).glob("*.png"))) == _NUM
    assert not list(tmp_path.rglob("*.safetensors"))
    assert len(table["prompts"]) == 2


def test_the_stage_bisects_every_series_by_both_figures(tmp_path, calls):
    cliff = config.Cliff(tolerance=0.03)
    table = _sweep(tmp_path, _unet(0.5, 0.1), cliff=cliff, num_seeds=2)
    by = {found["criterion"]: found for found in table["cliffs"]}
    found = by[trial.DISTANCE]
    assert 0 < found["broken"] - found["whole"] <= 0.03
    chance = np.mean([1 / row["chance"][trial.DISTANCE] for row in table["dense"]])
    share = lambda s: (2 * s) ** 2 * chance
    assert share(found["whole"]) < 0.5 < share(found["broken"])  # about 0.354
    assert found["component"] == "unet"
    assert found["whole_again"] == []
    probes = sorted({row["components"]["unet"]["sparsity"] for row in table["rows"]})
    assert probes[:2] == [0.1, 0.3]
    before = calls["render"]
    again = _sweep(tmp_path, _unet(0.5, 0.1), cliff=cliff, num_seeds=2)
    assert again == table
    assert calls["render"] == before


@pytest.mark.usefixtures("calls")
def test_a_series_that_is_whole_beyond_the_highest_has_no_cliff(tmp_path):
    table = _sweep(tmp_path, _unet(0.1, 0.3), cliff=config.Cliff(highest=0.3))
    by = {found["criterion"]: found for found in table["cliffs"]}
    assert by[trial.DISTANCE]["why_not"] == "whole still at 0.3, and highest is 0.3"


def test_a_model_that_makes_no_numbers_is_a_row_and_broken(tmp_path, calls):
    table = _sweep(tmp_path, _unet(0.8, 0.1), cliff=config.Cliff(tolerance=0.3))
    failed = next(row for row in table["rows"] if "failed" in row)
    assert "not finite" in failed["failed"]
    assert failed["figures"] == {}
    assert failed["zeros"] > 0
    assert calls["render"] >= 3
    assert all(found.get("broken", 1) <= 0.8 for found in table["cliffs"])


def test_points_of_either_component_are_not_mixed_up(tmp_path, calls):
    part = config.PruneComponent(0.25)
    table = _sweep(tmp_path, [config.SweepPoint(part), config.SweepPoint(unet=part)])
    assert [list(row["components"]) for row in table["rows"]] == [["text_encoder"], ["unet"]]
    assert len({row["key"] for row in table["rows"]}) == 2
    assert calls["render"] == 3


def test_what_would_end_a_sweep_later_is_told_at_once(tmp_path):
    wrong = config.PruneComponent(0.3, pattern="2:4")
    section = config.Sweep(points=(config.SweepPoint(unet=wrong), config.SweepPoint(wrong)))
    section.measure = config.Evaluate(protocol="sd2prune-paper", num_images=1)
    with pytest.raises(ValueError, match=r"config\.sweep is not possible") as error:
        sweep.run(config.Run(workdir=str(tmp_path / "work"), sweep=section), sharding.make_mesh())
    for words in (
        "num_images is 1",
        "set config.sweep.measure.data",
        "needs the network inception",
        "points[0].unet: ",
        "points[1].text_encoder: ",
        "pattern=2:4 removes 0.5",
    ):
        assert words in str(error.value)
    assert not (tmp_path / "work").exists()


def test_overrides_that_match_nothing_or_put_the_cliff_out_of_reach_are_told_at_once(tmp_path):
    late = config.PruneComponent(0.3, overrides=(Override("*.atn1.*"), Override("*.ff.*")))
    high = config.PruneComponent(0.3, overrides=(Override("*.ff.*"),))
    section = config.Sweep(points=(config.SweepPoint(unet=late), config.SweepPoint(unet=high)))
    section.cliff = config.Cliff()
    with pytest.raises(ValueError, match=r"config\.sweep is not possible") as error:
        sweep.run(config.Run(workdir=str(tmp_path / "work"), sweep=section), _MESH)
    for words in (
        "points[0].unet: ",
        "*.atn1.* matches none",
        "did you mean attn1",
        "cliff.highest, series 1.unet: ",
        "a sparsity of 0.95 is out of reach",
    ):
        assert words in str(error.value)
    assert "points[1]" not in str(error.value)


@pytest.mark.parametrize(
    ("points_", "message"),
    [
        ((), "config.sweep.points is (), expected one or more SweepPoint"),
        ([3], "config.sweep.points is [3], expected one or more SweepPoint"),
        (_unet(0.1, 35.0), "config.sweep.points[1].unet.sparsity is 35.0, expected float from 0.0"),
        ([config.SweepPoint()], "config.sweep.points[0] prunes no component"),
    ],
)
def test_impossible_points_are_refused_by_name(points_, message):
    section = config.Sweep()
    section.points = points_
    with pytest.raises(ValueError, match=re.escape(message)):
        checks.check(config.Run(sweep=section))


def test_series_are_points_that_differ_in_one_sparsity():
    paper = command_line.load(str(_PAPER))
    assert paper.sweep is not None
    found = list(points.series(sweep.points_of(paper.sweep)))
    assert [(s.component, points.label(s.method), len(s.sparsities)) for s in found] == [
        ("unet", "magnitude, rz", 14),
        ("text_encoder", "magnitude, rz", 11),
        ("text_encoder", "owl-magnitude, multiple 7", 11),
        ("text_encoder", "wanda", 12),
        ("text_encoder", "owl-wanda, multiple 7", 11),
    ]
    steps = tuple(x / 1000 for x in range(350, 625, 25))
    assert found[0].sparsities == (0.1, 0.2, 0.3, *steps)
    text = (0.3, 0.4, 0.5, 0.55, 0.575, 0.6, 0.625, 0.65, 0.675, 0.7, 0.8)
    for series in found[1:]:
        more = (0.525,) if points.label(series.method) == "wanda" else ()
        assert series.sparsities == tuple(sorted((*text, *more)))
    assert found[3].point(0.525) in sweep.points_of(paper.sweep)
    fixed = methods.Magnitude(0.5, pattern="2:4")
    band = methods.Magnitude(0.3, band=(0.2, 0.5))
    assert not list(points.series([points.Point(unet=fixed), points.Point(band)]))
    assert points.label(band) == "magnitude, band 0.2 to 0.5"
    whole = config.PruneComponent(0.3, method="sparsegpt")
    whole.damping = 1  # as a config file may say
    assert points.label(pruning.method_of(whole)) == "sparsegpt, damping 1"


def test_a_point_whose_layers_have_their_own_sparsity_is_counted_and_named():
    own = (methods.Override("*.attn2.*", 0.1), methods.Override("time_*"))
    part = methods.Magnitude(0.5, pattern="2:4", overrides=own)
    assert points.label(part) == "magnitude, 2:4, *.attn2.* at 0.1, time_* at 0"
    model = model_directory.open_model(model_directory.directory_of("embedded"))
    shapes = {name: model_directory.param_shapes(model, name) for name in points.COMPONENTS}
    flat = convert.flatten(shapes["unet"])
    sizes = {p: flat[p].size for p in sites.prunable(shapes["unet"], "unet", "linear")}
    attn2 = [path for path in sizes if ".attn2." in path]
    rest = [p for p in sizes if ".attn2." not in p and not p.startswith("time_")]
    want = sum(sizes[path] // 10 for path in attn2) + sum(sizes[path] for path in rest) // 2
    assert points.expected(points.Point(unet=part), shapes).zeros == want
    plain = methods.Magnitude(0.5, overrides=own)  # the others make up for them
    assert points.expected(points.Point(unet=plain), shapes).zeros == sum(sizes.values()) // 2


# Of the text encoder and the UNet, and of both by all their parameters, in percent.
_PUBLISHED = {
    (0.18, 0.21): 20.2,
    (0.35, 0.14): 19.9,
    (0.53, 0.07): 20.0,
    (0.27, 0.31): 29.9,
    (0.53, 0.21): 30.0,
    (0.8, 0.1): 29.8,
    (0.425, 0.3): 33.5,
    (0.45, 0.325): 36.0,
    (0.475, 0.35): 38.5,
    (0.35, 0.42): 40.0,
    (0.71, 0.28): 40.1,
    (0.5, 0.375): 41.0,
    (0.525, 0.4): 43.5,
    (0.55, 0.425): 46.0,
    (0.575, 0.45): 48.5,
    (0.44, 0.52): 49.7,
    (0.89, 0.35): 50.2,
    (0.6, 0.475): 51.0,
    (0.625, 0.5): 53.5,
    (0.53, 0.63): 60.2,
}


def test_dry_run_lists_the_paper_with_nominal_and_true_sparsity(tmp_path):
    directory = test_cost_card._write(tmp_path, test_cost_card.STABLE_DIFFUSION_2)
    words = [f"--config={_PAPER}", f"--config.model={directory}", "--config.sweep.num_seeds=2"]
    asked = command_line.parse(["main", *words], command_line.flags.FlagValues()).run
    card = cost_card.card(asked, 1)
    table = next(part for part in card.split("\n\n") if part.startswith("sweep"))
    rows = [re.split(r"  +", line) for line in table.splitlines()]
    assert len(rows) == 1 + 99
    wanted = [row for row in rows if row[1:3] == ["0.475 magnitude, rz", "0.35 magnitude, rz"]]
    ((_, _, _, nominal, true, zeros),) = wanted
    assert (nominal, true) == ("38.53%", "20.14%")
    # Each layer is rounded down: fewer than 137,468,313 and 105,426,944, by less than one a layer.
    assert 0 <= 137_468_313 + 105_426_944 - int(zeros.replace(",", "")) < 138 + 216
    alone = {row[2]: row[3:5] for row in rows if row[1] == "dense"}
    assert alone["0.35 magnitude, rz"] == ["25.12%", "8.74%"]
    assert len(alone) == 14
    number = lambda cell: float(cell.split()[0])
    found = {}
    for _, text, network, nominal, *_ in rows[1:]:
        if "dense" not in (text, network):
            found.setdefault((number(text), number(network)), []).append(nominal.rstrip("%"))
    assert found.keys() == _PUBLISHED.keys()
    for pair, nominals in found.items():  # text encoder by magnitude and by OWL
        np.testing.assert_allclose([float(x) for x in nominals], [_PUBLISHED[pair]] * 2, atol=0.051)
    owl = next(row for row in rows if row[1].startswith("0.475 owl-magnitude"))
    assert owl[3:] == ["38.53%", "20.14%", "242,895,257"]
    assert "99 points and dense, 64 images, 2 seeds, 25 steps: 12,800 images in all" in card
