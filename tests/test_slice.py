"""Stage `slice`: what it writes for every criterion, and that `finetune` goes on from there."""

import dataclasses
import json
import re
from typing import get_args

import aptp_model
import jax
import numpy as np
import pytest

from sdprune_jax import config, sites
from sdprune_jax.aptp import expert_files
from sdprune_jax.config import checks
from sdprune_jax.data import pictures
from sdprune_jax.files import convert, model_directory
from sdprune_jax.models import unet
from sdprune_jax.scoring import gradients
from sdprune_jax.scoring.settings import GradientSettings
from sdprune_jax.sites import macs
from sdprune_jax.slicing import bksdm, criteria, operators, structured
from sdprune_jax.stages import cost_card, finetune, slice

MESH = aptp_model.MESH


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return aptp_model.make(tmp_path_factory.mktemp("micro") / "model")


def _run(model, workdir, **changes):
    calibration = config.Calibration(num_prompts=8, batch_size=8, num_steps=1)
    section = config.Slice(macs_budget=0.75, data=aptp_model.DATA, calibration=calibration)
    section = dataclasses.replace(section, **changes)
    return config.Run(workdir=str(workdir), model=str(model.directory), slice=section, seed=1)


def _record(output):
    return json.loads((output / "experts.json").read_text())


def _largest_unit(model, latent_size):
    costs = macs.by_site(model.unet, (latent_size,) * 2, 24).sites
    return max(costs[s.name] / s.units for s in sites.table(model.unet) if s.kind != "depth")


def test_one_expert_has_all_prompts_and_keeps_the_budget_within_a_unit(model, tmp_path):
    run = _run(model, tmp_path, criterion="norm")
    output = slice.run(run, MESH)
    assert output == tmp_path / "experts"
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == ["00"]
    record = _record(output)
    (row,) = record["experts"]
    whole = record["dense"]["macs"]
    assert whole == macs.by_site(model.unet, (8, 8), 24).total
    assert 0 <= 0.75 * whole - row["macs"] < _largest_unit(model, 8)
    texts = json.loads((output / "00" / "prompts.json").read_text())
    for split in ("train", "val", "test"):
        images = pictures.load(aptp_model.SOURCE, split)
        assert texts[split] == pictures.prompts(images, split, 1, 2).texts
        assert row["prompts"][split] == len(texts[split])

    expert = model_directory.open_model(output / "00")
    dense, found = model_directory.load(model, "unet"), model_directory.load(expert, "unet")
    dense = jax.tree.map(np.asarray, dense)
    keep = structured.within_budget(
        structured.norm(dense, model.unet), macs.by_site(model.unet, (8, 8), 24), 0.75
    )
    want, unet_config = sites.slice_params(dense, model.unet, keep)
    assert expert.unet == unet_config
    jax.tree.map(np.testing.assert_array_equal, found, want)
    units = {site.name: site.units for site in sites.table(model.unet)}
    assert record["dense"]["units"].items() >= units.items()
    depth = {site.name: 1 for site in sites.table(model.unet) if site.kind == "depth"}
    assert row["kept"] == depth | {name: int(units.sum()) for name, units in keep.items()}


def test_budget_is_of_the_counter_and_the_size_asked_for(model, tmp_path):
    found = {}
    for changes in ({}, {"latent_size": 32}, {"mac_counter": "paper"}):
        output = slice.run(_run(model, tmp_path, criterion="uniform", **changes), MESH)
        record = _record(output)
        found[json.dumps(changes)] = record
        share = record["experts"][0]["share_of_macs"]
        assert 0.75 - 0.08 < share <= 0.75
    whole = [record["dense"]["macs"] for record in found.values()]
    assert whole[1] > 10 * whole[0]
    assert whole[2] > whole[0]
    assert [record["latent_size"] for record in found.values()] == [[8, 8], [32, 32], [8, 8]]


def test_a_finished_stage_is_kept_and_a_killed_one_begins_anew(model, tmp_path, monkeypatch):
    run, write = _run(model, tmp_path, criterion="random"), model_directory.write

    def dies(*args, **kwargs):
        write(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(model_directory, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        slice.run(run, MESH)
    assert not (tmp_path / "experts").exists()
    monkeypatch.setattr(model_directory, "write", write)
    output = slice.run(run, MESH)
    before = (output / "experts.json").stat().st_mtime_ns
    assert slice.run(run, MESH) == output
    assert (output / "experts.json").stat().st_mtime_ns == before
    for changed in (
        _run(model, tmp_path, criterion="random", macs_budget=0.7),
        dataclasses.replace(run, seed=2),
    ):
        slice.run(changed, MESH)
        after = (output / "experts.json").stat().st_mtime_ns
        assert after != before
        before = after
    assert not list(tmp_path.glob("*.partial"))


def test_finetune_trains_the_one_expert_on_all_prompts(model, tmp_path, monkeypatch):
    run, seen = _run(model, tmp_path, criterion="uniform"), {}
    run.finetune = config.Finetune(
        training=config.Training(num_steps=2, batch_size=8, warmup_steps=1)
    )
    source = slice.run(run, MESH)

    def train_expert(task, source, target, rows):
        del target
        seen[source.name] = source, rows, task.examples
        return {"prompts": {}, "before": {}, "after": {}}

    monkeypatch.setattr(finetune, "_train_expert", train_expert)
    output = finetune.run(run, MESH)
    assert list(seen) == ["00"]
    found, rows, examples = seen["00"]
    assert found == source / "00"
    np.testing.assert_array_equal(rows["train"], np.arange(48))
    np.testing.assert_array_equal(rows["val"], np.arange(24))
    assert len(examples["train"].states) == 48
    assert (tmp_path / "slice" / "cache").is_dir()
    texts = [(path / "00" / "prompts.json").read_text() for path in (source, output)]
    assert texts[0] == texts[1]
    read = expert_files.read(tmp_path)
    assert (read.seed, read.data) == (1, aptp_model.SOURCE)


@pytest.mark.parametrize(("criterion", "signs_cancel"), [("taylor", True), ("diff-pruning", False)])
def test_gradients_of_pictures_choose_units(model, tmp_path, monkeypatch, criterion, signs_cancel):
    dense = jax.tree.map(np.asarray, model_directory.load(model, "unet"))
    grads = aptp_model.random_params(unet.param_shapes(model.unet), 9)
    monkeypatch.setattr(gradients, "of_pictures", lambda *_: gradients.Sums(grads, [2.0, 1.0]))
    output = slice.run(_run(model, tmp_path, criterion=criterion), MESH)
    scores = structured.taylor(dense, grads, model.unet, signs_cancel)
    costs = macs.by_site(model.unet, (8, 8), 24)
    keep = structured.within_budget(scores, costs, 0.75)
    _, want = sites.slice_params(dense, model.unet, keep)
    assert model_directory.open_model(output / "00").unet == want
    assert _record(output)["slice"]["losses"] == [2.0, 1.0]
    assert _record(output)["slice"]["criterion"] == criterion


def test_pictures_drawn_by_the_seed_are_what_gradients_are_of(model, monkeypatch):
    given = []

    def sums(*args):
        given.append(args)
        return gradients.Sums({}, [])

    monkeypatch.setattr(gradients, "sums", sums)
    settings = GradientSettings(num_images=9)
    for seed in (0, 0, 1):
        gradients.of_pictures(model, {}, MESH, settings, seed)
    latents, text = given[0][3:5]
    assert latents.shape == (9, 8, 8, 4)
    assert text.shape == (9, 24, 12)
    np.testing.assert_array_equal(latents, given[1][3])
    assert np.abs(latents - given[2][3]).max() > 1e-3


def test_obs_leaves_resnets_whole_and_compensates_what_closes_a_site(model, tmp_path):
    output = slice.run(_run(model, tmp_path, criterion="obs", macs_budget=0.9), MESH)
    record, expert = _record(output), model_directory.open_model(output / "00")
    (row,) = record["experts"]
    assert 0 <= 0.9 * record["dense"]["macs"] - row["macs"] < _largest_unit(model, 8)
    assert record["slice"]["loss"] > 0
    table = {site.name: site for site in sites.table(model.unet)}
    cut = [name for name, units in row["kept"].items() if units < table[name].units]
    assert {table[name].kind for name in cut} == {"heads", "ff"}
    dense, found = (convert.flatten(model_directory.load(m, "unet")) for m in (model, expert))
    name = next(name for name in cut if table[name].kind == "ff")
    before, after = (np.asarray(flat[f"{name}.net.2.kernel"]) for flat in (dense, found))
    size = table[name].unit_size
    runs = before.reshape(table[name].units, size, -1), after.reshape(-1, size, after.shape[-1])
    is_copied = (runs[0][:, None] == runs[1][None]).all(axis=(2, 3)).any(axis=0)
    assert not is_copied.any()  # every row that stays makes up for those that went
    before, after = (np.asarray(flat[f"{name}.net.0.proj.kernel"]) for flat in (dense, found))
    assert {row.tobytes() for row in after.T} <= {row.tobytes() for row in before.T}


def test_operators_go_in_the_order_of_their_scores(model, tmp_path, monkeypatch):
    given = {}

    def score(model, params, mesh, text, names, seed, settings):
        del model, params, mesh, seed
        given["text"], given["walk"] = text[:-1], settings
        return {name: np.array([float(i)]) for i, name in enumerate(reversed(names))}

    monkeypatch.setattr(operators, "score", score)
    output = slice.run(_run(model, tmp_path, criterion="operators"), MESH)
    assert given["text"].shape == (8, 24, 12)
    assert given["walk"].num_steps == 1
    kept, costs = _record(output)["experts"][0]["kept"], macs.by_operator(model.unet, (8, 8), 24)
    names = [site.name for site in sites.operators(model.unet)][::-1]
    gone = [name for name in names if not kept[name]]
    assert gone == names[: len(gone)]
    left = np.cumsum([costs.total, *(-costs.sites[name] for name in gone)])
    assert left[-1] <= 0.75 * costs.total < left[-2]
    share = _record(output)["experts"][0]["share_of_macs"]
    assert share == pytest.approx(left[-1] / costs.total)
    assert dict(model_directory.open_model(output / "00").unet.kept_units) == dict.fromkeys(gone, 0)


def test_bksdm_is_written_as_a_plain_unet(tmp_path, model):
    two = dataclasses.replace(model.unet, layers_per_block=2)
    params = aptp_model.random_params(unet.param_shapes(two), 4)
    other = dataclasses.replace(model, unet=two)
    model_directory.save(other, {"unet": params}, tmp_path / "model", dtype=np.float32)
    other = model_directory.open_model(tmp_path / "model")
    output = slice.run(_run(other, tmp_path, criterion="bksdm-small"), MESH)
    expert = model_directory.open_model(output / "00")
    assert expert.unet == bksdm.student(two, "small")
    values = json.loads((output / "00" / "unet" / "config.json").read_text())
    assert (values["mid_block_type"], values["layers_per_block"]) == (None, 1)
    assert "kept_units" not in values
    written, want = model_directory.load(expert, "unet"), bksdm.cut(params, two, "small")[0]
    jax.tree.map(np.testing.assert_array_equal, written, want)


def test_budget_out_of_reach_is_refused_with_what_can_be(model, tmp_path):
    for criterion in ("norm", "obs"):
        with pytest.raises(ValueError, match=r"macs_budget is 0\.05, .* from 0\.\d{4}"):
            slice.run(_run(model, tmp_path, criterion=criterion, macs_budget=0.05), MESH)
    assert not (tmp_path / "experts").exists()


def test_card_says_what_is_cut(model, tmp_path):
    run = _run(model, tmp_path)
    assert "slice: norm, to 75.0% of the UNet's MACs" in cost_card.card(run, 8)
    run.slice.criterion = "bksdm-tiny"
    assert "slice: bksdm-tiny, to a fixed list of blocks" in cost_card.card(run, 8)


def test_experts_of_one_run_come_from_one_stage(model, tmp_path):
    run = _run(model, tmp_path)
    run.materialise = config.Materialise()
    with pytest.raises(ValueError, match=re.escape("would both write the run's experts")):
        checks.check(run)
    assert set(config.Slice.__dataclass_fields__["criterion"].metadata["legal"]) == set(
        get_args(criteria.Name)
    )
