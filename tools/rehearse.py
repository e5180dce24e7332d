r"""Rehearses a pod on this machine: a run as several processes, told to stop, killed, and resumed.

    python tools/rehearse.py --processes=2 --devices=2 --config=configs/NAME.py [--config.KEY=VALUE]

The config should train: the router, say, in a few steps that are logged and saved often. Below its
workdir the same run is made by one process (`one`), by all of them (`many`), and by all of them in
three parts (`parts`): SIGTERM to one, SIGKILL to one, and to the end as one process that has all of
the devices. It prints what each part did, and how far losses and figures are from those of `one`;
ends with status 1 if the processes did not end as they should, or losses differ by more than 1e-4.
The devices are of the CPU, `--devices` a process. For the embedded model, 18 minutes on 2 cores:

    python tools/rehearse.py --processes=4 --config=configs/evaluate_embedded.py \
        --config.prune=none --config.finetune=none --config.report=none \
        --config.router.num_steps=24 --config.router.warmup_steps=12 --config.router.log_every=1 \
        --config.evaluate.num_images=48
"""

import argparse
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from absl import flags

from sdprune_jax import UserError
from sdprune_jax.config import command_line

_SECONDS = 3600  # for a part to come to an end
_TOLERANCE = 1e-4


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2)
    asked, rest = parser.parse_known_args(argv)
    run = command_line.parse(["rehearse", *rest], flags.FlagValues()).run
    work, count = pathlib.Path(run.workdir) / "rehearsal", asked.processes
    if work.exists():
        raise UserError(f"{work} is there: remove it, or choose another --config.workdir")

    one, many, parts = (work / name for name in ("one", "many", "parts"))
    all_devices = count * asked.devices
    ends = [_told("one process", _end(_start(rest, one, 1, all_devices)), [0])]
    expected = [0] * count
    ends.append(
        _told(f"{count} processes", _end(_start(rest, many, count, asked.devices)), expected)
    )

    started = _start(rest, parts, count, asked.devices)
    _wait_for_lines(parts, 1, started)
    started[-1].send_signal(signal.SIGTERM)
    ends.append(_told("SIGTERM to the last", _end(started), [143] * count))
    lines = _lines(parts)
    started = _start(rest, parts, count, asked.devices)
    _wait_for_lines(parts, lines + 1, started)
    started[-1].kill()
    start = time.monotonic()
    codes = _end(started)
    seconds = time.monotonic() - start
    ends.append(all(codes) and seconds < 60)
    print(f"SIGKILL to the last: the others ended in {seconds:.0f} s, statuses {codes}")
    ends.append(_told("to the end by one", _end(_start(rest, parts, 1, all_devices)), [0]))

    furthest = max(_compare(one, many), _compare(one, parts))
    sys.exit(0 if all(ends) and furthest <= _TOLERANCE else 1)


def _start(
    rest: Sequence[str], workdir: pathlib.Path, count: int, devices: int
) -> list[subprocess.Popen[bytes]]:
    """Starts a run as `count` processes; what each says goes to `workdir/process-N.log`."""
    workdir.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "sdprune_jax.main", *rest, f"--config.workdir={workdir}"]
    command.append(f"--config.mesh.cpu_devices={devices}")
    if count > 1:
        command += [f"--config.mesh.coordinator={address}", f"--config.mesh.num_processes={count}"]
    # A process that finds a program compiled waits 30 s for the others, which may be compiling it.
    env = os.environ | ({"JAX_ENABLE_COMPILATION_CACHE": "false"} if count > 1 else {})
    started = []
    for index in range(count):
        own = [f"--config.mesh.process_id={index}"] if count > 1 else []
        with (workdir / f"process-{index}.log").open("ab") as log:
            started.append(subprocess.Popen([*command, *own], stdout=log, stderr=log, env=env))
    return started


def _end(started: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Waits for processes, and returns their statuses; negative ones are signals."""
    limit = time.monotonic() + _SECONDS
    try:
        return [process.wait(limit - time.monotonic()) for process in started]
    finally:
        for process in started:
            process.kill()


def _told(name: str, found: list[int], expected: list[int]) -> bool:
    print(f"{name}: statuses {found}" + ("" if found == expected else f", expected {expected}"))
    return found == expected


def _wait_for_lines(
    workdir: pathlib.Path, number: int, started: Sequence[subprocess.Popen[bytes]]
) -> None:
    while _lines(workdir) < number:
        if any(process.poll() is not None for process in started):
            _end(started)
            raise UserError(f"a process ended before it logged a step: see {workdir}/*.log")
        time.sleep(0.05)


def _lines(workdir: pathlib.Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in workdir.rglob("metrics.jsonl"))


def _compare(one: pathlib.Path, other: pathlib.Path) -> float:
    """Prints how far two runs are apart; returns by how much their losses are, relatively."""
    found, expected = _losses(other), _losses(one)
    if found.keys() != expected.keys():
        raise UserError(f"{other} logged other steps than {one}")
    apart = [abs(found[key] / expected[key] - 1) for key in expected]
    print(f"{other.name}: {len(apart)} losses, at most {max(apart):.1e} from those of one process")
    if (one / "evaluate.json").exists():
        models = [
            json.loads((work / "evaluate.json").read_text())["models"] for work in (one, other)
        ]
        for name, values in models[0].items():
            far = max(
                abs(models[1][name]["figures"][key]["value"] / figure["value"] - 1)
                for key, figure in values["figures"].items()
            )
            print(f"{other.name}: figures of the {name} model at most {far:.1e}")
    return max(apart)


def _losses(workdir: pathlib.Path) -> dict[tuple[str, int], float]:
    """By training and step, each of them once.

    Raises:
        ValueError: if a step was logged twice, or none was.
    """
    found: dict[tuple[str, int], float] = {}
    for path in sorted(workdir.rglob("metrics.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            if "loss" in line:
                key = (str(path.parent.relative_to(workdir)), line["step"])
                if key in found:
                    raise UserError(f"{path} has step {line['step']} twice")
                found[key] = line["loss"]
    if not found:
        raise UserError(f"{workdir} logged no step: the config trains nothing")
    return found


if __name__ == "__main__":
    with command_line.one_message():
        main(sys.argv[1:])
