"""Calibration of whole components against stored activations, and what it leaves out."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stored_inputs
from jax.sharding import AxisType

from sdprune_jax import pipeline, sharding, sites
from sdprune_jax.files import convert
from sdprune_jax.files.model_directory import ModelConfig
from sdprune_jax.models import clip, noise_schedule, samplers, unet, vae
from sdprune_jax.models.initial import init_params
from sdprune_jax.scoring import calibrate, inputs
from sdprune_jax.scoring.settings import CalibrationSettings

UNET = unet.UNetConfig(
    sample_size=4,
    block_out_channels=(8, 16),
    attention_head_dim=(1, 2),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=8,
    norm_num_groups=4,
)
TEXT = clip.TextConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=9,
    eos_token_id=49,
)
MODEL = ModelConfig(TEXT, UNET, vae.VAEConfig(), noise_schedule.Schedule(), pathlib.Path())
WALK = CalibrationSettings(
    num_steps=3, guidance_scale=3.0, batch_size=8, position_fraction=1.0, weight_range=(0.5, 1.5)
)
KEY = jax.random.key(3)


def _random_params(shapes, seed):
    rng = np.random.default_rng(seed)
    noisy = lambda x: x + rng.normal(size=x.shape, scale=0.2).astype(np.float32)
    return jax.tree.map(noisy, init_params(shapes, seed))


def _prompts(num=10):
    rng = np.random.default_rng(1)
    draw = lambda n: rng.normal(size=(n, 5, 8)).astype(np.float32)
    return np.concatenate([draw(num), draw(1)])


def _mesh(num_devices):
    if num_devices == jax.device_count():
        return sharding.make_mesh(num_devices // 4, 4)
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((1, 1), ("data", "fsdp"), axes, devices=jax.devices()[:num_devices])


@functools.cache
def _walked():
    """Kernel shape and Gram matrix of every layer, by a loop over prompts and calls."""
    params = _random_params(unet.param_shapes(UNET), 0)
    *text, negative = _prompts()
    table = samplers.timetable(MODEL.schedule, None, WALK.num_steps)
    assert len(table.timestep) == 4  # PNDM makes one call more
    rise = np.log(np.arange(4, 0, -1)) / np.log(4)
    noise = pipeline.image_noise(jax.random.split(KEY)[0], jnp.arange(10), (4, 4, 4))
    forward = jax.jit(lambda *args: stored_inputs.stored(unet.UNet(UNET).apply, params, *args))
    context = np.stack([negative] * 10 + text)
    state, grams = samplers.start(noise), {}
    flat = convert.flatten(params)
    for number, row in enumerate(zip(*table, strict=True)):
        row = samplers.Timetable(*row)
        x = jnp.concatenate([state.x, state.x])
        out, stored = forward(x, jnp.broadcast_to(jnp.asarray(row.timestep), 20), context)
        without, prompted = jnp.split(out, 2)
        state = samplers.step(state, row, without + 3 * (prompted - without))
        for path, read in stored.items():
            rows, kernel = np.asarray(read), flat[path].shape
            if len(kernel) == 4:
                stride, pad = 1 + ("downsamplers" in path), kernel[0] // 2
                rows = stored_inputs.patches(rows, kernel, (stride, stride), [(pad, pad)] * 2)
            rows = rows.reshape(20, -1, rows.shape[-1])
            gram = stored_inputs.gram(rows, np.full(20, 0.5 + rise[number]))
            weight = (0.5 + rise[number]) * 20 * rows.shape[1]
            old = grams.get(path, (0, 0))
            grams[path] = (old[0] + gram, old[1] + weight)
    return params, grams


@pytest.mark.parametrize(("num_devices", "statistic"), [(8, "moments"), (8, "gram"), (1, "gram")])
def test_the_unet_is_calibrated_along_its_trajectory(num_devices, statistic):
    params, grams = _walked()
    paths = sites.prunable(unet.param_shapes(UNET), "unet", "all")
    assert set(paths) == set(grams)
    got = calibrate.unet_statistics(
        MODEL, params, _mesh(num_devices), _prompts(), paths, statistic, KEY, WALK
    )
    assert set(got) == set(paths)
    num_time = 0
    for path, stats in got.items():
        want, weight = grams[path]
        if path.startswith("time_embedding") or "time_emb_proj" in path:
            num_time += 1
            continue
        stored_inputs.assert_close(
            stats.moment, want if statistic == "gram" else np.diag(want), path
        )
        np.testing.assert_allclose(stats.weight, weight, rtol=1e-5)
    assert num_time == 2 + 8


def test_layers_of_the_time_embedding_read_every_timestep():
    params, _ = _walked()
    paths = [*inputs.TIME[:2], "mid_block.resnets.1.time_emb_proj.kernel"]
    walk = CalibrationSettings(num_steps=1, batch_size=1, timestep_weights="linear_increasing")
    mesh = _mesh(1)
    run = calibrate.unet_statistics
    got = run(MODEL, params, mesh, _prompts(1), paths, "gram", KEY, walk)

    @jax.jit
    def read(*args):
        stored = stored_inputs.stored(unet.UNet(UNET).apply, params, *args)[1]
        return {path: stored[path] for path in paths}  # no more is computed

    stored = read(jnp.zeros((1000, 2, 2, 4)), jnp.arange(1000), jnp.zeros((1000, 1, 8)))
    weight = np.linspace(1.2, 0.8, 1000)  # timestep 999, the noisiest, weighs least
    for path in paths:
        stored_inputs.assert_close(got[path].moment, stored_inputs.gram(stored[path], weight), path)
        np.testing.assert_allclose(got[path].weight, 1000, rtol=1e-5)


def test_layers_that_read_the_same_share_one_array():
    params, _ = _walked()
    text = _prompts(1)
    block = "up_blocks.1.attentions.0.transformer_blocks.0"
    paths = [f"{block}.attn1.to_{x}.kernel" for x in "qkv"]
    other = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.kernel"
    paths += [f"{block}.attn2.to_k.kernel", other]
    walk = CalibrationSettings(num_steps=1, batch_size=1, guidance_scale=1.0)
    got = calibrate.unet_statistics(MODEL, params, _mesh(1), text, paths, "moments", KEY, walk)
    assert len({id(got[path].moment) for path in paths[:3]}) == 1
    assert got[other].moment is got[paths[3]].moment
    np.testing.assert_allclose(got[other].moment, 1.2 * (text[0] ** 2).sum(axis=0), rtol=1e-5)


def _ids():
    ids = np.array([[48, 3, 5, 49, 7, 7], [48, 49, 0, 0, 0, 0], [48, 9, 9, 9, 9, 49]], np.int32)
    return ids, np.array([4, 2, 6])  # tokens up to the end of each text


@pytest.mark.parametrize(
    ("mask_pads", "num_devices", "statistic"),
    [(True, 1, "gram"), (False, 1, "gram"), (True, 8, "gram"), (True, 8, "moments")],
)
def test_pads_of_a_text_are_left_out_unless_asked_for(mask_pads, num_devices, statistic):
    ids, lengths = _ids()
    params = _random_params(clip.text_param_shapes(TEXT), 0)
    paths = sites.prunable(params, "text_encoder", "linear")
    settings = CalibrationSettings(batch_size=max(2, num_devices), mask_pads=mask_pads)
    got = calibrate.text_statistics(
        TEXT, params, _mesh(num_devices), ids, paths, statistic, settings
    )
    assert set(got) == set(paths)
    stored = jax.jit(lambda ids: stored_inputs.stored(clip.TextTower(TEXT).apply, params, ids)[1])(
        ids
    )
    mask = np.arange(6)[None] < (lengths if mask_pads else np.full(3, 6))[:, None]
    for path in paths:
        rows = np.asarray(stored[path])[mask]
        want = stored_inputs.gram(rows[:, None], np.ones(len(rows)))
        stored_inputs.assert_close(
            got[path].moment, want if statistic == "gram" else np.diag(want), path
        )
        assert float(got[path].weight) == mask.sum()


def test_failed_calibrations_name_the_layers():
    ids, _ = _ids()
    params = _random_params(clip.text_param_shapes(TEXT), 0)
    paths = sites.prunable(params, "text_encoder", "linear")
    run = lambda ids, paths: calibrate.text_statistics(
        TEXT, params, _mesh(1), ids, paths, "moments", CalibrationSettings()
    )
    settings = CalibrationSettings(batch_size=3)
    with pytest.raises(ValueError, match=r"no prompt; batch_size is 3, expected a multiple of 8"):
        calibrate.text_statistics(TEXT, params, _mesh(8), ids[:0], paths, "moments", settings)
    with pytest.raises(ValueError, match=r"no such kernels:\n  text_model\.x\.kernel"):
        run(ids, ["text_model.x.kernel"])
    second = params["text_model"]["encoder.layers.1"]
    second["layer_norm2"] = {"scale": np.full(16, np.nan, np.float32), "bias": np.zeros(16)}
    with pytest.raises(ValueError, match="not finite") as error:
        run(ids, paths)
    bad = [line.split()[0] for line in str(error.value).splitlines()[1:]]
    assert len(bad) == 2
    assert bad == [path for path in paths if "layers.1.mlp" in path]
