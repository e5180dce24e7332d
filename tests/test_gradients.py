"""Gradients summed over timesteps, and unstructured pruning by them."""

import dataclasses
import json
import re

import aptp_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax import config, pipeline, sharding
from sdprune_jax.config import checks
from sdprune_jax.files import convert, model_directory
from sdprune_jax.models import noise_schedule, unet
from sdprune_jax.pruning import request, scores, selection
from sdprune_jax.pruning.methods import Taylor
from sdprune_jax.scoring import gradients
from sdprune_jax.scoring.settings import GradientSettings
from sdprune_jax.stages import prune

MESH = sharding.make_mesh()
ONE = jax.sharding.Mesh(MESH.devices[:1, :1], MESH.axis_names)  # for one device, XLA is quick
SETTINGS = GradientSettings(num_images=9, batch_size=8, num_timesteps=4, loss_threshold=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return aptp_model.make(tmp_path_factory.mktemp("micro") / "model")


@pytest.fixture(scope="module")
def params(model):
    return jax.tree.map(np.asarray, model_directory.load(model, "unet", dtype=np.float32))


def _pictures():
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(9, 8, 8, 4)).astype(np.float32)
    return latents, rng.normal(size=(9, 5, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def found(model, params):
    return gradients.sums(model, params, ONE, *_pictures(), SETTINGS, 7)


def test_losses_are_of_all_pictures_under_the_same_noise(model, params, found):
    x0, text = (jnp.asarray(x) for x in _pictures())
    noise = pipeline.image_noise(jax.random.key(7), jnp.arange(9), (8, 8, 4))
    alphas = noise_schedule.alphas_cumprod(model.schedule)
    apply, losses = jax.jit(unet.UNet(model.unet).apply), []
    for timestep in (0, 250, 500, 750):
        alpha = np.float32(alphas[timestep])
        noisy = np.sqrt(alpha) * x0 + np.sqrt(1 - alpha) * noise
        assert model.schedule.prediction_type in ("epsilon", "v_prediction")
        target = noise
        if model.schedule.prediction_type == "v_prediction":
            target = np.sqrt(alpha) * noise - np.sqrt(1 - alpha) * x0
        out = apply({"params": params}, noisy, jnp.full(9, timestep), text)
        losses.append(float(jnp.mean((out - target) ** 2)))
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)


def test_gradients_are_the_slope_of_the_sum_of_losses(model, params, found):
    rng = np.random.default_rng(1)
    step = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * abs(x), params)

    def total(size):
        moved = jax.tree.map(lambda x, d: x + np.float32(size) * d, params, step)
        return sum(gradients.sums(model, moved, ONE, *_pictures(), SETTINGS, 7).losses)

    products = jax.tree.map(lambda g, d: float(np.sum(np.float64(g) * d)), found.grads, step)
    slope = sum(jax.tree.leaves(products))
    assert abs(slope) > 0.1
    np.testing.assert_allclose((total(1e-3) - total(-1e-3)) / 2e-3, slope, rtol=5e-3)


def test_the_sum_ends_at_the_first_timestep_whose_loss_is_small(model, params, found):
    falls = next(i for i in range(1, 4) if found.losses[i] < max(found.losses[:i]))
    settings = dataclasses.replace(SETTINGS, loss_threshold=1.0)
    ended = gradients.sums(model, params, ONE, *_pictures(), settings, 7)
    np.testing.assert_allclose(ended.losses, found.losses[:falls], rtol=1e-6)
    first = jax.tree.leaves(ended.grads)[0]
    assert np.abs(first - jax.tree.leaves(found.grads)[0]).max() > 1e-6


def test_batch_that_does_not_divide_is_refused(model, params):
    settings = dataclasses.replace(SETTINGS, batch_size=9)
    with pytest.raises(ValueError, match="batch_size is 9, expected a multiple of the 8 devices"):
        gradients.sums(model, params, MESH, *_pictures(), settings, 7)


def test_stage_prune_removes_what_changes_the_loss_least(model, params, tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    asked = []

    def of_pictures(model, given, mesh, settings, seed, variant):
        del model, mesh
        jax.tree.map(np.testing.assert_array_equal, given, params)
        asked.append((settings, seed, variant))
        return gradients.Sums(grads, [1.0])

    monkeypatch.setattr(gradients, "of_pictures", of_pictures)
    part = config.PruneComponent(sparsity=0.4, method="taylor", scope="linear+conv")
    section = config.Prune(unet=part)
    section.calibration.gradients = config.Gradients(**dataclasses.asdict(SETTINGS))
    output = prune.run(
        config.Run(workdir=str(tmp_path), model=str(model.directory), prune=section, seed=3), MESH
    )
    assert asked == [(SETTINGS, 3, None)]
    pruned = convert.flatten(model_directory.load(model_directory.open_model(output), "unet"))
    dense, slopes = convert.flatten(params), convert.flatten(grads)
    record = json.loads((tmp_path / "prune.json").read_text())["components"]["unet"]
    assert record["method"] == "taylor"
    assert record["of_prunable"] == pytest.approx(0.4, abs=1e-3)
    for path in ("mid_block.resnets.0.conv1.kernel", "time_embedding.linear_1.kernel"):
        changes, keep = np.abs(dense[path] * slopes[path]), np.asarray(pruned[path]) != 0
        assert changes[~keep].max() <= changes[keep].min()
        np.testing.assert_array_equal(np.asarray(pruned[path])[keep], dense[path][keep])


def test_layers_may_share_a_threshold_on_the_change_of_the_loss():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    kernels = {"a.kernel": draw(8, 6), "b.kernel": 3 * draw(6, 9)}
    slopes = {path: draw(*kernel.shape) for path, kernel in kernels.items()}
    method = Taylor(0.5, group="component")
    removed = selection.removed_of_each(kernels, method, slopes)
    found = dict(selection.prune(kernels, method, removed, slopes, jax.random.key(0)))
    changes = {path: scores.taylor(kernels[path], slopes[path]) for path in kernels}
    gone = np.concatenate([changes[path][~found[path].keep] for path in kernels])
    stay = np.concatenate([changes[path][found[path].keep] for path in kernels])
    assert gone.max() <= stay.min()
    assert len(gone) == sum(removed.values()) == 51
    with pytest.raises(ValueError, match="whose scores are of one scale"):
        request.check(kernels, dataclasses.replace(method, group="normalised"))


def test_text_encoder_has_no_taylor():
    part = config.PruneComponent(method="taylor")
    run = config.Run(
        prune=config.Prune(text_encoder=part),
        sweep=config.Sweep(points=(config.SweepPoint(unet=part), config.SweepPoint(part))),
    )
    with pytest.raises(ValueError, match=re.escape("config.prune.text_encoder.method")) as error:
        checks.check(run)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 2
    assert lines[1].split(",")[0].strip() == "config.sweep.points[1].text_encoder.method is taylor"
