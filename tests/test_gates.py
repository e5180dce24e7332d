"""Gates in the UNet: where they multiply, what a closed one equals, and what is handed out."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax import sites
from sdprune_jax.aptp import layout
from sdprune_jax.models import layers, unet
from sdprune_jax.sites import zero_padding

CONFIG = unet.UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=(2, 4),
    cross_attention_dim=12,
    norm_num_groups=4,
)
LAYOUT = layout.layout_of(sites.table(CONFIG))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def draw(path, leaf):  # biases and norms too: zeros would hide mistakes
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + np.float32(0.3) * noise
        return noise / np.float32(math.prod(leaf.shape[:-1] or (10,)) ** 0.5)

    return jax.tree_util.tree_map_with_path(draw, unet.param_shapes(CONFIG))


def _inputs(batch=2):
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(batch, 4, 6, 4)).astype(np.float32)
    text = rng.normal(size=(batch, 5, 12)).astype(np.float32)
    return latents, np.full(batch, 700, np.int32), text


@functools.cache
def _compiled(config, position="post_norm"):
    return jax.jit(
        functools.partial(unet.UNet(config, gate_position=position).apply, return_blocks=True)
    )


def _random_architecture(seed, depth):
    """About half of all gates, at least one a site; with the depth gates given."""
    keep = np.random.default_rng(seed).random(LAYOUT.size) < 0.5
    keep[LAYOUT.starts] = True
    keep[LAYOUT.num_width :] = depth
    return keep


@pytest.mark.parametrize(
    ("seed", "depth"),
    [(0, [False, True, True, False, True]), (1, [True, False, False, True, False])],
)
def test_closed_gates_equal_sliced_and_zero_padded_weights(params, seed, depth):
    keep = _random_architecture(seed, depth)
    architecture = layout.to_architecture(keep, LAYOUT)
    gates = layout.to_gates(jnp.asarray(np.stack([keep, keep]), jnp.float32), LAYOUT)
    gated, blocks = _compiled(CONFIG)({"params": params}, *_inputs(), gates)
    sliced, config = sites.slice_params(params, CONFIG, architecture)
    zeroed = zero_padding.zero_params(params, CONFIG, architecture)
    for found, like in ((sliced, config), (zeroed, CONFIG)):
        out, taps = _compiled(like)({"params": found}, *_inputs(), None)
        np.testing.assert_allclose(out, gated, rtol=0, atol=1e-5 * np.abs(gated).max())
        for tap, block in zip(taps, blocks, strict=True):
            np.testing.assert_allclose(tap, block, rtol=0, atol=1e-5 * np.abs(block).max())
    dense, _ = _compiled(CONFIG)({"params": params}, *_inputs(), None)
    assert np.abs(dense - gated).max() > 1e-2
    assert jax.tree.map(jnp.shape, zeroed) == jax.tree.map(jnp.shape, params)


def test_zero_padding_refuses_what_slicing_refuses(params):
    closed = {"up_blocks.0.resnets.0": np.zeros(4, bool), "nowhere": np.ones(1, bool)}
    with pytest.raises(ValueError, match=r"all of its 4 units[^$]*nowhere is not one"):
        zero_padding.zero_params(params, CONFIG, closed)


def test_published_gates_equal_ours_but_in_resnets(params):
    # A closed head or feed-forward unit is removed at either position; closed channels of a
    # ResNet leave the bias of its second norm behind, where the published code gates.
    keep = _random_architecture(4, [True, False, True, True, False])
    both = {}
    for part in ("heads and ff", "all"):
        vector = keep.copy()
        if part != "all":
            for name, start, units in zip(LAYOUT.width, LAYOUT.starts, LAYOUT.units, strict=True):
                if ".resnets." in name and "transformer" not in name:
                    vector[start : start + units] = True
        gates = layout.to_gates(jnp.asarray(np.stack([vector] * 2), jnp.float32), LAYOUT)
        run = lambda position, gates=gates: _compiled(CONFIG, position)(
            {"params": params}, *_inputs(), gates
        )[0]
        both[part] = np.abs(run("pre_norm") - run("post_norm")).max()
    assert both["heads and ff"] < 1e-5
    assert both["all"] > 1e-2


def test_published_gates_in_a_resnet_are_undone_by_its_norm():
    # The gain g / sqrt(g^2 + 1e-5) of a gate g on channels of variance 1.
    gains = {1: 0.999995, 0.5: 0.99998, 0.1: 0.9995, 0.03: 0.99449, 0.01: 0.953463}
    gains |= {0.003162: 0.707076, 0.001: 0.301511}
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 4))
    groups = x.reshape(1, 64, 2, 2).transpose(0, 2, 1, 3).reshape(2, -1)
    x = x - np.repeat(groups.mean(axis=1), 2)
    x = x / np.repeat(groups.std(axis=1), 2)
    norm = layers.GroupNorm(2, 1e-5, jnp.float32)
    scale_and_bias = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    for gate, gain in gains.items():
        gated = layers.gated(jnp.asarray(x, jnp.float32), jnp.array([[gate, 1.0]]))
        out = norm.apply(scale_and_bias, gated)
        found = (out * x)[..., :2].sum() / (x**2)[..., :2].sum()
        np.testing.assert_allclose(found, gain, rtol=0, atol=1e-6)
        np.testing.assert_allclose(out[..., :2], found * x[..., :2], rtol=0, atol=1e-5)
        assert np.abs(out[..., 2:] - x[..., 2:]).max() < 1e-4


def _block(position):
    block = layers.ResnetBlock(8, 8, 2, 4, 1e-5, gate_position=position)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 4, 4, 8)), jnp.float32)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    rng = np.random.default_rng(3)
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32) * 0.3
    params = jax.tree.map(draw, shapes)
    return lambda gate: block.apply(params, x, None, gate), params["params"]


def test_a_resnet_sees_soft_gates_after_its_norm_only():
    half = jnp.array([[0.5, 1, 1, 1]])
    moved = {}
    for position in layers.GATE_POSITIONS:
        run, params = _block(position)
        moved[position] = np.abs(run(half) - run(None)).max() / np.abs(run(None)).max()
        closed = run(jnp.zeros((1, 4)))
        if position == "post_norm":
            left = closed - params["conv2"]["bias"][None, None, None]
            x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 4, 4, 8)), jnp.float32)
            np.testing.assert_allclose(left, x, rtol=0, atol=1e-6)
        else:  # the bias of the norm goes on through conv2
            bias = jax.nn.silu(params["norm2"]["bias"])
            centre = jnp.einsum("i,hwio->o", bias, params["conv2"]["kernel"])
            x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 4, 4, 8)), jnp.float32)
            want = x[0, 1, 1] + centre + params["conv2"]["bias"]
            np.testing.assert_allclose(closed[0, 1, 1], want, rtol=0, atol=1e-5)
    assert moved["pre_norm"] < 1e-3 < 1e-2 < moved["post_norm"]


def test_soft_published_gates_of_attention_square_its_logits():
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(1, 5, 6)), jnp.float32)
    block = layers.Attention(6, 2, 3, gate_position="pre_norm")
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes)
    gate = jnp.array([[0.6, 0.3]])
    out = block.apply({"params": params}, x, None, gate)
    q, k, v = ((x @ params[f"to_{n}"]["kernel"]).reshape(5, 2, 3) for n in "qkv")
    heads = []
    for i, g in enumerate((0.6, 0.3)):
        weight = jax.nn.softmax(g**2 * q[:, i] @ k[:, i].T / 3**0.5)
        heads.append(g * weight @ v[:, i])
    last = params["to_out.0"]
    want = jnp.concatenate(heads, axis=1) @ last["kernel"] + last["bias"][None]
    np.testing.assert_allclose(out[0], want, rtol=0, atol=1e-5)


def test_soft_published_gates_scale_both_halves_of_the_feed_forward():
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(1, 3, 8)), jnp.float32)
    block = unet.FeedForward(8, 32, jnp.float32, "pre_norm")
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes)
    gate = jnp.asarray(rng.random((1, 32)), jnp.float32)
    out = block.apply({"params": params}, x, gate)
    first, last = params["net.0.proj"], params["net.2"]
    value, scale = jnp.split(x @ first["kernel"] + first["bias"][None, None], 2, axis=-1)
    hidden = gate[:, None] * value * jax.nn.gelu(gate[:, None] * scale, approximate=False)
    want = hidden @ last["kernel"] + last["bias"][None, None]
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5)


def test_blocks_are_handed_out_after_resampling(params):
    is_block = lambda module, method: isinstance(module, unet.Stage) and method == "__call__"
    run = functools.partial(unet.UNet(CONFIG).apply, capture_intermediates=is_block)
    run = jax.jit(functools.partial(run, mutable=["intermediates"], return_blocks=True))
    (out, blocks), seen = run({"params": params}, *_inputs())
    seen = seen["intermediates"]
    names = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    for name, block in zip(names, blocks, strict=True):
        want = seen[name]["__call__"][0]
        want = want[0] if name.startswith("down") else want
        np.testing.assert_array_equal(block, want)
    shapes = [(2, 3, 16), (2, 3, 32), (2, 3, 32), (4, 6, 32), (4, 6, 16)]
    assert [block.shape[1:] for block in blocks] == shapes
    assert out.shape == (2, 4, 6, 4)
