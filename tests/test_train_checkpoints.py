"""Checkpoints of a training: on any mesh, and after what disks and pods do to them."""

import collections
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from sdprune_jax import sharding
from sdprune_jax.training import orbax_checkpoints

_RNG = np.random.default_rng(0)
_HOST = {
    "params": {"w": _RNG.normal(size=(64, 64)).astype(np.float32), "b": np.float32(-0.0)},
    "half": _RNG.normal(size=(8, 16)).astype(jnp.bfloat16),
    "step": np.int32(7),
}
# What is damaged has one leaf on one device: Orbax leaves the readers of others behind when one
# fails, and each complains when it is collected, in whatever test that is.
_SOLE = {"w": _HOST["params"]["w"]}
_SHAPES = [(d, f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]  # of meshes


def _mesh(data, fsdp):
    return Mesh(np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp), ("data", "fsdp"))


def _state(mesh, factor=1, host=_HOST):
    shardings = jax.tree.map(lambda x: x.sharding, _like(mesh, host))
    return sharding.place(jax.tree.map(lambda x: (x * factor).astype(x.dtype), host), shardings)


def _like(mesh, host=_HOST):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), host)
    shardings = sharding.fsdp_shardings(shapes, mesh, min_bytes=0)
    return jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings)


def _bytes(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saved on 2 x 4 devices."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with orbax_checkpoints.open_manager(directory) as manager:
        orbax_checkpoints.save(manager, 2, _state(_mesh(2, 4), 2))
    return directory


@pytest.fixture
def sole(tmp_path):
    """Steps 1 and 2 of a single array, times 1 and times 2."""
    directory = tmp_path / "run" / "checkpoints"
    with orbax_checkpoints.open_manager(directory) as manager:
        for step in (1, 2):
            orbax_checkpoints.save(manager, step, _state(_mesh(1, 1), step, _SOLE))
    return directory


def _largest_file(step: pathlib.Path) -> pathlib.Path:
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _flip(step):
    path = _largest_file(step)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(step):
    path = _largest_file(step)
    path.write_bytes(path.read_bytes()[:100])


def _empty(step):
    shutil.rmtree(step)
    step.mkdir()


def _lose_a_file(step):
    _largest_file(step).unlink()


def _garble_the_shapes(step):
    (step / "default" / "_METADATA").write_bytes(b"\x00" * 64)


def _lose_a_sum(step):
    path = step / "checksums" / "metadata"
    path.write_text(path.read_text().replace("'w'", "'other'"))


def _lose_the_sums(step):
    shutil.rmtree(step / "checksums")
    _flip(step)  # which nobody would notice


def _cut_the_sums(step):
    (step / "checksums" / "metadata").write_text("{")


@pytest.mark.parametrize(("data", "fsdp"), _SHAPES)
def test_any_mesh_restores_the_same_bits(saved, data, fsdp):
    mesh = _mesh(data, fsdp)
    step, state = orbax_checkpoints.restore(saved, _like(mesh))
    assert step == 2
    assert _bytes(state) == _bytes(_state(mesh, 2))
    assert state["params"]["w"].sharding == _like(mesh)["params"]["w"].sharding
    assert state["params"]["w"].sharding.device_set == set(mesh.devices.flat)
    assert orbax_checkpoints.checksums(state) == orbax_checkpoints.checksums(_state(_mesh(1, 1), 2))


@pytest.mark.parametrize(("data", "fsdp"), _SHAPES)
def test_what_any_mesh_saves_is_restored_on_others(tmp_path, data, fsdp):
    state = _state(_mesh(data, fsdp), 3)
    with orbax_checkpoints.open_manager(tmp_path) as manager:
        orbax_checkpoints.save(manager, 1, state)
    for other in ((1, 1), (1, 8), (8, 1), (4, 2)):
        _, restored = orbax_checkpoints.restore(tmp_path, _like(_mesh(*other)))
        assert _bytes(restored) == _bytes(state)
        assert restored["half"].sharding == _like(_mesh(*other))["half"].sharding


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "not as it was saved: ['w']"),
        (_truncate, "Error|Exception"),
        (_empty, "FileNotFoundError"),
        (_lose_a_file, "Error|Exception"),
        (_garble_the_shapes, "Error|Exception"),
        (_lose_a_sum, "not as it was saved: ['w']"),
        (_lose_the_sums, "checksums"),
        (_cut_the_sums, "is not JSON"),
    ],
)
def test_damaged_step_gives_way_to_the_one_before(sole, damage, message, caplog):
    mesh = _mesh(1, 1)
    damage(sole / "2")
    killed = sole / "3.orbax-checkpoint-tmp"  # a save
    killed.mkdir()
    step, state = orbax_checkpoints.restore(sole, _like(mesh, _SOLE))
    assert (step, _bytes(state)) == (1, _bytes(_state(mesh, 1, _SOLE)))
    (warning,) = [record.getMessage() for record in caplog.records if "skipped" in record.msg]
    assert f"{sole / '2'} is skipped: " in warning
    assert any(part in warning for part in message.split("|"))

    with orbax_checkpoints.open_manager(sole) as manager:  # the name is free again
        orbax_checkpoints.save(manager, 2, _state(mesh, 5, _SOLE))
    assert not killed.exists()
    step, state = orbax_checkpoints.restore(sole, _like(mesh, _SOLE))
    assert (step, _bytes(state)) == (2, _bytes(_state(mesh, 5, _SOLE)))
    assert [path.name for path in sole.with_name("damaged").iterdir()] == ["2"]


def test_no_intact_step_is_an_error_that_moves_nothing(sole):
    _flip(sole / "2")
    _empty(sole / "1")
    with pytest.raises(ValueError, match=r"(?s)step 2: not as it was saved.*step 1: FileNotFound"):
        orbax_checkpoints.restore(sole, _like(_mesh(1, 1), _SOLE))
    assert sorted(path.name for path in sole.iterdir()) == ["1", "2"]


def test_checkpoint_of_another_shape_is_refused(saved):
    like = _like(_mesh(1, 1))
    like["params"]["w"] = jax.ShapeDtypeStruct((64, 32), np.float32, sharding=like["step"].sharding)
    with pytest.raises(ValueError, match=r"params\.w is \(64, 64\), not \(64, 32\)") as error:
        orbax_checkpoints.restore(saved, like)
    assert "choose another workdir" in str(error.value)


def test_full_disk_leaves_what_was_saved(sole):
    mesh, limits = _mesh(1, 1), resource.getrlimit(resource.RLIMIT_FSIZE)

    def save():
        with orbax_checkpoints.open_manager(sole) as manager:
            orbax_checkpoints.save(manager, 3, _state(mesh, 3, _SOLE))

    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))  # bytes of a file
    try:
        with pytest.raises(Exception, match="File too large"):
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    step, state = orbax_checkpoints.restore(sole, _like(mesh, _SOLE))
    assert (step, _bytes(state)) == (2, _bytes(_state(mesh, 2, _SOLE)))
    save()  # there is room again
    assert sorted(path.name for path in sole.iterdir()) == ["2", "3"]  # and nothing half-written


def test_disk_without_room_for_all_that_is_kept_is_refused(tmp_path, sole, monkeypatch):
    usage = collections.namedtuple("usage", "free")
    free_of = lambda num: monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(num))
    size = 64 * 64 * 4
    free_of(3 * size)
    orbax_checkpoints.check_space(tmp_path / "not" / "there", _like(_mesh(1, 1), _SOLE))
    free_of(3 * size - 1)
    with pytest.raises(ValueError, match=rf"{tmp_path} has 4.92e-05 GB free, and 3 checkpoints of"):
        orbax_checkpoints.check_space(tmp_path / "not" / "there", _like(_mesh(1, 1), _SOLE))
    orbax_checkpoints.check_space(sole, _like(_mesh(1, 1), _SOLE))  # two of them are there


def test_nothing_saved_is_no_state(tmp_path):
    assert orbax_checkpoints.restore(tmp_path / "nowhere", _like(_mesh(1, 1))) is None
    (tmp_path / "1.orbax-checkpoint-tmp-1").mkdir()
    assert orbax_checkpoints.restore(tmp_path, _like(_mesh(1, 1))) is None


def test_checksum_sees_every_bit_and_every_place():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    words = x.view(np.uint32).ravel().astype(np.uint64)
    mixed = (words ^ (np.arange(12, dtype=np.uint64) * 0x9E3779B1 % 2**32)) * 0x85EBCA77 % 2**32
    want = int(((mixed ^ (mixed >> 15)) * 0xC2B2AE3D % 2**32).sum() % 2**32)
    assert orbax_checkpoints.checksums([jnp.asarray(x)]) == {"[0]": want}

    others = [x.copy() for _ in range(34)]
    for bit in range(32):
        others[bit].view(np.uint32)[1, 2] ^= np.uint32(1 << bit)
    others[32][0], others[32][1] = x[1], x[0]
    others[33][0, 0] = -0.0
    sums = orbax_checkpoints.checksums([jnp.asarray(other) for other in others])
    assert len({want, *sums.values()}) == 35
