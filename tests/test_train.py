import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdprune_jax import sharding, train

_STEPS = 12
_PARAMS = {"w": np.linspace(-1, 1, 32 * 16, dtype=np.float32).reshape(32, 16)}


def _loss(params, frozen, batch, key):
    noise = 0.1 * jax.random.normal(key, batch["y"].shape)
    loss = jnp.mean((frozen["scale"] * (batch["x"] @ params["w"]) - batch["y"] - noise) ** 2)
    return loss, {"loss": loss}


def _batch_at(step):
    rows = train.rows_of_batch(40, 16, step, seed=0)
    x = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)
    return {"x": x[rows], "y": np.ones((16, 16), np.float32)}


def _fit(directory, batch_at=_batch_at):
    return train.fit(
        _loss, _PARAMS, train.adamw(1e-2, 2, _STEPS, 0.1, 1.0), batch_at,
        {"scale": jnp.float32(2.0)}, mesh=sharding.make_mesh(1, jax.device_count()),
        num_steps=_STEPS, ema_decay=0.9, seed=3, directory=directory, log_every=1, save_every=4,
    )  # fmt: skip


@pytest.mark.parametrize(("data", "fsdp"), [(1, 8), (8, 1), (2, 4)])
def test_a_step_does_not_depend_on_the_mesh(data, fsdp):
    mesh = sharding.make_mesh(data, fsdp)
    optimizer = train.adamw(1e-2, 0, 10, 0.1, 1.0)
    state = train.init_state(jax.tree.map(jnp.asarray, _PARAMS), optimizer)
    batch, scale = _batch_at(0), jnp.float32(2.0)
    (loss, _), grads = jax.value_and_grad(_loss, has_aux=True)(
        state.params, {"scale": scale}, batch, jax.random.fold_in(jax.random.key(1), 0)
    )
    updates, _ = optimizer.update(grads, state.opt_state, state.params)
    want = optax.apply_updates(state.params, updates)

    shardings = sharding.fsdp_shardings(state, mesh, min_bytes=0)
    step = train.make_train_step(_loss, optimizer, mesh, shardings, ema_decay=0.9)
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


def test_every_row_is_seen_once_an_epoch():
    seen = np.concatenate([train.rows_of_batch(10, 4, step, seed=5) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


def test_killed_runs_resume_to_the_same_bits(tmp_path):
    def run(name, kill_at):
        source = f"import test_train; test_train.killed({str(tmp_path / name)!r}, {kill_at})"
        here = pathlib.Path(__file__).parent
        env = os.environ | {"PYTHONPATH": f"{here}:{here.parent}"}
        done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True)
        expected = 0 if kill_at is None else -signal.SIGKILL
        assert done.returncode == expected, done.stderr.decode()[-2000:]

    run("whole", None)
    for kill_at in (2, 8, 10):  # before any checkpoint, while one is written, between two
        run("killed", kill_at)
    run("killed", None)
    results = [np.load(tmp_path / name / "ema.npy") for name in ("whole", "killed")]
    assert results[0].tobytes() == results[1].tobytes()
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    losses = [[line.split('"loss"')[1] for line in text.splitlines()] for text in lines]
    assert len(losses[0]) == _STEPS
    assert losses[0] == losses[1]


def killed(directory, kill_at):
    """Trains, and dies by SIGKILL when the batch of step `kill_at` is asked for."""

    def batch_at(step):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return _batch_at(step)

    ema = _fit(pathlib.Path(directory), batch_at)
    np.save(pathlib.Path(directory) / "ema.npy", np.asarray(ema["w"]))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def batch_at(step):
        batch = _batch_at(step)
        return batch | {"y": batch["y"] * np.float32("nan")} if step == 5 else batch

    with pytest.raises(FloatingPointError, match=r"loss.* between steps 5 and 6.*of step 4"):
        _fit(tmp_path / "run", batch_at)
