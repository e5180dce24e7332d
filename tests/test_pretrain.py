import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax import config, pipeline
from sdprune_jax.data import emoji
from sdprune_jax.data.order import rows_of_batch
from sdprune_jax.models import clip, vae
from sdprune_jax.models.initial import init_params
from sdprune_jax.pretrain import autoencoder, contrastive, soup
from sdprune_jax.stages import pretrain
from sdprune_jax.training import settings_file


def _vae():
    return pretrain.configure_vae(config.PretrainVAE(widths=(8, 8), norm_num_groups=4))


def test_centred_latents_decode_to_the_same_images(tmp_path):
    vae_config = _vae()
    params = init_params(vae.param_shapes(vae_config), 0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)
    images = rng.integers(0, 256, size=(6, 64, 64, 3), dtype=np.uint8)
    pairs = emoji.Pairs(images, np.zeros(6, np.int32), np.zeros(6, np.int32))
    reconstruct = lambda params: vae.VAE(vae_config).apply(
        {"params": params}, pipeline.to_float(images)
    )
    before = reconstruct(params)
    new_config, new_params, latents = autoencoder.encode(
        vae_config, params, {"train": pairs}, tmp_path
    )
    np.testing.assert_allclose(reconstruct(new_params), before, atol=2e-4)
    mean = latents["train"]["mean"]
    np.testing.assert_allclose(mean.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(mean.std() * new_config.scaling_factor, 1, atol=1e-4)
    again = autoencoder.encode(vae_config, params, {"train": pairs}, tmp_path)[2]
    np.testing.assert_array_equal(again["train"]["mean"], mean)
    assert len(list(tmp_path.iterdir())) == 1  # computed once


def test_text_encoder_is_the_tower_without_its_last_layer():
    section = config.PretrainCLIP(text_layers=3, vision_layers=1, width=16, heads=2)
    clip_config = pretrain.configure_clip(section, 600)
    params = init_params(clip.clip_param_shapes(clip_config), 0)
    text_config, kept = contrastive.text_encoder(clip_config, params)
    shapes = clip.text_param_shapes(text_config)
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(lambda s: s.shape, shapes)
    assert "encoder.layers.1" in kept["text_model"]
    assert "encoder.layers.2" not in kept["text_model"]


def test_training_goes_on_with_the_settings_that_it_began_with(tmp_path):
    section = config.Pretrain()
    keep = lambda seed=0, force=False: settings_file.keep(
        tmp_path, {"seed": seed} | dataclasses.asdict(section), force
    )
    assert not keep(seed=2)
    assert not keep()  # what was not begun binds nobody
    (tmp_path / "clip" / "checkpoints" / "200").mkdir(parents=True)
    assert keep()
    section.unet.training.num_steps, section.clip.training.log_every = 8000, 7  # may change
    keep()
    section.unet.training.learning_rate, section.vae.widths = 0.5, (8, 16)
    with pytest.raises(ValueError, match="begun with other settings") as error:
        keep(seed=1)
    changed = ["seed", "unet.training.learning_rate", "vae.widths"]
    values = ["0, is 1", "0.001, is 0.5", "[16, 32, 64], is [8, 16]"]
    for name, value in zip(changed, values, strict=True):
        assert f"{name} was {value}" in str(error.value)
    assert "say --force" in str(error.value)
    assert "num_steps" not in str(error.value)
    keep(seed=1, force=True)
    keep(seed=1)
    forced = json.loads((tmp_path / "settings.json").read_text())["forced"]
    assert [change.split(" was ")[0] for change in forced] == changed


def test_varied_images_stay_on_white():
    images = np.ones((4, 64, 64, 3), np.float32)
    images[:, 20:44, 20:44] = -1
    varied = np.asarray(jax.jit(contrastive.varied)(jnp.asarray(images), jax.random.key(0)))
    np.testing.assert_allclose(varied[:, :8], 1, atol=1e-6)
    assert varied.min() > -1.01
    assert len({image.tobytes() for image in varied}) == 4


def test_warped_images_keep_their_white_edge_and_without_strength_all_their_ink():
    images = np.ones((8, 32, 32, 3), np.float32)
    images[:, 12:20, 10:22] = (-1, 0, 0.5)
    warp = jax.jit(soup.warped, static_argnames="strength")
    moved, turned = (np.asarray(warp(images, jax.random.key(3), strength=s)) for s in (0.0, 1.0))
    for each in (moved, turned):
        np.testing.assert_allclose(each[:, :2], 1, atol=1e-3)
        assert len({image.tobytes() for image in each}) == 8
    np.testing.assert_allclose((1 - moved).sum((1, 2)), (1 - images).sum((1, 2)), rtol=5e-3)
    assert np.ptp((1 - turned).sum((1, 2, 3))) > 50  # some are smaller, some paler


def test_the_mean_of_clips_leaves_what_the_unet_reads_as_it_was():
    layer = lambda *values: {"kernel": np.float32(values)}
    kept = layer(0.9470809698104858, 0.7)  # three times the first, divided by three, is another
    copies = [
        {"text_model": {"first": kept, "last": layer(x)}, "scale": np.float32(x)} for x in (1, 2, 6)
    ]
    assert (np.mean([kept["kernel"]] * 3, axis=0) != kept["kernel"]).any()
    mean = soup.mean(copies, {"first": kept})
    np.testing.assert_array_equal(mean["text_model"]["first"]["kernel"], kept["kernel"])
    assert (mean["text_model"]["last"]["kernel"], mean["scale"]) == (3, 3)


def test_rows_of_one_group_come_in_runs():
    groups = np.arange(480) % 10
    rows = rows_of_batch(480, 96, 1, seed=0, groups=groups)
    counts = np.bincount(groups[rows], minlength=10)
    assert (counts % 24 == 0).all()
    seen = np.concatenate([rows_of_batch(480, 96, s, seed=0, groups=groups) for s in range(5)])
    assert sorted(seen) == list(range(480))


def test_an_image_is_read_through_the_patches_that_are_kept_and_no_others():
    section = config.PretrainCLIP(width=32, heads=2, vision_layers=2, text_layers=2)
    settings = pretrain.configure_clip(section, 600)
    params = init_params(clip.clip_param_shapes(settings), 0)
    embed = jax.jit(partial(clip.CLIP(settings).apply, {"params": params}, method="embed_images"))
    image = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    shuffled = np.random.default_rng(1).permutation(64)
    np.testing.assert_allclose(embed(image, np.stack([shuffled] * 2)), embed(image), atol=1e-5)

    kept = contrastive.halves(2, settings.vision, [0, 0])
    assert [len(set(row)) for row in kept.tolist()] == [32, 32]
    changed = image.copy()
    for row, patches in enumerate(kept):
        for patch in set(range(64)) - set(patches.tolist()):
            top, left = patch // 8 * 8, patch % 8 * 8
            changed[row, top : top + 8, left : left + 8] = 5
    np.testing.assert_allclose(embed(changed, kept), embed(image, kept), atol=1e-5)
    assert np.abs(embed(changed) - embed(image)).max() > 1e-2
