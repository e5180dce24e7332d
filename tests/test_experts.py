"""Assignment of prompts and the models cut for it: balanced, on budget, reproducible, exact."""

import dataclasses
import functools
import json
import pathlib
import shutil

import aptp_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax import artefacts, config
from sdprune_jax.aptp import assignment, balance, layout, router_training
from sdprune_jax.data import pictures
from sdprune_jax.files import model_directory
from sdprune_jax.models import unet
from sdprune_jax.stages import assign, materialise
from sdprune_jax.training import encoded

LAYOUT = aptp_model.LAYOUT
MESH = aptp_model.MESH


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return aptp_model.make(tmp_path_factory.mktemp("micro") / "model")


@pytest.fixture(scope="module")
def work(model, tmp_path_factory):
    """A run whose prompts are assigned and whose experts are cut, by a router made by hand."""
    workdir = tmp_path_factory.mktemp("work")
    aptp_model.write_router(workdir, model)
    run = _run(model, workdir)
    assign.run(run, MESH)
    materialise.run(run, MESH)
    return workdir


def _run(model, workdir, **changes):
    sections = {"assign": config.Assign(**changes), "materialise": config.Materialise(True)}
    return config.Run(workdir=str(workdir), model=str(model.directory), **sections)


def _texts(split):
    return pictures.prompts(pictures.load(aptp_model.SOURCE, split), split, 0, 2).texts


def _similarity(rows, seed=0):
    """Nearly all prompts like the first of four codes best, and none the last."""
    rng = np.random.default_rng(seed)
    found = 0.9 + 0.01 * rng.normal(size=(rows, 4))
    return (found + np.array([0.04, 0.0, 0.0, -0.05])[None]).astype(np.float32)


def _figures(similarity, offsets):
    expert = assignment.nearest(similarity, offsets)
    return balance.figures(expert, np.ones(len(offsets)), 1.0, {})


def test_offsets_of_some_prompts_balance_others():
    unseen = _similarity(2000, seed=1)
    before = _figures(unseen, np.zeros(4, np.float32))
    assert before.largest_share > 0.9
    assert before.dead == [3]
    after = _figures(unseen, balance.offsets(_similarity(2000)))
    assert after.dead == []
    assert after.smallest_share > 0.22
    assert after.largest_share < 0.28


def test_similarity_that_is_not_finite_is_refused():
    similarity = _similarity(10)
    similarity[3, 1] = np.nan
    with pytest.raises(ValueError, match="of 1 prompts are not finite"):
        balance.offsets(similarity)


def test_codes_that_are_alike_are_reported_as_dead():
    same = np.ones((12, 3), np.float32)
    figures = _figures(same, balance.offsets(same))
    assert figures.dead == [1, 2]
    assert figures.prompts == [12, 0, 0]


def test_budget_is_kept_by_shifting_all_logits():
    logits = np.linspace(-1, 1, 101)[None]
    keep_at = lambda shift: logits + shift >= 0
    mean = lambda keep: keep.mean(axis=1)
    shift, keep = balance.fit_budget(keep_at, mean, 0.75, 1)
    assert keep.mean() == pytest.approx(0.75, abs=0.5 / 101 + 1e-9)
    assert shift == pytest.approx(0.5, abs=0.03)
    already, _ = balance.fit_budget(keep_at, mean, 51 / 101, 1)
    assert already == 0


def test_budget_can_be_kept_by_every_expert():
    logits = np.linspace(-1, 1, 101) + np.array([[-0.4], [0.0], [0.3]])
    keep_at, mean = lambda shift: logits + shift >= 0, lambda keep: keep.mean(axis=1)
    shift, keep = balance.fit_budget(keep_at, mean, 0.75, 3)
    np.testing.assert_allclose(keep.mean(axis=1), 0.75, atol=0.5 / 101 + 1e-9)
    np.testing.assert_allclose(shift, [0.9, 0.5, 0.2], atol=0.03)


def test_information_is_the_entropy_of_equal_labels_and_none_of_independent_ones():
    a = np.repeat(np.arange(4), 25)
    assert balance.mutual_information(a, a) == pytest.approx(np.log(4))
    assert balance.mutual_information(a, np.tile(np.arange(5), 20)) == pytest.approx(0, abs=1e-12)


def test_assignment_depends_on_the_prompt_alone(model, work):
    params, _ = router_training.load(work, model, MESH)
    code_gates = jnp.asarray(np.load(work / "assign" / "code_gates.npy"))
    texts = _texts("train")
    embedding = encoded.embed(encoded.Encoders(model, MESH), texts)
    order = np.random.default_rng(0).permutation(len(texts))[:29]
    offsets = np.load(work / "assign" / "offsets.npy")
    stored = np.load(work / "assign" / "experts_train.npy")
    for noise, is_same in (("none", True), ("published", False)):
        found = assignment.similarities(params, embedding, LAYOUT, code_gates, noise)
        moved = assignment.similarities(params, embedding[order], LAYOUT, code_gates, noise)
        assert (np.abs(moved - found[order]).max() < 1e-5) == is_same
        if is_same:
            np.testing.assert_array_equal(assignment.nearest(found, offsets), stored)
            np.testing.assert_array_equal(assignment.nearest(moved, offsets), stored[order])
    new = [texts[i] for i in order]
    np.testing.assert_array_equal(assignment.assign(work, model, new, MESH), stored[order])
    assert len(set(stored)) == 3


def test_assignment_reports_balance_and_budget(work):
    record = json.loads((work / "assign" / "assign.json").read_text())
    keep = np.load(work / "assign" / "architectures.npy")
    stored = np.load(work / "assign" / "experts_train.npy")
    train = record["splits"]["train"]
    assert train["prompts"] == np.bincount(stored, minlength=3).tolist()
    assert train["dead"] == []
    # 48 prompts in thirds, whatever the router itself would have liked best.
    assert train["largest_share"] <= 18 / 48
    assert train["macs"] == pytest.approx(0.7, rel=0.02)
    mean = np.array(record["macs_of_experts"])[stored].mean()
    assert train["macs"] == pytest.approx(mean)
    assert abs(np.array(record["macs_of_codes"])[stored].mean() - 0.7) > abs(mean - 0.7)
    assert {"information_style", "information_group_shuffled"} <= train.keys()
    apart = [(keep[i] != keep[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert record["units_that_differ"] == pytest.approx(np.mean(apart))
    assert np.add.reduceat(keep[:, : LAYOUT.num_width], LAYOUT.starts, axis=1).all()


def test_published_assignment_is_neither_balanced_nor_fitted(model, work, tmp_path):
    aptp_model.write_router(tmp_path, model)
    run = _run(model, tmp_path, balance="none", fit_budget="none", final_codes="draw")
    assign.run(run, MESH)
    record = json.loads((tmp_path / "assign" / "assign.json").read_text())
    assert record["logit_shift"] == [0]
    assert record["macs_of_codes"] == record["macs_of_experts"]
    assert not np.load(tmp_path / "assign" / "offsets.npy").any()
    ours = np.load(work / "assign" / "code_gates.npy")
    assert np.abs(np.load(tmp_path / "assign" / "code_gates.npy") - ours).max() > 0.1


def test_every_expert_keeps_the_budget_or_their_average_if_asked(model, work, tmp_path):
    aptp_model.write_router(tmp_path, model)
    assign.run(_run(model, tmp_path, fit_budget="average"), MESH)
    record, average = (
        json.loads((path / "assign" / "assign.json").read_text()) for path in (work, tmp_path)
    )
    assert len(record["logit_shift"]) == len(record["macs_of_experts"]) == 3
    assert len(average["logit_shift"]) == 1
    assert average["splits"]["train"]["macs"] == pytest.approx(0.7, rel=0.02)
    assert np.ptp(record["macs_of_experts"]) < np.ptp(average["macs_of_experts"])


@functools.cache
def _compiled(unet_config):
    return jax.jit(unet.UNet(unet_config).apply)


def _forward(unet_config, params, gates=None):
    rng = np.random.default_rng(3)
    inputs = (
        rng.normal(size=(2, 8, 8, 4)).astype(np.float32),
        np.array([10, 700]),
        rng.normal(size=(2, 5, 12)).astype(np.float32),
    )
    return np.asarray(_compiled(unet_config)({"params": params}, *inputs, gates))


def test_expert_computes_what_the_gated_unet_computes(model, work):
    keep = np.load(work / "assign" / "architectures.npy")
    dense = model_directory.load(model, "unet")
    record = json.loads((work / "experts" / "experts.json").read_text())
    assigned = json.loads((work / "assign" / "assign.json").read_text())
    to_gates = lambda vector: layout.to_gates(jnp.asarray(vector, jnp.float32), LAYOUT)
    gated = _forward(model.unet, dense, to_gates(np.stack([keep[1]] * 2)))
    for name, gates in (("01", None), ("01_dense", to_gates(np.ones((2, LAYOUT.size))))):
        expert = model_directory.open_model(work / "experts" / name)
        found = _forward(expert.unet, model_directory.load(expert, "unet"), gates)
        np.testing.assert_allclose(found, gated, rtol=0, atol=1e-5 * np.abs(gated).max())
    for row, share in zip(record["experts"], assigned["macs_of_experts"], strict=True):
        expert = model_directory.open_model(work / "experts" / row["directory"])
        sizes = jax.tree.map(lambda x: x.size, model_directory.param_shapes(expert, "unet"))
        assert row["parameters"] == sum(jax.tree.leaves(sizes))
        assert row["parameters"] < record["dense"]["parameters"]
        assert row["share_of_macs"] == pytest.approx(share, rel=1e-6)
    whole = model.directory / "vae" / "diffusion_pytorch_model.safetensors"
    shared = work / "experts" / "02" / "vae" / "diffusion_pytorch_model.safetensors"
    assert shared.read_bytes() == whole.read_bytes()


def test_every_prompt_is_that_of_one_expert(work):
    for split in ("train", "val", "test"):
        found = [
            text
            for path in sorted((work / "experts").glob("*/prompts.json"))
            for text in json.loads(path.read_text())[split]
        ]
        assert sorted(found) == sorted(_texts(split))


def test_finished_stages_are_kept_until_their_inputs_change(model, work):
    files = [work / "assign" / "assign.json", work / "experts" / "experts.json"]
    before = [path.stat().st_mtime_ns for path in files]
    run = _run(model, work)
    assert assign.run(run, MESH) == work / "assign"
    assert materialise.run(run, MESH) == work / "experts"
    assert [path.stat().st_mtime_ns for path in files] == before
    changed = dataclasses.replace(run, materialise=config.Materialise(save_dtype="float16"))
    materialise.run(changed, MESH)
    assert files[1].stat().st_mtime_ns != before[1]
    assert not (work / "experts" / "01_dense").exists()
    materialise.run(run, MESH)  # for the other tests
    assert not list(work.glob("*.partial"))


def test_an_assignment_by_another_router_is_not_cut(model, work, tmp_path):
    shutil.copytree(work / "router", tmp_path / "router")
    shutil.copytree(work / "assign", tmp_path / "assign")
    anew = lambda values: values["made_from"].update({"by": "another hand"})
    aptp_model.rewrite(artefacts.output_of("router", tmp_path), anew)
    with pytest.raises(ValueError, match=r"not of the router beside it: .*assign=build"):
        materialise.run(_run(model, tmp_path), MESH)
    assert not (tmp_path / "experts").exists()


def test_a_router_of_another_model_is_refused(model, work, tmp_path):
    router_training.load(work, model, MESH)
    shutil.copytree(work / "router", tmp_path / "router")
    other = lambda values: values["made_from"]["model"].update({"unet/config.json": "0" * 64})
    aptp_model.rewrite(artefacts.output_of("router", tmp_path), other)
    with pytest.raises(ValueError, match=r"another model .* differs in unet/config\.json"):
        router_training.load(tmp_path, model, MESH)


def test_stage_whose_input_is_missing_says_which_to_run(model, tmp_path):
    run = _run(model, tmp_path)
    with pytest.raises(ValueError, match=r"no finished router: .*--config\.router=build"):
        assign.run(run, MESH)
    with pytest.raises(ValueError, match=r"no assignment of prompts: .*--config\.assign=build"):
        materialise.run(run, MESH)
    assert list(pathlib.Path(tmp_path).iterdir()) == []
