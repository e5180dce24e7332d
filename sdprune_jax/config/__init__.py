"""The schema of a run. A stage runs if, and only if, its section is set.

`checks.check` holds every field to its type and to what `of` and `within` say beside it.
"""

import dataclasses
import types
from typing import Any

from sdprune_jax import UserError
from sdprune_jax.config.experts import (
    DATASETS,
    Assign,
    Finetune,
    Materialise,
    Router,
    RouterData,
    RouterLosses,
    Slice,
)
from sdprune_jax.config.fields import DTYPES, of, within
from sdprune_jax.config.measuring import (
    PROTOCOLS,
    SAMPLERS,
    Cliff,
    Evaluate,
    Generate,
    Report,
    Sweep,
    SweepPoint,
)
from sdprune_jax.config.pretraining import Pretrain, PretrainCLIP, PretrainUNet, PretrainVAE
from sdprune_jax.config.pruning import (
    TIMESTEP_WEIGHTS,
    Calibration,
    Gradients,
    Override,
    Prune,
    PruneComponent,
)
from sdprune_jax.config.training import Training

__all__ = [
    "DATASETS",
    "DTYPES",
    "PROTOCOLS",
    "SAMPLERS",
    "STAGES",
    "TIMESTEP_WEIGHTS",
    "Assign",
    "Calibration",
    "Cliff",
    "Evaluate",
    "Finetune",
    "Generate",
    "Gradients",
    "Materialise",
    "Mesh",
    "Override",
    "Pretrain",
    "PretrainCLIP",
    "PretrainUNet",
    "PretrainVAE",
    "Prune",
    "PruneComponent",
    "Report",
    "Router",
    "RouterData",
    "RouterLosses",
    "Run",
    "Slice",
    "Sweep",
    "SweepPoint",
    "Training",
    "resize",
    "stage",
    "stages_of",
]


@dataclasses.dataclass
class Mesh:
    """Devices along each axis, and the processes that they belong to."""

    data: int = within(-1, -1, 2**20)  # devices; -1: all that fsdp leaves
    fsdp: int = within(1, 1, 2**20)  # devices
    # Devices to make of a CPU: one a core trains 1.4 and draws 1.6 times as fast as one of all.
    cpu_devices: int = within(1, 1, 1024)
    # Where the processes of a run find each other. Empty: there is one. `auto`: as Cloud TPU,
    # Slurm, Open MPI or Kubernetes says. Else HOST:PORT of the first, with the two fields below.
    coordinator: str = ""
    num_processes: int = within(0, 0, 2**20)  # 0: as the coordinator says
    process_id: int = within(0, 0, 2**20)  # of this process


@dataclasses.dataclass
class Run:
    """One experiment."""

    workdir: str = "runs/run"
    model: str = "embedded"  # directory in diffusers layout, or `embedded`
    variant: str = ""  # e.g. fp16, of the model's files
    seed: int = within(0, 0, 2**32 - 1)
    dtype: str = of("float32", *DTYPES)  # of the computation
    force: bool = False  # trains on though settings changed that an outcome depends on; or --force
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    pretrain: Pretrain | None = None
    prune: Prune | None = None
    router: Router | None = None
    assign: Assign | None = None
    materialise: Materialise | None = None
    slice: Slice | None = None
    finetune: Finetune | None = None
    generate: Generate | None = None
    evaluate: Evaluate | None = None
    sweep: Sweep | None = None
    report: Report | None = None

    def check(self) -> list[str]:
        """Returns what is wrong between fields that are each possible alone."""
        problems = []
        for name in stages_of(self):
            section = getattr(self, name)
            problems += section.check(f"config.{name}") if hasattr(section, "check") else []
        if self.slice and self.materialise:
            problems.append(
                "config.slice and config.materialise would both write the run's experts; set one"
                " to none, or give them different workdirs"
            )
        if self.pretrain and self.dtype != "float32":
            problems.append(
                f"config.dtype is {self.dtype}, and pretrain computes in float32 alone; leave"
                " dtype out, or pretrain in a run of its own"
            )
        return problems


STAGES = tuple(
    field.name for field in dataclasses.fields(Run) if isinstance(field.type, types.UnionType)
)  # in order


def stage(module: str) -> Any:
    """A field of a subclass of `Run` for a section whose stage is another package's module.

    Args:
        module: dotted name of a module with `check`, `plan` and `run`, as those in
            `sdprune_jax.stages`.
    """
    return dataclasses.field(default=None, metadata={"stage": module})


def stages_of(run: Run) -> dict[str, str]:
    """Returns the module of every stage whose section is set, by the section's name, in order."""
    return {
        field.name: field.metadata.get("stage", f"sdprune_jax.stages.{field.name}")
        for field in dataclasses.fields(run)
        if isinstance(field.type, types.UnionType) and getattr(run, field.name)
    }


def resize(run: Run, size: str | None) -> Run:
    """Returns `run` for a pod or GPU, or, for `tiny`, shrunk to a minute or two of a CPU.

    Raises:
        ValueError: if `size` is neither None nor `tiny`.
    """
    if size is None:
        return run
    if size != "tiny":
        raise UserError(
            f"unknown size {size!r} after the config's name; use `tiny`, or leave it out"
        )
    run.workdir += "_tiny"
    if not run.pretrain:
        run.model = "embedded"
    for name in stages_of(run):
        section = getattr(run, name)
        if hasattr(section, "tiny"):
            setattr(run, name, section.tiny())
    return run
