"""Runs the stages that a config asks for, in order.

python -m sdprune_jax.main --config=configs/NAME.py[:tiny] [--config.KEY=VALUE ...] [--dry_run]

Ends with status 0 when all is done; 2 for a mistake of the user; 143 after SIGTERM, or 130 after
Ctrl-C, which a training saves its step before. The same command then goes on from there.
"""

import dataclasses
import importlib
import pathlib
import types

import jax
from absl import app

from sdprune_jax import UserError, config, sharding
from sdprune_jax.config import checks, command_line
from sdprune_jax.files import lock


def main(command: command_line.Command) -> None:
    run = command.run
    sharding.prepare_machine(run.mesh.cpu_devices)
    if command.dry_run:
        from sdprune_jax.stages import cost_card

        check(run, jax.device_count())
        print(cost_card.card(run, jax.device_count()))
        return
    sharding.start_processes(run.mesh.coordinator, run.mesh.num_processes, run.mesh.process_id)
    if jax.default_backend() == "cpu":
        sharding.keep_freed_memory()
    for path in run_stages(run):
        print(path)  # the report is the last: the line to look at


def run_stages(run: config.Run) -> list[pathlib.Path]:
    """Checks every stage whose section is set, then runs or completes them, in order.

    Returns:
        What each stage has written.

    Raises:
        UserError: if no section is set, another run is at work in the directory of this one, or
            a stage cannot do what its section says.
    """
    mesh = sharding.make_mesh(run.mesh.data, run.mesh.fsdp)
    check(run, mesh.size)
    with lock.alone(run.workdir):
        lock.save_config(run.workdir, dataclasses.asdict(run))
        return [stage.run(run, mesh) for stage in stages_of(run)]


def stages_of(run: config.Run) -> list[types.ModuleType]:
    """Imports the stages whose section is set; data libraries behind the others take seconds."""
    modules = config.stages_of(run)
    if not modules:
        raise UserError(f"the config sets no stage: none of {', '.join(config.STAGES)}")
    return [importlib.import_module(module) for module in modules.values()]


def check(run: config.Run, num_devices: int) -> None:
    """Checks all inputs of all stages, and names everything that would end the run later."""
    checks.check_devices(run, num_devices)
    problems = []
    for stage in stages_of(run):
        try:
            stage.check(run, num_devices)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


if __name__ == "__main__":
    with command_line.one_message():
        app.run(main, flags_parser=command_line.parse)
