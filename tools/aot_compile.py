"""Compiles a training step for a TPU that is not there: memory, FLOPs and collectives of each chip.

    python tools/aot_compile.py --config=configs/NAME.py --stage=router --topology=v5e-16

and, if needed, --config.KEY=VALUE, --num_slices=2, --optimized.

Nothing runs and no weights are read, only the model's configs. What does not fit in the memory of
a chip is refused here instead of on the pod. A step of Stable Diffusion 2 takes 3 to 5 minutes and
8 GB; `--optimized` five times as long, for the same memory and collectives. Needs libtpu:

    pip install 'jax[tpu]'
"""

import argparse
import importlib.util
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
# libtpu asks a server of the cloud about the machine, and locks it, unless it is told otherwise.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh

from sdprune_jax import checkpoint, command_line, config, sharding, sites, train
from sdprune_jax.aptp import codebook, finetune, router, train_router
from sdprune_jax.aptp.layout import layout_of

STAGES = ("router", "finetune")
_GRIDS = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_NUM_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"


class Chip(NamedTuple):
    """What one chip has; memory is what the compiler leaves of it, the rest is from the vendor.

    Source: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, for bfloat16.
    """

    memory: float  # GiB
    flops: float  # a second
    bandwidth: float  # of the memory, bytes a second
    network: float  # between chips of a slice, bytes a second


CHIPS = {
    "v4": Chip(30.75, 275e12, 1.23e12, 0.300e12),
    "v5e": Chip(15.75, 197e12, 0.82e12, 0.200e12),
    "v5p": Chip(95.74, 459e12, 2.77e12, 0.600e12),
    "v6e": Chip(31.25, 918e12, 1.64e12, 0.448e12),
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--topology", required=True)
    parser.add_argument("--num_slices", type=int, default=1)
    parser.add_argument("--optimized", action="store_true")
    asked, rest = parser.parse_known_args(argv)
    run = command_line.parse(["aot_compile", *rest], flags.FlagValues()).run
    if not asked.optimized:
        jax.config.update("jax_optimization_level", "O0")
    name = topology_name(asked.topology)
    mesh = sharding.make_mesh(run.mesh.data, run.mesh.fsdp, _devices(name, asked.num_slices))
    print(f"{asked.stage} on {asked.num_slices} x {name}: {dict(mesh.shape)}")
    start = time.monotonic()
    compiled = compile_step(lower_step(run, asked.stage, mesh))
    print(f"compiled in {time.monotonic() - start:.0f} s")
    print(report(compiled, CHIPS[name.partition(":")[0]]))


def topology_name(text: str) -> str:
    """`v5e-16` as libtpu calls it, `v5e:4x4`; names of libtpu stay as they are.

    Raises:
        ValueError: if it is neither.
    """
    kind, _, count = text.partition("-")
    if kind in ("v5e", "v6e") and count.isdigit() and int(count) in _GRIDS:
        return f"{kind}:{_GRIDS[int(count)]}"
    if re.fullmatch(rf"({'|'.join(CHIPS)}):\d+x\d+(x\d+)?", text):
        return text
    raise ValueError(
        f"--topology={text}: expected v5e-N or v6e-N with N of {', '.join(map(str, _GRIDS))}, or"
        " chips along each axis, such as v4:2x2x4, v5p:4x4x4 or v5e:4x4"
    )


def _devices(name: str, num_slices: int) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"libtpu is not installed: pip install 'jax[tpu]=={jax.__version__}'")
    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if name.startswith("v4"):  # one device a chip, as on the machine itself
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"libtpu makes no --topology={name}: {error}") from error
    return found.devices


def lower_step(run: config.Run, stage: str, mesh: Mesh) -> jax.stages.Lowered:
    """The training step of a stage, of shapes alone; an expert is taken to be as large as the UNet.

    Raises:
        ValueError: if the section of the stage is not set, or its batch does not fit the mesh.
    """
    section = getattr(run, stage)
    if section is None:
        raise ValueError(f"--stage={stage}: config.{stage} is not set; use another stage or config")
    model = checkpoint.open_model(checkpoint.directory_of(run.model))
    dtype, size = jnp.dtype(run.dtype), model.unet.sample_size
    shapes = checkpoint.param_shapes(model, "unet")
    if stage == "router":
        size, batch_size = section.latent_size or size, section.batch_size
        layout = layout_of(sites.table(model.unet))
        costs = train_router.budget_costs(section, model, (size, size))
        loss_fn = train_router.make_loss(section, model, costs, layout, dtype)
        optimizer = codebook.make_optimizer(section, None)
        width = model.text_encoder.hidden_size
        params = jax.eval_shape(
            lambda: jax.tree.map(
                jnp.asarray, router.init_params(layout, width, section.num_codes, 0)
            )
        )
        frozen, decay = shapes, section.ema_decay
    else:
        batch_size, decay = section.training.batch_size, section.training.ema_decay
        loss_fn = finetune.make_loss(section, model, model.unet, dtype)
        optimizer, params = finetune.make_optimizer(section), shapes
        null = (1, model.text_encoder.max_position_embeddings, model.text_encoder.hidden_size)
        frozen = {"teacher": shapes, "null": jax.ShapeDtypeStruct(null, jnp.float32)}
    if batch_size % mesh.size:
        raise ValueError(
            f"config.{stage}: a batch of {batch_size} is not split over {mesh.size} devices;"
            f" use a multiple, such as {math.ceil(batch_size / mesh.size) * mesh.size}"
        )
    placed = lambda tree, places: jax.tree.map(lambda x, s: x.update(sharding=s), tree, places)
    state = jax.eval_shape(lambda tree: train.init_state(tree, optimizer), params)
    places = sharding.fsdp_shardings(state, mesh)
    step = train.make_train_step(loss_fn, optimizer, mesh, places, decay)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return step.lower(  # pyrefly: ignore[missing-attribute]
        placed(state, places),
        placed(frozen, sharding.fsdp_shardings(frozen, mesh)),
        batch_shapes(model, batch_size, size, stage, mesh),
        key.update(sharding=sharding.replicated(mesh)),
    )


def batch_shapes(
    model: checkpoint.Model, batch_size: int, size: int, stage: str, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `aptp.data.Examples.batch` gives a stage."""
    text, split = model.text_encoder, sharding.batch_sharding(mesh)
    latent = (size, size, model.unet.in_channels)
    kinds = {
        "embedding": ((text.hidden_size,), jnp.float32),
        "text": ((text.max_position_embeddings, text.hidden_size), jnp.float16),
        "mean": (latent, jnp.float32),
        "log_variance": (latent, jnp.float32),
    }
    if stage == "router":
        kinds["warms_up"] = ((), jnp.bool_)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=split)
        for name, (shape, dtype) in kinds.items()
    }


def compile_step(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a step.

    Raises:
        ValueError: if it does not fit in the memory of a chip.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        too_much = re.search(r"Ran out of memory.*", str(error))
        if not too_much:
            raise
        raise ValueError(
            f"{too_much[0][:300]}\n  a chip cannot hold it: raise config.mesh.fsdp, set remat in"
            " the stage's section, lower its batch_size, compute in config.dtype=bfloat16, or take"
            " more chips"
        ) from error


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """How many of each kind a compiled program has, and the bytes of their results, by its text."""
    found: dict[str, tuple[int, int]] = {}
    for line in text.splitlines():
        # `-start` begins one that `-done` only waits for.
        if match := re.search(rf"= (.*?) ({_KINDS})(-start)?\(", line):
            results = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", match[1])
            sizes = [
                _NUM_BYTES.get(kind, 0) * math.prod(int(n) for n in shape.split(",") if n)
                for kind, shape in results
            ]
            # What begins has its operands beside its results.
            num_bytes = max(sizes, default=0) if match[3] else sum(sizes)
            count, total = found.get(match[2], (0, 0))
            found[match[2]] = (count + 1, total + num_bytes)
    return found


def report(compiled: jax.stages.Compiled, chip: Chip) -> str:
    """Memory, work and collectives of a chip, and the least time that each takes."""
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis() or {}
    flops, moved = cost.get("flops", math.nan), cost.get("bytes accessed", math.nan)
    sent = collectives(compiled.as_text() or "")
    total = sum(num_bytes for _, num_bytes in sent.values())
    times = {
        "work": flops / chip.flops,
        "memory": moved / chip.bandwidth,
        "network": total / chip.network,
    }
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
