import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from sdprune_jax import sites
from sdprune_jax.files import convert
from sdprune_jax.models import unet

CONFIG = unet.UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=(2, 4),
    cross_attention_dim=12,
    norm_num_groups=4,
)
KINDS = ("heads", "ff", "channels", "depth")
# Of every sub-block of Stable Diffusion 2, in order: its first width gate, and whether it has a
# depth gate. Source: the layout that the authors' code gives to APTP's vector.
SD2_LAYOUT = {
    "down_blocks.0": {"resnets": "0 32d", "attentions": "64 106d"},
    "down_blocks.1": {"resnets": "148 180d", "attentions": "212 264d"},
    "down_blocks.2": {"resnets": "316 348d", "attentions": "380 452d"},
    "down_blocks.3": {"resnets": "524 556d"},
    "mid_block": {"resnets": "588 620", "attentions": "652"},
    "up_blocks.0": {"resnets": "724 756 788d"},
    "up_blocks.1": {"resnets": "820 852 884d", "attentions": "916 988 1060d"},
    "up_blocks.2": {"resnets": "1132 1164 1196d", "attentions": "1228 1280 1332d"},
    "up_blocks.3": {"resnets": "1384 1416 1448d", "attentions": "1480 1522 1564d"},
}


def _random_params(config):
    rng = np.random.default_rng(0)

    def draw(path, leaf):  # biases and norms too: zeros would hide mistakes
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + np.float32(0.3) * noise
        return noise / np.float32(math.prod(leaf.shape[:-1] or (10,)) ** 0.5)

    return jax.tree_util.tree_map_with_path(draw, unet.param_shapes(config))


@pytest.fixture(scope="module")
def params():
    return _random_params(CONFIG)


def _inputs(batch):
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(batch, 4, 6, 4)).astype(np.float32)
    text = rng.normal(size=(batch, 5, 12)).astype(np.float32)
    return latents, np.full(batch, 700, np.int32), text


@functools.cache
def _compiled(config):
    return jax.jit(unet.UNet(config).apply)


def _apply(config, params, gates):
    return _compiled(config)({"params": params}, *_inputs(2), gates)


def _gates(config, architecture):
    """A gate for every site, closed where `architecture` removes, the same for two samples."""
    gates = {site.name: np.ones(site.units, bool) for site in sites.table(config)} | architecture
    return {name: np.stack([keep, keep]).astype(np.float32) for name, keep in gates.items()}


def _architecture(config, kinds, seed=0):
    """Half of the units of every width site of some kinds, drawn at random; no depth."""
    rng, found = np.random.default_rng(seed), {}
    for site in sites.table(config):
        if site.kind in kinds:
            half = np.arange(site.units) < site.units // 2
            found[site.name] = np.zeros(1, bool) if site.kind == "depth" else rng.permutation(half)
    return found


def test_sites_of_stable_diffusion_2_are_in_the_order_of_aptp():
    table = sites.table(unet.UNetConfig())
    width = [site for site in table if site.kind != "depth"]
    starts = dict(
        zip([s.name for s in width], np.cumsum([0, *(s.units for s in width)]), strict=False)
    )
    layout = [
        (f"{block}.{name}.{i}", int(start.removesuffix("d")), start.endswith("d"))
        for block, parts in SD2_LAYOUT.items()
        for name, entries in parts.items()
        for i, start in enumerate(entries.split())
    ]
    assert len(layout) == 38
    expected = {}
    for path, start, _ in layout:
        if ".resnets." in path:
            expected[path] = start
            continue
        heads = next(s.units for s in width if s.name == f"{path}.transformer_blocks.0.attn1")
        for i, name in enumerate(("attn1", "attn2", "ff")):
            expected[f"{path}.transformer_blocks.0.{name}"] = start + i * heads
    assert list(starts.items()) == list(expected.items())
    assert len(width) == 70
    assert sum(site.units for site in width) == 1606
    depth = [f"{path}.depth" for path, _, has_depth in layout if has_depth]
    assert [site.name for site in table[70:]] == depth
    assert sum(site.units for site in table) == 1620


def test_units_fill_the_axes_of_their_members():
    for config in (unet.UNetConfig(), CONFIG):
        flat = convert.flatten(unet.param_shapes(config))
        for site in sites.table(config):
            for path, axis in site.members:
                runs = 2 if "net.0.proj" in path else 1
                assert flat[path].shape[axis] == runs * site.units * site.unit_size, path


@pytest.mark.parametrize("kinds", [("heads",), ("ff",), ("channels",), KINDS])
def test_closed_gates_equal_the_sliced_unet(params, kinds):
    architecture = _architecture(CONFIG, kinds)
    gated = _apply(CONFIG, params, _gates(CONFIG, architecture))
    sliced, config = sites.slice_params(params, CONFIG, architecture)
    np.testing.assert_allclose(_apply(config, sliced, None), gated, rtol=0, atol=1e-5)
    dense = _apply(CONFIG, params, _gates(CONFIG, {}))
    assert np.abs(dense - gated).max() > 1e-2
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert size(sliced) < size(params)


def test_open_gates_equal_none(params):
    gated = _apply(CONFIG, params, _gates(CONFIG, {}))
    np.testing.assert_allclose(gated, _apply(CONFIG, params, None), rtol=0, atol=1e-6)


def test_soft_depth_gates_blend(params):
    names = [site.name for site in sites.table(CONFIG) if site.kind == "depth"]
    assert len(names) == 5
    soft = np.array([0, 0.3, 1], np.float32)
    batch = len(names) * len(soft)  # three samples a site, and all other gates open
    gates = {name: np.ones((batch, 1), np.float32) for name in names}
    for i, name in enumerate(names):
        gates[name][3 * i : 3 * i + 3, 0] = soft
    is_block = lambda module, _: isinstance(module, unet.Resnet | unet.Transformer)
    run = functools.partial(
        unet.UNet(CONFIG).apply, capture_intermediates=is_block, mutable=["intermediates"]
    )
    inputs = [np.repeat(x[:1], batch, axis=0) for x in _inputs(2)]
    outputs = jax.jit(run)({"params": params}, *inputs, gates)[1]["intermediates"]
    outputs = convert.flatten(outputs)
    before = {  # what stands in for a removed block; never the skip connection
        "down_blocks.0.attentions.0.depth": "down_blocks.0.resnets.0",
        "up_blocks.0.resnets.1.depth": "up_blocks.0.resnets.0",
        "up_blocks.1.resnets.1.depth": "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1.depth": "up_blocks.1.resnets.1",
    }
    assert before.keys() <= set(names)
    for i, name in enumerate(names):
        (out,) = outputs[name.replace(".depth", ".__call__")]
        removed, blend, kept = out[3 * i : 3 * i + 3]
        np.testing.assert_allclose(blend, 0.7 * removed + 0.3 * kept, rtol=0, atol=2e-6)
        assert np.abs(removed - kept).max() > 0.1
        if name in before:
            np.testing.assert_array_equal(removed, outputs[f"{before[name]}.__call__"][0][3 * i])


def test_slicing_twice_equals_slicing_once(params):
    first = _architecture(CONFIG, ("heads", "ff"))
    second = _architecture(CONFIG, ("channels", "depth"))
    once, config = sites.slice_params(params, CONFIG, first | second)
    part, part_config = sites.slice_params(params, CONFIG, first)
    twice, config_twice = sites.slice_params(part, part_config, second)
    assert config_twice == config
    jax.tree.map(np.testing.assert_array_equal, twice, once)
    left = {site.name: site for site in sites.table(config)}
    wanted = {name: int(keep.sum()) for name, keep in (first | second).items()}
    assert len(left) < len(wanted)
    assert {name: site.units for name, site in left.items()}.items() <= wanted.items()
    assert dict(config.kept_units).keys() == left.keys() | {
        n for n in wanted if n.endswith("depth")
    }
    again, same = sites.slice_params(
        once, config, {name: np.ones(site.units, bool) for name, site in left.items()}
    )
    assert same == config
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: x is y, again, once)))


def test_sliced_configs_survive_json(params):
    _, config = sites.slice_params(params, CONFIG, _architecture(CONFIG, KINDS))
    assert unet.UNetConfig.from_json(config.to_json()) == config


def test_only_blocks_that_keep_the_width_have_depth_sites():
    names = [site.name for site in sites.table(CONFIG)]
    assert "down_blocks.0.resnets.0.depth" in names
    assert "down_blocks.1.resnets.0.depth" not in names  # 16 channels to 32
    config = dataclasses.replace(CONFIG, block_out_channels=(16, 16), attention_head_dim=(2, 2))
    closed = {site.name: np.zeros(1, bool) for site in sites.table(config) if site.kind == "depth"}
    assert "down_blocks.1.resnets.0.depth" in closed
    sliced, _ = sites.slice_params(_random_params(config), config, closed)
    assert "down_blocks.1" not in sliced  # nothing is left in it


def test_impossible_architectures_are_refused_with_all_problems(params):
    architecture = {
        "down_blocks.9.resnets.0": np.ones(4, bool),
        "down_blocks.1.resnets.0.depth": np.zeros(1, bool),  # it changes the width
        "mid_block.resnets.1": np.ones(32, bool),
        "up_blocks.0.resnets.0": np.zeros(4, bool),
        "up_blocks.0.resnets.1.depth": np.zeros(1, bool),
        "up_blocks.0.resnets.1": np.zeros(4, bool),  # goes with its block
    }
    with pytest.raises(ValueError, match="cannot be sliced") as error:
        sites.slice_params(params, CONFIG, architecture)
    lines = str(error.value).splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(architecture)[:4]
    assert "4 units, got 32" in lines[2]
