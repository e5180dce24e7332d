"""Two processes of two devices each, over the loopback: what a pod does, and what happens to it."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax import sharding, train

_STARTED = []
_STEPS = 12
_PARAMS = {"w": np.linspace(-1, 1, 32 * 16, dtype=np.float32).reshape(32, 16)}


def _loss(params, frozen, batch, key):
    noise = 0.1 * jax.random.normal(key, batch["y"].shape)
    loss = jnp.mean((frozen["scale"] * (batch["x"] @ params["w"]) - batch["y"] - noise) ** 2)
    return loss, {"loss": loss}


def trains(directory, coordinator="", process_id=0, pause=0.0):
    """What each process runs; it writes the rows it has asked for, and what it has learned."""
    jax.config.update("jax_num_cpu_devices", 2 if coordinator else 4)
    sharding.start_processes(coordinator, 2 if coordinator else 0, process_id)
    mesh = sharding.make_mesh(2, 2)
    directory = pathlib.Path(directory)
    directory.mkdir(exist_ok=True)
    x = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)
    seen = (directory / f"rows{process_id}").open("a")

    def batch_at(step):
        rows = train.rows_of_batch(40, 16, step, seed=0)
        print(step, *rows, file=seen, flush=True)
        time.sleep(pause)
        return {"x": x[rows], "y": np.ones((16, 16), np.float32)}

    sharding.MIN_SHARDED_BYTES = 0
    ema = train.fit(
        _loss, _PARAMS, train.adamw(1e-2, 2, _STEPS, 0.1, 1.0), batch_at,
        {"scale": np.float32(2.0)}, mesh=mesh, num_steps=_STEPS, ema_decay=0.9, seed=3,
        directory=directory, log_every=1, save_every=4,
    )  # fmt: skip
    assert len(ema["w"].sharding.device_set) == 4
    whole = sharding.to_host(ema["w"])
    if process_id == 0:
        np.save(directory / "ema.npy", whole)


def _start(*arguments):
    here = pathlib.Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here}:{here.parent}", "JAX_PLATFORMS": "cpu"}
    source = f"import test_processes; test_processes.trains(*{arguments!r})"
    command = [sys.executable, "-c", source]
    _STARTED.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE))
    return _STARTED[-1]


@pytest.fixture(autouse=True)
def _none_is_left():
    yield
    for process in _STARTED:
        process.kill()
        process.communicate()


def _start_two(directory, pause=0.0):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [_start(str(directory), address, i, pause) for i in range(2)]


def _ends(process, *expected):
    _, errors = process.communicate(timeout=300)
    assert process.returncode in expected, errors.decode()[-3000:]


def _wait_for_step(directory, step):
    end = time.monotonic() + 300
    while time.monotonic() < end:
        path = directory / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise TimeoutError(f"{directory} has not come to step {step}")


def _losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def _newest(directory):
    paths = (directory / "checkpoints").iterdir()
    return max(int(path.name) for path in paths if path.name.isdigit())


def test_two_processes_train_as_one_and_stop_as_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    _ends(_start(str(one)), 0)

    first, second = _start_two(two, pause=0.2)
    _wait_for_step(two, 2)
    second.send_signal(signal.SIGTERM)  # one host is told, all of them save and stop
    _ends(first, 143)
    _ends(second, 143)
    step = _newest(two)
    assert 2 < step < _STEPS

    first, second = _start_two(two, pause=0.2)
    _wait_for_step(two, step + 1)
    second.kill()
    _, errors = first.communicate(timeout=90)  # 30 s of silence and what it takes to end
    assert first.returncode != 0, errors.decode()[-3000:]

    _ends(_start(str(two)), 0)  # goes on where they were, on a host with all of the devices
    np.testing.assert_allclose(np.load(two / "ema.npy"), np.load(one / "ema.npy"), rtol=1e-6)
    np.testing.assert_allclose(_losses(two), _losses(one), rtol=1e-6)
    rows = dict(line.split(" ", 1) for line in (two / "rows0").read_text().splitlines())
    assert rows == dict(line.split(" ", 1) for line in (one / "rows0").read_text().splitlines())
