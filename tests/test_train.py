import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdprune_jax import sharding
from sdprune_jax.data.order import rows_of_batch
from sdprune_jax.training import loop

_STEPS = 12
_PARAMS = {"w": np.linspace(-1, 1, 32 * 16, dtype=np.float32).reshape(32, 16)}


def _loss(params, frozen, batch, key):
    noise = 0.1 * jax.random.normal(key, batch["y"].shape)
    loss = jnp.mean((frozen["scale"] * (batch["x"] @ params["w"]) - batch["y"] - noise) ** 2)
    return loss, {"loss": loss}


def _batch_at(step):
    rows = rows_of_batch(40, 16, step, seed=0)
    x = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)
    return {"x": x[rows], "y": np.ones((16, 16), np.float32)}


def _fit(directory, batch_at=_batch_at, mesh=None, loss=_loss, evaluate=None, **changes):
    mesh = mesh or sharding.make_mesh(1, jax.device_count())
    values = {"num_steps": _STEPS, "batch_size": 16, "ema_decay": 0.9, "seed": 3}
    values |= {"log_every": 1, "save_every": 4, "num_evals": 0} | changes
    optimizer = loop.adamw(1e-2, 2, _STEPS, 0.1, 1.0)
    training = loop.TrainingSettings(optimizer, mesh=mesh, directory=directory, **values)
    return loop.fit(training, loss, _PARAMS, batch_at, {"scale": jnp.float32(2.0)}, evaluate)


@pytest.mark.parametrize(("data", "fsdp"), [(1, 8), (8, 1), (2, 4)])
def test_a_step_does_not_depend_on_the_mesh(data, fsdp):
    mesh = sharding.make_mesh(data, fsdp)
    optimizer = loop.adamw(1e-2, 0, 10, 0.1, 1.0)
    state = loop.init_state(jax.tree.map(jnp.asarray, _PARAMS), optimizer)
    batch, scale = _batch_at(0), jnp.float32(2.0)
    (loss, _), grads = jax.value_and_grad(_loss, has_aux=True)(
        state.params, {"scale": scale}, batch, jax.random.fold_in(jax.random.key(1), 0)
    )
    updates, _ = optimizer.update(grads, state.opt_state, state.params)
    want = optax.apply_updates(state.params, updates)

    shardings = sharding.fsdp_shardings(state, mesh, min_bytes=0)
    step = loop.make_train_step(_loss, optimizer, mesh, shardings, ema_decay=0.9)
    state, metrics = step(
        jax.device_put(state, shardings), {"scale": scale}, batch, jax.random.key(1)
    )
    assert int(state.step) == 1
    assert len(state.params["w"].sharding.device_set) == 8
    np.testing.assert_allclose(state.params["w"], want["w"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(  # the first step's average is short: decay 1 / 10
        state.ema["w"], 0.1 * _PARAMS["w"] + 0.9 * state.params["w"], rtol=1e-5, atol=1e-6
    )


def test_losses_see_whole_weights_and_the_state_stays_split():
    mesh = sharding.make_mesh(2, 4)
    optimizer = loop.adamw(1e-2, 0, 10, 0.1, 1.0)
    state = jax.eval_shape(lambda p: loop.init_state(p, optimizer), _PARAMS)
    shardings = sharding.fsdp_shardings(state, mesh, min_bytes=0)
    placed = jax.ShapeDtypeStruct((4, 8), np.float32, sharding=shardings.params["w"])
    seen = []

    def loss_fn(params, frozen, batch, key):
        for x in (params["w"], frozen["teacher"]):
            jax.debug.inspect_array_sharding(x, callback=seen.append)
        return _loss(params, frozen, batch, key)

    step = loop.make_train_step(loss_fn, optimizer, mesh, shardings, ema_decay=0.9)
    frozen = {"scale": jnp.float32(1.0), "teacher": placed}
    compiled = step.lower(state, frozen, _batch_at(0), jax.random.key(0)).compile()
    assert len(seen) == 2
    assert all(found.is_fully_replicated for found in seen)
    assert compiled.output_shardings[0].params["w"] == shardings.params["w"]
    assert not shardings.params["w"].is_fully_replicated


def test_every_row_is_seen_once_an_epoch():
    seen = np.concatenate([rows_of_batch(10, 4, step, seed=5) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


def test_data_of_fewer_rows_than_a_batch_is_repeated_evenly():
    batches = [rows_of_batch(3, 8, step, seed=5) for step in range(3)]
    assert np.bincount(np.concatenate(batches)).tolist() == [8, 8, 8]
    assert all(np.bincount(rows, minlength=3).min() >= 2 for rows in batches)


def test_killed_runs_resume_to_the_same_bits(tmp_path):
    def run(name, expected, *arguments):
        _run_apart(expected, f"killed({str(tmp_path / name)!r}, *{arguments!r})")

    def newest():
        paths = (tmp_path / "killed" / "checkpoints").iterdir()
        return max(int(path.name) for path in paths if path.name.isdigit())

    run("whole", 0, None)
    run("killed", -9, 2)  # before any checkpoint
    run("killed", 128 + 15, 5, int(signal.SIGTERM))
    assert newest() == 7  # what was begun when it came, and what tells the other processes
    run("killed", -9, 8)  # while a checkpoint is written
    run("killed", -2, 9, int(signal.SIGINT), 2)  # the second kills at once
    assert newest() <= 8
    run("killed", 0, None)
    results = [np.load(tmp_path / name / "ema.npy") for name in ("whole", "killed")]
    assert results[0].tobytes() == results[1].tobytes()
    left = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in left), left  # and nothing half-written
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    losses = [[line.split('"loss"')[1] for line in text.splitlines()] for text in lines]
    assert len(losses[0]) == _STEPS
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 1), (1, 4), (8, 1)])
def test_a_training_goes_on_from_any_mesh_with_the_same_losses(tmp_path, monkeypatch, data, fsdp):
    monkeypatch.setattr(sharding, "MIN_SHARDED_BYTES", 0)
    meshes = [
        sharding.make_mesh(*shape, jax.devices()[: shape[0] * shape[1]])
        for shape in ((data, fsdp), (2, 4))
    ]
    whole = _fit(tmp_path / "whole", mesh=meshes[1])

    def is_told_to_stop(step):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return _batch_at(step)

    for name, (first, second) in {"there": meshes, "back": meshes[::-1]}.items():
        directory = tmp_path / name
        with pytest.raises(SystemExit, match="143"):
            _fit(directory, is_told_to_stop, mesh=first)
        ema = _fit(directory, mesh=second)
        np.testing.assert_allclose(ema["w"], whole["w"], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(_losses(directory), _losses(tmp_path / "whole"), rtol=1e-6)


def _losses(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _run_apart(expected, call):
    """Calls a function of this file in a process of its own, which ends with a status."""
    here = pathlib.Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here}:{here.parent}"}
    command = [sys.executable, "-c", f"import test_train; test_train.{call}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == expected, done.stderr[-2000:]
    return done.stderr


def killed(directory, kill_at, number=signal.SIGKILL, times=1):
    """Trains, and is sent a signal when the batch of step `kill_at` is asked for."""

    def batch_at(step):
        if step == kill_at:
            for _ in range(times):
                signal.raise_signal(number)
        return _batch_at(step)

    ema = _fit(pathlib.Path(directory), batch_at)
    np.save(pathlib.Path(directory) / "ema.npy", np.asarray(ema["w"]))


def test_a_training_goes_on_to_more_steps_and_not_back_to_fewer(tmp_path):
    asked = []

    def batch_at(step):
        asked.append(step)
        return _batch_at(step)

    _fit(tmp_path / "run", batch_at, num_steps=4)
    _fit(tmp_path / "run", batch_at)
    assert asked == list(range(_STEPS))
    with pytest.raises(ValueError, match=r"trained to step 12, past num_steps, 4: ask for more"):
        _fit(tmp_path / "run", num_steps=4)


def test_a_signal_in_the_last_step_is_not_lost(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job may ignore it
    with pytest.raises(KeyboardInterrupt):
        killed(tmp_path / "run", _STEPS - 1, signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    ema = _fit(tmp_path / "run", _batch_at)  # nothing is left to do
    assert np.any(np.asarray(ema["w"]) != _PARAMS["w"])


def test_ctrl_c_saves_the_step_that_it_interrupts(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as end:
        killed(tmp_path / "es läuft 走", 5, signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert end.value.code == 128 + signal.SIGINT
    assert (tmp_path / "es läuft 走" / "checkpoints" / "7").is_dir()


def test_training_whose_checkpoints_have_no_room_does_not_begin(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=8 * 2**10)  # the parameters take 2 KiB
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"has 8\.19e-06 GB free, and 3 checkpoints of 8\.2.*room"):
        _fit(tmp_path / "run", lambda _: pytest.fail("began"))


def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_spares_the_one_before(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    assert "File too large" in _run_apart(1, f"without_room({str(checkpoints)!r})")
    assert [path.name for path in checkpoints.iterdir() if path.name.isdigit()] == ["4"]
    steps = []
    _fit(tmp_path / "run", lambda step: (steps.append(step), _batch_at(step))[1])
    assert steps[0] == 4


def without_room(checkpoints):
    """Trains, and may write no large files any more once the first checkpoint is there."""

    def batch_at(step):
        if step == 6:
            while not (pathlib.Path(checkpoints) / "4").is_dir():  # it is written meanwhile
                time.sleep(0.01)
            most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            # Bytes of a file: fewer than those of one leaf, of which a file may have any number.
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most))
        return _batch_at(step)

    _fit(pathlib.Path(checkpoints).parent, batch_at)


def test_training_goes_on_from_the_step_before_a_damaged_one(tmp_path):
    whole = np.asarray(_fit(tmp_path / "run")["w"]).tobytes()
    newest = tmp_path / "run" / "checkpoints" / str(_STEPS)
    sums = newest / "checksums" / "metadata"
    values = json.loads(sums.read_text())
    values[".ema['w']"] += 1
    sums.write_text(json.dumps(values))
    steps = []
    ema = _fit(tmp_path / "run", lambda step: (steps.append(step), _batch_at(step))[1])
    assert steps == [8, 9, 10, 11]
    assert np.asarray(ema["w"]).tobytes() == whole


def _broken_from(first, last):
    def batch_at(step):
        batch = _batch_at(step)
        return batch | {"y": batch["y"] * np.float32("nan")} if first <= step <= last else batch

    return batch_at


def test_a_step_that_is_not_finite_moves_nothing_but_its_number():
    mesh, optimizer = sharding.make_mesh(1, 8), loop.adamw(1e-2, 0, 10, 0.1, 1.0)
    state = loop.init_state(jax.tree.map(jnp.asarray, _PARAMS), optimizer)
    shardings = sharding.fsdp_shardings(state, mesh, min_bytes=0)
    step = loop.make_train_step(_loss, optimizer, mesh, shardings, ema_decay=0.9)
    before = jax.device_get(state)
    batch = sharding.place(_broken_from(0, 0)(0), sharding.batch_sharding(mesh))
    after, metrics = step(
        sharding.place(state, shardings), {"scale": jnp.float32(2)}, batch, jax.random.key(1)
    )
    assert metrics["skipped"]
    assert after.step == 1
    same = lambda x, y: np.testing.assert_array_equal(x, y, strict=True)
    jax.tree.map(same, before._replace(step=np.int32(1)), jax.device_get(after))


@pytest.mark.parametrize("log_every", [1, 12])
def test_steps_that_are_not_finite_are_skipped_and_counted(log_every, tmp_path, caplog):
    ema = _fit(tmp_path / "run", _broken_from(5, 6), log_every=log_every)
    assert np.isfinite(ema["w"]).all()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line).get("skipped", 0) for line in lines) == 2
    assert "NaN" not in "".join(lines)
    told = [text for text in caplog.messages if "is skipped" in text]
    assert told == [f"step {n} is skipped: grad_norm, loss not finite" for n in (6, 7)]


def test_a_training_cut_short_before_a_bad_step_ends_as_if_it_had_not_been(tmp_path):
    batch_at = _broken_from(_STEPS - 1, _STEPS - 1)
    whole = _fit(tmp_path / "whole", batch_at)
    _fit(tmp_path / "cut", num_steps=_STEPS - 1)
    np.testing.assert_array_equal(_fit(tmp_path / "cut", batch_at)["w"], whole["w"])


@pytest.mark.parametrize(("log_every", "before"), [(1, 11), (12, 12)])
def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run(log_every, before, tmp_path):
    want = rf"grad_norm, loss not finite in 1\d steps .* before step {before};.* of step 8"
    with pytest.raises(FloatingPointError, match=want):
        _fit(tmp_path / "run", _broken_from(1, 11), log_every=log_every)


def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(tmp_path):
    def loss_fn(params, frozen, batch, key):
        loss, metrics = _loss(params, frozen, batch, key)
        return loss + jnp.sqrt(jnp.sum(0 * params["w"])), metrics  # whose slope at 0 is infinite

    with pytest.raises(FloatingPointError, match=r"run: grad_norm not finite in 10 steps in a row"):
        _fit(tmp_path / "run", loss=loss_fn)


@pytest.mark.parametrize(("num_evals", "steps"), [(0, []), (2, [3, 6])])
def test_a_training_is_evaluated_as_often_as_its_settings_say(tmp_path, num_evals, steps):
    evaluate = lambda params: {"val_size": float(jnp.linalg.norm(params["w"]))}
    _fit(tmp_path, evaluate=evaluate, num_steps=6, num_evals=num_evals)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_size" in line] == steps
