"""Inception v3 against PyTorch, block by block: all parameters random, an image not square."""

import zlib

import jax
import numpy as np
import pytest

from sdprune_jax.files import convert
from sdprune_jax.models import inception

torch = pytest.importorskip("torch")
F = torch.nn.functional

BOUND = 1e-5  # of the largest feature of a block


def _random_state(shapes):
    """Parameters by their PyTorch names, drawn so that features keep their size."""
    rng, state = np.random.default_rng(0), {}
    for path, leaf in convert.flatten(shapes).items():
        key, shape = convert.torch_key(path), [leaf.shape[i] for i in _axes(path, leaf)]
        noise = rng.normal(size=shape)
        if key.endswith("conv.weight"):
            noise *= (2 / np.prod(shape[1:])) ** 0.5
        elif key.endswith("running_var"):
            noise = 0.5 + noise**2
        else:
            noise = 0.2 * noise + key.endswith("bn.weight")
        state[key] = noise.astype(np.float32)
    return state


def _axes(path, leaf):
    return convert.torch_axes(path, len(leaf.shape))


def _reference(state, images):
    """The output of every module, from the published architecture; paddings are written out."""
    state, found = {key: torch.from_numpy(x) for key, x in state.items()}, {}

    def conv(x, name, padding=0, stride=1):
        w = {leaf: state[f"{name}.bn.{leaf}"] for leaf in ("running_mean", "running_var")}
        x = F.conv2d(x, state[f"{name}.conv.weight"], None, stride, padding)
        weight, bias = state[f"{name}.bn.weight"], state[f"{name}.bn.bias"]
        return F.relu(F.batch_norm(x, **w, weight=weight, bias=bias, eps=0.001))

    def branch(block, *steps):
        x = found["x"]
        for name, *args in steps:
            x = conv(x, f"{block}.{name}", *args)
        return x

    def keep(name, *branches):
        found[name] = found["x"] = torch.cat(branches, dim=1)

    def pooled(name, mean=True):
        x, pool = found["x"], (3, 1, 1)
        x = F.avg_pool2d(x, *pool, count_include_pad=False) if mean else F.max_pool2d(x, *pool)
        return conv(x, f"{name}.branch_pool")

    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    for name, padding, stride in (("1a", 0, 2), ("2a", 0, 1), ("2b", 1, 1)):
        x = found[f"Conv2d_{name}_3x3"] = conv(x, f"Conv2d_{name}_3x3", padding, stride)
    x = found["Conv2d_3b_1x1"] = conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
    x = found["Conv2d_4a_3x3"] = conv(x, "Conv2d_4a_3x3")
    found["x"] = F.max_pool2d(x, 3, 2)
    triple = [("branch3x3dbl_1",), ("branch3x3dbl_2", 1), ("branch3x3dbl_3", 1)]
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        five = branch(name, ("branch5x5_1",), ("branch5x5_2", 2))
        keep(name, branch(name, ("branch1x1",)), five, branch(name, *triple), pooled(name))
    triple[2] = ("branch3x3dbl_3", 0, 2)
    halved = F.max_pool2d(found["x"], 3, 2)
    single = branch("Mixed_6a", ("branch3x3", 0, 2))
    keep("Mixed_6a", single, branch("Mixed_6a", *triple), halved)
    wide, high = (0, 3), (3, 0)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        seven = [("branch7x7_1",), ("branch7x7_2", wide), ("branch7x7_3", high)]
        paddings = (0, high, wide, high, wide)
        double = [(f"branch7x7dbl_{i}", padding) for i, padding in enumerate(paddings, 1)]
        parts = [branch(name, steps, *more) for steps, *more in ([("branch1x1",)], seven, double)]
        keep(name, *parts, pooled(name))
    halved = F.max_pool2d(found["x"], 3, 2)
    three = branch("Mixed_7a", ("branch3x3_1",), ("branch3x3_2", 0, 2))
    paddings = ((0,), (wide,), (high,), (0, 2))
    seven = [(f"branch7x7x3_{i}", *padding) for i, padding in enumerate(paddings, 1)]
    keep("Mixed_7a", three, branch("Mixed_7a", *seven), halved)
    wide, high = (0, 1), (1, 0)
    for name in ("Mixed_7b", "Mixed_7c"):
        heads = [[("branch3x3_1",)], [("branch3x3dbl_1",), ("branch3x3dbl_2", 1)]]
        ends = [("branch3x3_2a", "branch3x3_2b"), ("branch3x3dbl_3a", "branch3x3dbl_3b")]
        forks = [
            branch(name, *head, (end, padding))
            for head, pair in zip(heads, ends, strict=True)
            for end, padding in zip(pair, (wide, high), strict=True)
        ]
        last = pooled(name, mean=name == "Mixed_7b")
        keep(name, branch(name, ("branch1x1",)), *forks, last)
    features = found.pop("x").mean(dim=(2, 3))
    return {name: x.permute(0, 2, 3, 1).numpy() for name, x in found.items()}, features.numpy()


def test_every_block_equals_torch():
    shapes = inception.param_shapes()
    state = _random_state(shapes)
    flat = {p: convert.from_torch(p, state[convert.torch_key(p)]) for p in convert.flatten(shapes)}
    params = convert.unflatten(flat, shapes)
    noise = np.random.default_rng(1).uniform(-1, 1, size=(2, 139, 107, 3))
    images = (noise * np.linspace(0, [[[1]], [[0.1]]], 139, axis=1)).astype(np.float32)
    is_block = lambda module, _: len(module.path) == 1
    model = inception.InceptionV3()
    apply = lambda params, images: model.apply(
        {"params": params}, images, capture_intermediates=is_block, mutable=["intermediates"]
    )
    got, intermediates = jax.jit(apply)(params, images)
    blocks, want = _reference(state, images)
    found = {name: x["__call__"][0] for name, x in intermediates["intermediates"].items()}
    assert len(blocks) == 16
    assert found.keys() == blocks.keys()
    for name, x in blocks.items():
        bound = BOUND * np.abs(x).max()
        np.testing.assert_allclose(found[name], x, rtol=0, atol=bound, err_msg=name)
    assert got.shape == (2, 2048)
    np.testing.assert_allclose(got, want, rtol=0, atol=BOUND * np.abs(want).max())
    assert np.ptp(want, axis=0).max() > 0.1 * np.abs(want).max()  # images differ


def test_names_and_shapes_are_those_of_the_published_weights():
    shapes = convert.flatten(inception.param_shapes())
    lines = sorted(
        f"{convert.torch_key(path)} {[leaf.shape[i] for i in _axes(path, leaf)]}"
        for path, leaf in shapes.items()
    )
    assert lines[0] == "Conv2d_1a_3x3.bn.bias [32]"
    # Of the state dict of pytorch-fid 0.3.0, less its classifier and its counters of batches.
    assert (len(lines), zlib.crc32("\n".join(lines).encode())) == (470, 638446095)


def test_bytes_are_normalised_as_each_library_does():
    x = np.array([0, 128, 255], np.float32)
    want = {"pytorch_fid": (x / 255 - 0.5) / 0.5, "tensorflow": [-1, 0, 127 / 128]}
    assert inception.NORMALISE.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_allclose(inception.NORMALISE[name](x), values, rtol=0, atol=1e-7)
