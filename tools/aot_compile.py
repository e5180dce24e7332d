"""Compiles a program of a run for a TPU that is not there: what each chip holds, does and sends.

    python tools/aot_compile.py --config=configs/NAME.py --stage=router --topology=v5e-16

and, if needed, --config.KEY=VALUE, --num_slices=2, --optimized, --num_steps=5000. Stages are
router, finetune, pretrain: their training steps; prune: its calibration; generate, evaluate: their
pictures; features.

Nothing runs and no weights are read, only the model's configs. What does not fit in the memory of
a chip is refused here instead of on the pod. A step of Stable Diffusion 2 takes 3 to 5 minutes and
8 GB; `--optimized` five times as long, for the same memory and collectives. `--num_steps` says what
so many calls take, here and on 16 A100s. Needs libtpu:

    pip install 'jax[tpu]'
"""

import argparse
import contextlib
import importlib.util
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
# libtpu asks a server of the cloud about the machine, and locks it, unless it is told otherwise.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import aot_costs
import aot_programs
import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from sdprune_jax import UserError, sharding
from sdprune_jax.config import command_line

_GRIDS = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--stage", choices=aot_programs.STAGES, required=True)
    parser.add_argument("--topology", required=True)
    parser.add_argument("--num_slices", type=int, default=1)
    parser.add_argument("--optimized", action="store_true")
    parser.add_argument("--num_steps", type=int, default=0)
    parser.add_argument("--utilization", type=float, default=0.4)  # share of the roofline
    args, rest = parser.parse_known_args(argv)
    run = command_line.parse(["aot_compile", *rest], flags.FlagValues()).run
    if not args.optimized:
        jax.config.update("jax_optimization_level", "O0")
    name = topology_name(args.topology)
    mesh = sharding.make_mesh(run.mesh.data, run.mesh.fsdp, devices(name, args.num_slices))
    print(f"{args.stage} on {args.num_slices} x {name}: {dict(mesh.shape)}")
    start = time.monotonic()
    compiled = compile_step(aot_programs.lower(run, args.stage, mesh))
    print(f"compiled in {time.monotonic() - start:.0f} s")
    kind = name.partition(":")[0]
    chip = aot_costs.CHIPS[kind]
    print(report(compiled, chip))
    if not args.optimized:
        print("not optimized: memory traffic, and the time that it takes, are upper bounds")
    if args.num_steps:
        work = aot_costs.work_of(compiled)
        print(aot_costs.scaling(work, kind, chip, mesh.size, args.num_steps, args.utilization))


def topology_name(text: str) -> str:
    """Turns `v5e-16` into libtpu's name `v5e:4x4`; names of libtpu stay as they are.

    Raises:
        UserError: if it is neither.
    """
    kind, _, count = text.partition("-")
    if kind in ("v5e", "v6e") and count.isdigit() and int(count) in _GRIDS:
        return f"{kind}:{_GRIDS[int(count)]}"
    if re.fullmatch(rf"({'|'.join(aot_costs.CHIPS)}):\d+x\d+(x\d+)?", text):
        return text
    raise UserError(
        f"--topology={text}: expected v5e-N or v6e-N with N of {', '.join(map(str, _GRIDS))}, or"
        " chips along each axis, such as v4:2x2x4, v5p:4x4x4 or v5e:4x4"
    )


def devices(name: str, num_slices: int) -> Sequence[Any]:
    """Returns the chips of slices that are not there.

    Raises:
        UserError: if libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"libtpu is not installed: pip install 'jax[tpu]=={jax.__version__}'")
    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if name.startswith("v4"):  # one device a chip, as on the machine itself
        options["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (RuntimeError, ValueError) as error:
        raise UserError(f"libtpu makes no --topology={name}: {error}") from error


def compile_step(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a step, past the compilation cache: no program of absent chips is read back.

    Raises:
        UserError: if it does not fit in the memory of a chip.
    """
    try:
        with _no_cache():
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        too_much = re.search(r"Ran out of memory.*", str(error))
        if not too_much:
            raise
        raise UserError(
            f"{too_much[0][:300]}\n  a chip cannot hold it: raise config.mesh.fsdp, set remat in"
            " the stage's section, lower its batch_size, compute in config.dtype=bfloat16, or take"
            " more chips"
        ) from error


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    used = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX reads the setting once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", used)
        compilation_cache.reset_cache()


def report(compiled: jax.stages.Compiled, chip: aot_costs.Chip) -> str:
    """Says what memory, work and collectives a chip has, and the least time that each takes."""
    memory: Any = compiled.memory_analysis()
    work = aot_costs.work_of(compiled)
    flops, moved, sent = work
    times = work.seconds(chip)
    limit = max(times, key=lambda name: np.nan_to_num(times[name]))
    gib = lambda num_bytes: f"{num_bytes / 2**30:.2f} GiB"
    lines = [
        f"memory      {gib(memory.argument_size_in_bytes)} of arguments,"
        f" {gib(memory.temp_size_in_bytes)} temporary; at most"
        f" {gib(memory.peak_memory_in_bytes)} of {chip.memory} GiB",
        f"work        {flops / 1e12:.2f} TFLOP, {moved / 1e9:.1f} GB of memory traffic,"
        f" {flops / moved:.0f} FLOPs a byte (loops are counted once)",
        *(
            f"{kind:20} {count:5}, {num_bytes / 1e6:.1f} MB"
            for kind, (count, num_bytes) in sorted(sent.items())
        ),
        "at least    " + ", ".join(f"{1e3 * t:.1f} ms by {name}" for name, t in times.items()),
        f"a step takes {1e3 * times[limit]:.1f} ms or more: limited by {limit}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    with command_line.one_message():
        main(sys.argv[1:])
