"""The mesh of one host, of several slices; the start of several processes."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sdprune_jax import sharding


def _slices(num_slices, per_slice):
    """TPUs in rows of two."""
    return [
        types.SimpleNamespace(
            id=num * per_slice + i,
            process_index=num,
            platform="tpu",
            device_kind="TPU v5 lite",
            coords=(i % 2, i // 2, 0),
            core_on_chip=0,
            **({"slice_index": num} if num_slices > 1 else {}),  # as libtpu does
        )
        for num in range(num_slices)
        for i in range(per_slice)
    ]


def test_only_data_crosses_slices():
    for num_slices, per_slice, fsdp in ((2, 8, 4), (4, 4, 4), (2, 4, 1)):
        grid = sharding.arrange(-1, fsdp, _slices(num_slices, per_slice))
        assert grid.shape == (num_slices * per_slice // fsdp, fsdp)
        index = np.vectorize(lambda device: device.slice_index)(grid)
        assert (index == index[:, :1]).all()
        assert (np.diff(index[:, 0]) >= 0).all()
        assert len({device.id for device in grid.flat}) == num_slices * per_slice


def test_only_slice_needs_no_name():
    grid = sharding.arrange(-1, 4, _slices(1, 8))
    assert grid.shape == (2, 4)
    assert {device.id for device in grid.flat} == set(range(8))


def test_mesh_that_cannot_be_is_refused_with_those_that_can():
    with pytest.raises(ValueError, match=r"4 devices in each of 2 slices; use one of \[1, 2, 4\]"):
        sharding.arrange(-1, 8, _slices(2, 4))
    with pytest.raises(ValueError, match=r"does not divide 8 devices; use one of \[1, 2, 4, 8\]"):
        sharding.make_mesh(-1, 3)
    with pytest.raises(ValueError, match=r"is not 8 devices; use data=4"):
        sharding.make_mesh(8, 2)


def test_batches_are_split_over_all_devices_and_small_arrays_over_none():
    mesh = sharding.make_mesh(2, 4)
    batch = sharding.place({"x": np.arange(16.0)}, sharding.batch_sharding(mesh))
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2,)}
    np.testing.assert_array_equal(sharding.of_processes(3, mesh), np.full(8, 3))
    shapes = {"small": jax.ShapeDtypeStruct((64, 64), np.float32)}
    assert sharding.fsdp_shardings(shapes, mesh)["small"].spec == P()


def test_arrays_are_split_from_a_size_on_that_is_read_when_asked(monkeypatch):
    mesh, shapes = sharding.make_mesh(2, 4), {"w": jax.ShapeDtypeStruct((6, 64), np.float32)}
    monkeypatch.setattr(sharding, "MIN_SHARDED_BYTES", 6 * 64 * 4)
    assert sharding.fsdp_shardings(shapes, mesh)["w"].spec == P(None, "fsdp")
    assert sharding.fsdp_shardings(shapes, mesh, min_bytes=6 * 64 * 4 + 1)["w"].spec == P()


@pytest.fixture
def started(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    return calls


def test_processes_are_started_as_the_config_says(started):
    sharding.start_processes("", 0, 0)
    assert not started
    sharding.start_processes("auto", 0, 0)
    sharding.start_processes("10.0.0.1:1234", 4, 3)
    (detected, how), (given, exactly) = started
    assert detected == (None, None, None)
    assert how["cluster_detection_method"] is None
    assert given == ("10.0.0.1:1234", 4, 3)
    assert exactly["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10.0.0.1", 2, 0), "expected HOST:PORT of the first process, `auto`, or nothing"),
        (("10.0.0.1:1234", 0, 0), "expected process_id from 0 to num_processes - 1"),
        (("10.0.0.1:1234", 2, 2), "expected process_id from 0 to num_processes - 1"),
        (("auto", 2, 0), "only for a coordinator HOST:PORT"),
        (("", 0, 1), "only for a coordinator HOST:PORT"),
    ],
)
def test_start_that_does_not_fit_together_is_refused(started, arguments, message):
    with pytest.raises(ValueError, match=message):
        sharding.start_processes(*arguments)
    assert not started


def test_start_that_fails_says_how_to_start():
    jax.devices()  # JAX joins no processes after its first use
    with pytest.raises(ValueError, match=r"mesh.coordinator='auto'.*before.*srun, mpirun"):
        sharding.start_processes("auto", 0, 0)
    with pytest.raises(ValueError, match=r"before.*start all of them, with the same address"):
        sharding.start_processes("10.0.0.1:1234", 2, 1)
