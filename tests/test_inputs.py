"""Packages of layers, and the weights of timesteps."""

import itertools
import math

import numpy as np
import pytest

from sdprune_jax import sites
from sdprune_jax.files import convert
from sdprune_jax.models import clip, unet
from sdprune_jax.scoring import inputs, settings

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


def test_layers_are_packed_in_the_order_of_their_use():
    paths = sites.prunable(unet.param_shapes(UNET), "unet", "all")
    (whole,) = inputs.packages(UNET, paths, "gram")
    assert sorted(whole) == sorted(paths)
    assert whole[0] == "time_embedding.linear_1.kernel"
    assert whole[-1] == "conv_out.kernel"
    shapes = convert.flatten(unet.param_shapes(UNET))
    size = lambda package: sum(
        4 * math.prod(shapes[group[0]].shape[:-1]) ** 2 for group in inputs.groups(package).values()
    )
    largest = max(size([path]) for path in paths)
    split = inputs.packages(UNET, paths, "gram", largest)
    assert [path for package in split for path in package] == whole
    assert max(map(size, split)) <= largest
    assert all(size([*a, b[0]]) > largest for a, b in itertools.pairwise(split))
    for path in paths:  # what is read together is solved together
        (package,) = [package for package in split if path in package]
        assert {p for p in paths if inputs.input_of(p) == inputs.input_of(path)} <= set(package)
    with pytest.raises(ValueError, match=r"resnets\.0\.conv1\.kernel: 331,776 bytes"):
        inputs.packages(UNET, paths, "gram", 331_775)


def test_layers_of_the_text_encoder_are_packed_by_number_not_by_name():
    config = clip.TextConfig(num_hidden_layers=12)
    paths = sites.prunable(clip.text_param_shapes(config), "text_encoder", "linear")
    split = inputs.packages(config, paths, "gram", 4 * (3 * 1024**2 + 4096**2))
    numbers = [{int(path.split(".")[3]) for path in package} for package in split]
    assert numbers == [{i} for i in range(12)]


def test_sd2_needs_the_memory_that_is_planned_for():
    shapes = unet.param_shapes(unet.UNetConfig())
    sizes = {path: leaf.shape for path, leaf in convert.flatten(shapes).items()}
    total = lambda paths: sum(
        4 * math.prod(sizes[group[0]][:-1]) ** 2 for group in inputs.groups(paths).values()
    )
    linear = sites.prunable(shapes, "unet", "linear")
    convolutions = [path for path in sites.prunable(shapes, "unet", "all") if path not in linear]
    assert round(total(linear) / 1e9, 2) == 1.16
    assert round(total(convolutions) / 1e9, 1) == 26.7


@pytest.mark.parametrize(
    ("num_calls", "expected"),
    [
        (1, [1.2]),
        (3, [1.2, 1.052372, 0.8]),
        (5, [1.2, 1.144541, 1.073042, 0.972271, 0.8]),
    ],
)
def test_timestep_weights_are_the_golden_ones(num_calls, expected):
    got = settings.timestep_weights(num_calls, "log_decreasing")
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_timestep_weights_of_25_calls_are_the_golden_ones():
    got = settings.timestep_weights(25, "log_decreasing")
    np.testing.assert_allclose(got[:5], [1.2, 1.194927, 1.189638, 1.184115, 1.178334], atol=1e-6)
    np.testing.assert_allclose(got[-3:], [0.936521, 0.886135, 0.8], atol=1e-6)
    np.testing.assert_allclose(got.mean(), 1.088317, atol=1e-6)


def test_the_other_timestep_weights_mirror_it_or_are_straight():
    weights = {kind: settings.timestep_weights(5, kind) for kind in settings.TIMESTEP_WEIGHTS}
    assert len(weights) == 5
    np.testing.assert_allclose(weights["uniform"], 1)
    np.testing.assert_allclose(weights["linear_increasing"], [0.8, 0.9, 1.0, 1.1, 1.2])
    np.testing.assert_allclose(weights["linear_decreasing"], [1.2, 1.1, 1.0, 0.9, 0.8])
    np.testing.assert_allclose(weights["log_increasing"], weights["log_decreasing"][::-1])
    with pytest.raises(ValueError, match=r"'cosine', expected one of .*0 < low <= high"):
        settings.timestep_weights(5, "cosine", 1.0, 0.5)
