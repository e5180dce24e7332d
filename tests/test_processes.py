"""Two processes of two devices each, over the loopback: what a pod does, and what happens to it."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from PIL import Image

from sdprune_jax import config, main, sharding
from sdprune_jax.data import cache, emoji
from sdprune_jax.data.order import rows_of_batch
from sdprune_jax.evaluate.protocols import PROTOCOLS
from sdprune_jax.training import loop

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
    mesh = sharding.make_mesh(1, 4)  # a process holds half of everything
    directory = pathlib.Path(directory)
    directory.mkdir(exist_ok=True)
    x = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)
    seen = (directory / f"rows{process_id}").open("a")

    def batch_at(step):
        rows = rows_of_batch(40, 16, step, seed=0)
        print(step, *rows, file=seen, flush=True)
        time.sleep(pause)
        return {"x": x[rows], "y": np.ones((16, 16), np.float32)}

    sharding.MIN_SHARDED_BYTES = 0
    optimizer = loop.adamw(1e-2, 2, _STEPS, 0.1, 1.0)
    values = {"num_steps": _STEPS, "batch_size": 16, "ema_decay": 0.9, "seed": 3}
    values |= {"log_every": 1, "save_every": 4, "num_evals": 0}
    training = loop.TrainingSettings(optimizer, mesh=mesh, directory=directory, **values)
    ema = loop.fit(training, _loss, _PARAMS, batch_at, {"scale": np.float32(2.0)})
    assert {shard.data.shape for shard in ema["w"].addressable_shards} == {(8, 16)}
    whole = sharding.to_host(ema["w"])
    if process_id == 0:
        np.save(directory / "ema.npy", whole)


def evaluates(directory, model, coordinator="", process_id=0):
    """What each process runs: two models from one program, their pictures, and their figures."""
    jax.config.update("jax_num_cpu_devices", 2 if coordinator else 4)
    sharding.start_processes(coordinator, 2 if coordinator else 0, process_id)
    cache._LARGE = 0  # every file is known by its time
    if process_id:  # a host may have a copy of its own, of another time
        model = shutil.copytree(model, f"{directory}-model", copy_function=shutil.copyfile)
    references = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), np.uint8)
    emoji.load = lambda _: emoji.Pairs(references, *np.zeros((2, 40), np.int32))
    metrics = [m for m in PROTOCOLS["embedded"].metrics if m.kind in ("fid", "cmmd", "clip_score")]
    PROTOCOLS["embedded"] = dataclasses.replace(
        PROTOCOLS["embedded"], num_steps=3, metrics=tuple(metrics)
    )
    prompts = pathlib.Path(__file__).parents[1] / "configs" / "prompts.txt"
    run = config.Run(
        workdir=directory,
        model=str(model),
        prune=config.Prune(
            text_encoder=config.PruneComponent(method="wanda"),
            calibration=config.Calibration(num_prompts=6, batch_size=4),
        ),
        generate=config.Generate(
            prompts=str(prompts), num_prompts=5, batch_size=4, num_steps=3, guidance_scale=3.0
        ),
        evaluate=config.Evaluate(num_images=6, batch_size=4, num_resamples=5),
        report=config.Report(),
    )
    main.run_stages(run)
    main.run_stages(run)  # and finds that all is done


def waits(coordinator, process_id):
    """What a process does that hears nothing of another: it should end, not wait for ever."""
    sharding.start_processes(coordinator, 2, process_id)
    print("started", flush=True)
    sharding.of_first(lambda: time.sleep(300))


def seeks(coordinator, process_id):
    """What a process does whose others never come, but that it waits 300 s for them by default."""
    logging.set_verbosity(logging.INFO)
    jax.distributed.initialize = functools.partial(
        jax.distributed.initialize, initialization_timeout=1
    )
    sharding.start_processes(coordinator, 2, process_id)


def _start(function, *arguments):
    here = pathlib.Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here}:{here.parent}", "JAX_PLATFORMS": "cpu"}
    source = f"import test_processes; test_processes.{function.__name__}(*{arguments!r})"
    command = [sys.executable, "-c", source]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    _STARTED.append(subprocess.Popen(command, env=env, **pipes))
    return _STARTED[-1]


@pytest.fixture(autouse=True)
def _none_is_left():
    yield
    for process in _STARTED:
        process.kill()
        process.communicate()


def _start_two(function, *arguments, after=()):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [_start(function, *arguments, address, i, *after) for i in range(2)]


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
    _ends(_start(trains, str(one)), 0)

    first, second = _start_two(trains, str(two), after=(0.2,))
    _wait_for_step(two, 2)
    second.send_signal(signal.SIGTERM)  # one host is told, all of them save and stop
    _ends(first, 143)
    _ends(second, 143)
    step = _newest(two)
    assert 2 < step < _STEPS

    first, second = _start_two(trains, str(two), after=(0.2,))
    _wait_for_step(two, step + 1)
    second.kill()
    _, errors = first.communicate(timeout=90)  # 30 s of silence and what it takes to end
    assert first.returncode != 0, errors.decode()[-3000:]
    assert b"Task 1 heartbeat timeout" in errors  # which process it is that was lost

    _ends(_start(trains, str(two)), 0)  # goes on where they were, on a host with all of the devices
    found, want = (np.load(work / "ema.npy") for work in (two, one))
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-7)  # Gloo sums in its own order
    np.testing.assert_allclose(_losses(two), _losses(one), rtol=1e-6)
    rows = dict(line.split(" ", 1) for line in (two / "rows0").read_text().splitlines())
    assert rows == dict(line.split(" ", 1) for line in (one / "rows0").read_text().splitlines())


def test_two_processes_evaluate_as_one(tmp_path):
    import aptp_model  # which starts JAX: not before the processes of this file

    model = aptp_model.make(tmp_path / "model", aptp_model.ONE_LEVEL)
    one, two = tmp_path / "one", tmp_path / "two"
    _ends(_start(evaluates, str(one), str(model.directory)), 0)
    for process in _start_two(evaluates, str(two), str(model.directory)):
        _ends(process, 0)

    _are_alike(two, one)
    assert (two / "report.html").is_file()
    assert not list(two.rglob("*tmp*"))


def _are_alike(work, other):
    """But for rounding: how XLA splits a sum on a CPU depends on the devices of a process."""
    pictures, want = _pictures(work), _pictures(other)
    assert pictures.keys() == want.keys()
    assert len(want) == 2 * 5 + 2 * 6
    for name, image in want.items():
        difference = np.abs(pictures[name] - image)
        assert difference.max() <= 1, name
        assert difference.mean() < 1e-3, name
    found, expected = (
        [json.loads((path / name).read_text()) for name in ("evaluate.json", "prune.json")]
        for path in (work, other)
    )
    assert found[1]["components"] == expected[1]["components"]
    for name, values in expected[0]["models"].items():
        for figure, numbers in values["figures"].items():
            got = found[0]["models"][name]["figures"][figure]
            assert got == pytest.approx(numbers, rel=1e-4, abs=1e-5), (name, figure)


def _pictures(work):
    """By path, less the fingerprint in it, of which the times of the model's files are part."""
    return {
        re.sub("-[0-9a-f]{16}", "", str(path.relative_to(work))): np.asarray(Image.open(path), int)
        for path in work.rglob("*.png")
    }


def test_processes_end_when_the_first_does():
    first, second = _start_two(waits)
    for process in (first, second):
        assert process.stdout.readline() == b"started\n"
    first.kill()
    _, errors = second.communicate(timeout=90)  # 30 s of silence and what it takes to end
    assert second.returncode != 0
    assert b"leader task" in errors, errors.decode()[-3000:]


def test_a_process_that_finds_no_other_ends():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for process in (_start(seeks, address, 0), _start(seeks, "127.0.0.1:1", 1)):
        _, errors = process.communicate(timeout=90)
        assert process.returncode != 0
        assert b"DEADLINE_EXCEEDED" in errors, errors.decode()[-3000:]
        assert b"looking for the other processes" in errors  # with their address
