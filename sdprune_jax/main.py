"""Runs the stages that a config asks for, in this order.

python -m sdprune_jax.main --config=configs/NAME.py[:tiny] [--config.KEY=VALUE ...] [--dry_run]

Ends with status 0 when all is done; 2 for a mistake of the user; 143 after SIGTERM, or 130 after
Ctrl-C, which a training saves its step before. The same command then goes on from there.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import importlib
import os
import pathlib
import socket
import sys
from collections.abc import Iterator
from typing import TextIO

import jax
from absl import app, logging
from jax.sharding import Mesh

from sdprune_jax import UserError, config, sharding
from sdprune_jax.config import checks, command_line
from sdprune_jax.files import tensors

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h

# A stage's module is imported only when its section is set: the data and checkpoint libraries
# behind them take seconds, and a mistake in a config should take none.


def main(command: command_line.Command) -> None:
    run = command.run
    try:
        os.getcwd()  # a library would fail later, and say less
    except FileNotFoundError as error:
        raise UserError("the current directory was deleted: cd to one that is there") from error
    if run.mesh.cpu_devices > 1:
        jax.config.update("jax_num_cpu_devices", run.mesh.cpu_devices)
        keep_freed_memory()
    _cache_compilations()
    if command.dry_run:
        from sdprune_jax.stages import plan

        print(plan.card(run, jax.device_count()))
        return
    sharding.start_processes(run.mesh.coordinator, run.mesh.num_processes, run.mesh.process_id)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    for path in run_stages(run):
        print(path)  # the report is the last: the line to look at


def run_stages(run: config.Run) -> list[pathlib.Path]:
    """Runs, or completes, every stage whose section is set; returns what each has written.

    Raises:
        ValueError: if no section is set, another run is at work in the directory of this one, or
            a stage cannot do what its section says.
    """
    if not any(getattr(run, stage) for stage in config.STAGES):
        raise UserError(f"the config sets no stage: none of {', '.join(config.STAGES)}")
    mesh = sharding.make_mesh(run.mesh.data, run.mesh.fsdp)
    checks.check_devices(run, mesh.size)
    if run.evaluate:
        from sdprune_jax.evaluate import needs

        needs.check(run.evaluate)  # now, and not after hours of other stages
    with alone(run.workdir):
        if jax.process_index() == 0:
            save(run)
        return _stages(run, mesh)


def _stages(run: config.Run, mesh: Mesh) -> list[pathlib.Path]:
    paths = []
    for name in config.STAGES:
        if getattr(run, name):
            stage = importlib.import_module(f"sdprune_jax.stages.{name}")
            paths.append(stage.run(run, mesh))
    return paths


def save(run: config.Run) -> None:
    """Writes `workdir/config.json`, whole or not at all.

    Raises:
        ValueError: if the working directory cannot be written.
    """
    path = pathlib.Path(run.workdir) / "config.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors.write_json(path, dataclasses.asdict(run))
    except OSError as error:
        raise UserError(_unwritable(run.workdir, error)) from error


@contextlib.contextmanager
def alone(workdir: str) -> Iterator[None]:
    """Keeps other runs out of `workdir` meanwhile; a run that dies, however it does, keeps none.

    Raises:
        ValueError: in every process, if another run is at work there, or it cannot be written.
    """
    path, problem = pathlib.Path(workdir).absolute() / "lock", ""
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                problem = _lock(stack.enter_context(path.open("a+")), path)
            except OSError as error:
                problem = _unwritable(workdir, error)
        if sharding.of_first(lambda: bool(problem)):
            raise UserError(problem or "the first process cannot use config.workdir, as it says")
        yield


def _lock(file: TextIO, path: pathlib.Path) -> str:
    """Locks an open file until it is closed; returns why it cannot."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return (
            f"config.workdir is {str(path.parent)!r}, where another run is at work:"
            f" {file.read().strip()}; wait for its end, choose another with"
            f" --config.workdir=DIRECTORY, or, if its machine is gone, delete {path}"
        )
    except OSError as error:  # a file system that has no locks
        logging.warning("%s cannot be locked (%s): start no other run there", path, error.strerror)
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return ""


def _unwritable(workdir: str, error: OSError) -> str:
    return (
        f"config.workdir is {workdir!r}, which cannot be written ({error.strerror});"
        " choose another with --config.workdir=DIRECTORY"
    )


def _cache_compilations() -> None:
    """Keeps what was compiled for the next start, unless the user said where or whether."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.path.expanduser("~/.cache/sdprune_jax/xla")
        with contextlib.suppress(OSError):  # a home that cannot be written; `~` stays if none is
            if not cache.startswith("~"):
                os.makedirs(cache, exist_ok=True)
                jax.config.update("jax_compilation_cache_dir", cache)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def keep_freed_memory() -> None:
    """Lets glibc reuse the large buffers that XLA frees after every step, on a CPU.

    By default they go back to the kernel: page faults took a third of the time of a training. Call
    it before JAX has devices: the threads of several keep the arenas that they begin with.
    """
    if sys.platform != "linux":
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries have none
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
        mallopt(_M_ARENA_MAX, 1)


if __name__ == "__main__":
    with command_line.one_message():
        app.run(main, flags_parser=command_line.parse)
