import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from sdprune_jax import sharding
from sdprune_jax.metrics import features, frechet, kernel

_NUM = 300  # no multiple of a chunk, nor of a batch of several devices
_RNG = np.random.default_rng(0)
_PARAMS = {
    "conv": _RNG.normal(size=(3, 3, 3, 8)).astype(np.float32),
    "out": _RNG.normal(size=(8, 16)).astype(np.float32),
}
_IMAGES = _RNG.integers(0, 256, size=(_NUM, 12, 12, 3), dtype=np.uint8)
_REFERENCE = _RNG.normal(size=(200, 16)).astype(np.float32)


def _mesh(data, fsdp=1):
    axes, types = ("data", "fsdp"), (AxisType.Auto,) * 2
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh((data, fsdp), axes, axis_types=types, devices=devices)


def _embed(params, images):
    x = images.astype(jnp.float32) / 127.5 - 1
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=numbers)
    return jnp.tanh(jnp.maximum(x, 0).mean(axis=(1, 2)) @ params["out"])


def _number(_, images):
    return images[:, None].astype(jnp.float32)  # the feature of an image is its pixel


def _extract(mesh, order=None):
    images = _IMAGES if order is None else _IMAGES[order]
    return features.extract(_embed, _PARAMS, lambda rows: images[rows], _NUM, mesh)


@pytest.fixture(scope="module")
def on_one_device():
    return _extract(_mesh(1))


def test_features_are_those_of_the_network(on_one_device):
    np.testing.assert_allclose(on_one_device, _embed(_PARAMS, _IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("num", [2, 31, 32, 33, 256, 300, 600])
def test_every_image_counts_once_and_in_order(num, num_devices):
    load = lambda rows: rows.astype(np.int32)
    found = features.extract(_number, {}, load, num, _mesh(num_devices))
    assert found[:, 0].tolist() == list(range(num))


@pytest.mark.parametrize("shape", [(2, 1), (4, 1), (8, 1), (2, 4), (1, 8)])
def test_features_have_the_same_bits_on_any_mesh(shape, on_one_device):
    assert _extract(_mesh(*shape)).tobytes() == on_one_device.tobytes()


def test_a_feature_depends_neither_on_its_row_nor_on_the_other_rows(on_one_device):
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(_NUM)
        assert np.array_equal(_extract(_mesh(4), order), on_one_device[order])


def test_distances_do_not_depend_on_mesh_batches_or_order(on_one_device):
    reference = frechet.gaussian(frechet.moments([_REFERENCE]))

    def distances(found, mesh, batches):
        fitted = frechet.gaussian(frechet.moments(batches))
        kid = kernel.kid(found, _REFERENCE, num_subsets=5, subset_size=100)
        cmmd = kernel.cmmd(found, _REFERENCE, mesh, sigma=3.0)
        return [frechet.frechet_distance(fitted, reference), *kid, cmmd]

    want = distances(on_one_device, _mesh(1), [on_one_device])
    order = np.random.default_rng(3).permutation(_NUM)
    for num_devices in (2, 4, 8):  # batches of 64, 128 and 256 images
        mesh = _mesh(num_devices)
        load = lambda rows: _IMAGES[order[rows]]
        streamed = list(features.stream(_embed, _PARAMS, load, _NUM, mesh))
        got = distances(np.concatenate(streamed), mesh, streamed)
        np.testing.assert_allclose(got, want, rtol=1e-9)


def test_the_network_always_sees_one_chunk_at_the_highest_precision():
    seen = []

    def embed(params, images):
        seen.append((images.shape, jax.config.jax_default_matmul_precision))
        return _embed(params, images)

    for num, num_devices in ((5, 1), (70, 1), (300, 4)):
        load = lambda rows: _IMAGES[rows]
        features.extract(embed, _PARAMS, load, num, _mesh(num_devices))
    assert set(seen) == {((features.CHUNK, 12, 12, 3), "highest")}
    assert len(seen) == 2  # one program a mesh, whatever the number of images


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_find_the_same_bits_and_load_their_own_images(
    num_processes, tmp_path, on_one_device
):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = pathlib.Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here}:{here.parent}", "JAX_PLATFORMS": "cpu"}
    calls = [
        f"one_of({num_processes}, {i}, {port}, {str(tmp_path)!r})" for i in range(num_processes)
    ]
    words = [[sys.executable, "-c", f"import test_features; test_features.{c}"] for c in calls]
    children = [subprocess.Popen(line, env=env, stderr=subprocess.PIPE) for line in words]
    errors = [child.communicate(timeout=120)[1].decode()[-3000:] for child in children]
    assert not any(child.returncode for child in children), "\n".join(errors)
    loaded = []
    for i in range(num_processes):
        with np.load(tmp_path / f"{i}.npz") as found:
            assert found["features"].tobytes() == on_one_device.tobytes()
            assert found["cached"].tobytes() == on_one_device.tobytes()
            want = kernel.cmmd(on_one_device, _REFERENCE, _mesh(1), sigma=3.0)
            np.testing.assert_allclose(found["cmmd"], want, rtol=1e-9)
            loaded.append(set(found["loaded"].tolist()))
    assert set().union(*loaded) == set(range(_NUM))
    assert sum(map(len, loaded)) < _NUM + num_processes  # the last image fills the last chunks


def one_of(num_processes, process, port, directory):
    """Extracts as one of some processes, which have four devices together."""
    jax.config.update("jax_num_cpu_devices", 4 // num_processes)
    jax.distributed.initialize(f"localhost:{port}", num_processes, process)
    loaded = []

    def load(rows):
        loaded.extend(rows.tolist())
        return _IMAGES[rows]

    mesh, directory = sharding.make_mesh(), pathlib.Path(directory)
    assert mesh.size == 4
    compute = lambda: features.extract(_embed, _PARAMS, load, _NUM, mesh)
    found = compute()
    for _ in range(2):  # computed by both, then read by both
        cached = features.cached(directory, "weights", {}, "images", compute)
    cmmd = kernel.cmmd(found, _REFERENCE, mesh, sigma=3.0)
    results = {"features": found, "cached": cached, "cmmd": cmmd, "loaded": loaded}
    np.savez(directory / f"{process}.npz", **results)


def test_features_that_are_not_finite_name_their_images():
    pixels = np.arange(300, dtype=np.float32)
    pixels[[3, 40, 299]] = np.nan, np.inf, -np.inf
    load = lambda rows: pixels[rows]
    with pytest.raises(FloatingPointError, match="features of images 3, 40 are not finite"):
        features.extract(_number, {}, load, 200, _mesh(2))
    pixels[:100] = 0
    with pytest.raises(FloatingPointError, match="images 299 are"):
        features.extract(_number, {}, load, 300, _mesh(8))
    pixels[100:120] = np.nan
    with pytest.raises(FloatingPointError, match=r"images 100, 101.* 109 and 10 more are"):
        features.extract(_number, {}, load, 300, _mesh(8))


@pytest.mark.parametrize("num", [0, 1])
def test_fewer_than_two_images_are_refused_before_any_is_loaded(num):
    with pytest.raises(ValueError, match=f"{num} images have no distribution"):
        features.stream(_number, {}, lambda _: pytest.fail("loaded"), num, _mesh(1))


def test_missing_images_are_refused():
    with pytest.raises(ValueError, match="asked to load 32 images from number 64 on, got 6"):
        features.extract(_number, {}, lambda rows: rows[rows < 70], 300, _mesh(1))


def test_an_error_of_loading_ends_the_extraction():
    def load(rows):
        if rows[0] >= 96:
            raise OSError("image 96 is truncated")
        return rows

    with pytest.raises(OSError, match="image 96 is truncated"):
        features.extract(_number, {}, load, 10**6, _mesh(1))


def test_a_stream_loads_little_ahead_of_what_was_read():
    loaded = []

    def load(rows):
        loaded.append(int(rows[-1]))
        return rows.astype(np.int32)

    parts = features.stream(_number, {}, load, 10**6, _mesh(2))
    for i in range(4):
        assert next(parts)[0, 0] == 64 * i
    parts.close()
    assert max(loaded) < 64 * (4 + 4)


def test_cached_features_are_read_back_until_what_made_them_changes(tmp_path):
    calls = []

    def cached(weights="w", protocol=None, images="i"):
        def compute():
            calls.append(1)
            return np.full((2, 3), len(calls), np.float32)

        return features.cached(tmp_path, weights, protocol or {"resize": "clean"}, images, compute)

    assert np.array_equal(cached(), np.full((2, 3), 1))
    assert np.array_equal(cached(), np.full((2, 3), 1))
    protocols = ({"resize": "tf"}, {"size": "clean"})
    for change in (
        *({"protocol": protocol} for protocol in protocols),
        {"weights": "v"},
        {"images": "j"},
    ):
        before = len(calls)
        cached(**change)
        assert len(calls) == before + 1, change
    assert np.array_equal(cached(), np.full((2, 3), 1))
