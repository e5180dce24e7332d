"""The router's training: what it moves, what it costs, and that it goes on where it stopped."""

import dataclasses
import json

import aptp_model
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from aptp_toy import TOY

from sdprune_jax import config, sharding, sites
from sdprune_jax.aptp import codebook, gates, layout, router, router_training
from sdprune_jax.data import pictures
from sdprune_jax.files import model_directory
from sdprune_jax.models import unet
from sdprune_jax.sites import macs
from sdprune_jax.stages import router as router_stage
from sdprune_jax.training import encoded

LAYOUT = aptp_model.LAYOUT
_STEPS = {"num_steps": 4, "warmup_steps": 2, "ramp_steps": 1, "log_every": 1, "save_every": 2}
SECTION = config.Router(
    num_codes=3, macs_budget=0.7, batch_size=8, num_evals=1, data=aptp_model.DATA, **_STEPS
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return aptp_model.make(tmp_path_factory.mktemp("micro") / "model")


def _batch(warms_up=False):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {
        "embedding": draw(8, 12),
        "text": draw(8, 5, 12).astype(np.float16),
        "mean": draw(8, 4, 6, 4),
        "log_variance": draw(8, 4, 6, 4),
        "warms_up": np.full(8, warms_up),
    }


def _loss(model, **changes):
    section = dataclasses.replace(SECTION, **changes)
    costs = router_training.budget_costs(model, (4, 6), section.mac_counter)
    return router_stage.make_loss(section, model, costs, LAYOUT)


def _inputs():
    params = router.init_params(LAYOUT, 12, 3, 0)
    params["codes"] += np.random.default_rng(2).normal(-2.8, 1, params["codes"].shape).astype("f4")
    frozen = aptp_model.random_params(unet.param_shapes(aptp_model.UNET), 1)
    return jax.tree.map(jnp.asarray, (params, frozen))


def test_step_is_the_same_however_the_batch_is_sharded(model):
    params, frozen = _inputs()
    step = jax.value_and_grad(_loss(model), has_aux=True)
    found = []
    for data_axis, fsdp in ((1, 1), (4, 2)):
        mesh = sharding.make_mesh(data_axis, fsdp, jax.devices()[: data_axis * fsdp])
        placed = (
            sharding.fsdp_shardings(params, mesh, min_bytes=0),
            sharding.fsdp_shardings(frozen, mesh, min_bytes=0),
            sharding.batch_sharding(mesh),
            None,
        )
        jitted = jax.jit(step, in_shardings=placed)
        found.append(jax.device_get(jitted(params, frozen, _batch(), jax.random.key(0))))
    ((loss, metrics), grads), ((other_loss, others), other_grads) = found
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-5, atol=1e-6)
    for grad, other in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        np.testing.assert_allclose(other, grad, rtol=1e-4, atol=1e-5 * np.abs(grad).max())
        assert np.abs(grad).max() > 0  # of the heads by the contrastive loss, of the codes by all
    assert metrics["codes_used"] > 1


def test_gradients_of_the_unet_are_not_computed(model):
    # Two passes forward and one back to the gates, not also one back to the weights: 3 of 4 alike,
    # and what the router takes in both.
    loss_fn, (params, frozen) = _loss(model), _inputs()
    flops = {}
    for name, argnums in (("router", 0), ("all", (0, 1))):
        step = jax.jit(jax.grad(loss_fn, argnums=argnums, has_aux=True))
        lowered = step.lower(params, frozen, _batch(), jax.random.key(0))
        flops[name] = lowered.cost_analysis()["flops"]
    assert 0.5 < flops["router"] / flops["all"] < 0.8


def _moves(seeds, num_steps=5):
    optimizer = codebook.make_optimizer(0.1, ramp_steps=2, warmup_steps=2, seeds=seeds)
    params = {"predictor": {"w": jnp.ones(2)}, "codes": jnp.zeros((1, 2))}
    state, seen = optimizer.init(params), []
    for _ in range(num_steps):
        grads = {"predictor": {"w": jnp.ones(2)}, "codes": jnp.full((1, 2), 4.0)}
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(jax.device_get(params))
    return seen, state


def test_codes_rest_in_the_warm_up_and_then_start_their_moments():
    seen, state = _moves(None)
    # By constant gradients Adam moves by the rate, whatever their size: 0.05, then 0.1. In float32
    # its correction of the second moment, 1 - 0.999^t, is right to 1e-5.
    heads = [s["predictor"]["w"][0] for s in seen]
    np.testing.assert_allclose(heads, [0.95, 0.85, 0.75, 0.65, 0.55], rtol=1e-5)
    codes = [s["codes"][0, 0] for s in seen]
    np.testing.assert_allclose(codes, [0, 0, -0.1, -0.2, -0.3], rtol=1e-5)
    assert (int(state.predictor.count), int(state.codes.count)) == (5, 3)


def test_codes_are_seeded_by_the_last_step_of_the_warm_up():
    seen, _ = _moves(lambda predictor: 10 * predictor["w"][None])
    codes = [s["codes"][0, 0] for s in seen]
    np.testing.assert_allclose(codes, [0, 8.5, 8.4, 8.3, 8.2], rtol=1e-5)


def test_seeds_are_the_means_of_groups_that_are_alike():
    rng = np.random.default_rng(0)
    centres = np.where(rng.random((3, TOY.size)) < 0.5, -6.0, 0.0)
    centres[:, TOY.starts] = 0.0
    assert len(np.unique(centres, axis=0)) == 3
    group = np.repeat(np.arange(3), 20)
    logits = (centres[group] + 0.1 * rng.normal(size=(60, TOY.size))).astype(np.float32)
    order = rng.permutation(60)
    seeds = np.asarray(codebook.seed_codes(jnp.asarray(logits[order]), 3, TOY))
    want = np.stack([logits[group == i].mean(axis=0) for i in range(3)])
    nearest = np.abs(seeds[:, None] - want[None]).max(axis=2)
    assert sorted(nearest.argmin(axis=1)) == [0, 1, 2]
    np.testing.assert_allclose(nearest.min(axis=1), 0, atol=1e-5)


def _run(model, workdir, **changes):
    section = dataclasses.replace(SECTION, **changes)
    return config.Run(workdir=str(workdir), model=str(model.directory), router=section)


def test_interrupted_training_goes_on_to_the_same_bits(model, tmp_path, monkeypatch):
    mesh, whole, killed = sharding.make_mesh(4, 2), tmp_path / "whole", tmp_path / "killed"
    output = router_stage.run(_run(model, whole), mesh)
    record = json.loads((output / "router.json").read_text())
    assert record["figures"]["val_codes_used"] >= 1
    assert 0 < record["figures"]["lowest_macs"] <= record["figures"]["highest_macs"] <= 1
    before = (output / "model.safetensors").read_bytes()

    batch, calls = encoded.Examples.batch, []

    def fails(self, rows, seed):
        calls.append(seed)
        if seed[-1] == 3:
            raise KeyboardInterrupt
        return batch(self, rows, seed)

    monkeypatch.setattr(encoded.Examples, "batch", fails)
    with pytest.raises(KeyboardInterrupt):
        router_stage.run(_run(model, killed), mesh)
    assert not (killed / "router" / "router.json").exists()
    with pytest.raises(ValueError, match=r"learning_rate was 0.002, is 0.5(?s:.*)say --force"):
        router_stage.run(_run(model, killed, learning_rate=0.5), mesh)
    monkeypatch.setattr(encoded.Examples, "batch", batch)
    router_stage.run(_run(model, killed), mesh)
    assert (killed / "router" / "model.safetensors").read_bytes() == before
    assert len(calls) == 4

    monkeypatch.setattr(encoded.Examples, "batch", fails)  # not called: the output is complete
    assert router_stage.run(_run(model, whole), mesh) == output
    assert len(calls) == 4
    params, trained = router_training.load(whole, model_directory.open_model(model.directory), mesh)
    assert (trained.num_codes, trained.macs_budget, trained.data) == (3, 0.7, aptp_model.SOURCE)
    seeded = gates.soft_gates(params["codes"], gates.MEDIAN_NOISE, LAYOUT)
    assert np.ptp(np.asarray(seeded), axis=0).max() > 0.01  # the codes are no longer alike


def test_data_is_the_prompts_of_every_picture_and_computed_once(model, tmp_path, monkeypatch):
    mesh, images = sharding.make_mesh(), pictures.load(aptp_model.SOURCE, "train")
    prompts = pictures.prompts(images, "train", 0, captions_per_image=2)
    encoders = encoded.Encoders(model, mesh, tmp_path)
    make = lambda: encoded.encode(encoders, images, prompts.texts, flips=True)
    first = make()
    assert first.embedding.shape == (48, 12)
    assert first.mean.shape == (24, 2, 8, 8, 4)
    assert np.abs(first.mean[:, 0] - first.mean[:, 1]).max() > 1e-3
    monkeypatch.setattr(model_directory, "load", None)  # nothing is computed again
    np.testing.assert_array_equal(make().states, first.states)
    rows = np.array([0, 1, 47])
    batch = first.batch(rows, [3])
    np.testing.assert_array_equal(batch["text"], first.states[rows])
    for i, image in enumerate((0, 0, 23)):
        assert any(np.array_equal(batch["mean"][i], mean) for mean in first.mean[image])
    assert prompts.texts[0].startswith(("a ", "an "))
    one = pictures.prompts(images, "train", 0, captions_per_image=1)
    assert prompts.texts[::2] == one.texts


def test_budget_that_nothing_keeps_is_refused_before_pictures_are_encoded(model, tmp_path):
    section = dataclasses.replace(SECTION, macs_budget=0.02)
    run = config.Run(workdir=str(tmp_path / "run"), model=str(model.directory), router=section)
    with pytest.raises(ValueError, match=r"macs_budget is 0\.02.* expected from 0\."):
        router_stage.check(run, 8)


def test_lowest_share_is_one_unit_a_site_and_no_block_that_can_go():
    # Of Stable Diffusion 2 at a 32 x 32 latent, by the published counter.
    whole = unet.UNetConfig()
    layout_of_sd2 = layout.layout_of(sites.table(whole))
    costs = macs.by_site(whole, (32, 32), 77, "paper")
    assert router_training.lowest_share(costs, layout_of_sd2) == pytest.approx(0.1671, abs=5e-5)


def test_unknown_encoder_is_refused(model):
    with pytest.raises(ValueError, match="`text_encoder` or a directory of sentence-transformers"):
        encoded.embed(encoded.Encoders(model, sharding.make_mesh()), ["a cat"], "nowhere")
