"""Runs the stages that a config asks for, in this order.

python -m sdprune_jax.main --config=configs/NAME.py[:tiny] [--config.KEY=VALUE ...] [--dry_run]

Ends with status 0 when all is done; 2 for a mistake of the user; 143 after SIGTERM, or 130 after
Ctrl-C, which a training saves its step before. The same command then goes on from there.
"""

import ctypes
import dataclasses
import json
import os
import pathlib
import sys

import jax
from absl import app

from sdprune_jax import command_line, config, sharding

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h

# A stage's module is imported only when its section is set: the data and checkpoint libraries
# behind them take seconds, and a mistake in a config should take none.


def main(command: command_line.Command) -> None:
    run = command.run
    if run.mesh.cpu_devices > 1:
        jax.config.update("jax_num_cpu_devices", run.mesh.cpu_devices)
    _cache_compilations()
    if command.dry_run:
        from sdprune_jax import plan

        print(plan.card(run, jax.device_count()))
        return
    sharding.start_processes(run.mesh.coordinator, run.mesh.num_processes, run.mesh.process_id)
    keep_freed_memory()
    for path in run_stages(run):
        print(path)  # the report is the last: the line to look at


def run_stages(run: config.Run) -> list[pathlib.Path]:
    """Runs, or completes, every stage whose section is set; returns what each has written.

    Raises:
        ValueError: if no section is set, or a stage cannot do what its section says.
    """
    if not any(getattr(run, stage) for stage in config.STAGES):
        raise ValueError(f"the config sets no stage: none of {', '.join(config.STAGES)}")
    mesh = sharding.make_mesh(run.mesh.data, run.mesh.fsdp)
    if jax.process_index() == 0:
        save(run)
    paths = []
    if run.pretrain:
        from sdprune_jax.pretrain import run as pretrain

        paths.append(pretrain.run(run, mesh))
    if run.prune:
        from sdprune_jax.pruning import run as prune

        paths.append(prune.run(run, mesh))
    if run.router:
        from sdprune_jax.aptp import train_router

        paths.append(train_router.run(run, mesh))
    if run.assign:
        from sdprune_jax.aptp import experts

        paths.append(experts.assign(run, mesh))
    if run.materialise:
        from sdprune_jax.aptp import experts

        paths.append(experts.materialise(run, mesh))
    if run.slice:
        from sdprune_jax.pruning import slicing

        paths.append(slicing.run(run, mesh))
    if run.finetune:
        from sdprune_jax.aptp import finetune

        paths.append(finetune.run(run, mesh))
    if run.generate:
        from sdprune_jax import generate

        paths.append(generate.run(run, mesh))
    if run.evaluate:
        from sdprune_jax.evaluate import run as evaluate

        paths.append(evaluate.run(run, mesh))
    if run.sweep:
        from sdprune_jax.sweep import run as sweep

        paths.append(sweep.run(run, mesh))
    if run.report:
        from sdprune_jax.report import run as report

        paths.append(report.run(run))
    return paths


def save(run: config.Run) -> None:
    """Writes `workdir/config.json`, whole or not at all.

    Raises:
        ValueError: if the working directory cannot be written.
    """
    path = pathlib.Path(run.workdir) / "config.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(run), indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(
            f"config.workdir is {run.workdir!r}, which cannot be written ({error.strerror});"
            " choose another with --config.workdir=DIRECTORY"
        ) from error


def _cache_compilations() -> None:
    """Keeps what was compiled for the next start, unless the user said where or whether."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path.home() / ".cache" / "sdprune_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def keep_freed_memory() -> None:
    """Lets glibc reuse the large buffers that XLA frees after every step, on a CPU.

    By default they go back to the kernel: page faults took a third of the time of a training.
    """
    if jax.default_backend() == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(_M_ARENA_MAX, 1)


if __name__ == "__main__":
    with command_line.one_message():
        app.run(main, flags_parser=command_line.parse)
