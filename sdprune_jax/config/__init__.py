"""The schema of a run. A stage runs if, and only if, its section is set.

`checks.check` holds every field to its type and to what `of` and `within` say beside it.
"""

import dataclasses
import types
from typing import Any

from sdprune_jax import UserError
from sdprune_jax.config.experts import (
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
    if run.pretrain:
        run.pretrain.num_images = 64
        small = {
            "num_steps": 4,
            "batch_size": 16,
            "warmup_steps": 1,
            "cycles": 1,
            "log_every": 2,
            "save_every": 2,
            "num_evals": 1,
        }
        for part in run.pretrain.trainings().values():
            for name, value in small.items():
                setattr(part, name, value)
        if run.pretrain.clip.soup_strengths:
            run.pretrain.clip.soup_strengths = run.pretrain.clip.soup_strengths[:1]
        run.pretrain.clip.text_layers, run.pretrain.clip.vision_layers = 2, 1
        run.pretrain.clip.width, run.pretrain.clip.whole_from = 32, 2
        run.pretrain.vae.widths = (8, 8, 16)
        run.pretrain.unet.widths, run.pretrain.unet.heads = (8, 16), (1, 2)
        run.pretrain.unet.captions_per_image = 1
    else:
        run.model = "embedded"
    if run.prune:
        run.prune.calibration = _tiny(run.prune.calibration)
    if run.router:
        data = _tiny_data(run.router.data)
        run.router = dataclasses.replace(
            run.router,
            num_codes=2,
            num_steps=4,
            warmup_steps=2,
            batch_size=8,
            ramp_steps=1,
            learning_rate=1e-2,
            log_every=2,
            save_every=2,
            num_evals=1,
            data=data,
        )
    if run.slice:
        data = _tiny_data(run.slice.data)
        run.slice = dataclasses.replace(
            run.slice, data=data, calibration=_tiny(run.slice.calibration)
        )
    if run.finetune:
        run.finetune.training = dataclasses.replace(
            run.finetune.training,
            num_steps=2,
            batch_size=8,
            warmup_steps=1,
            cycles=1,
            ema_decay=0.5,
            log_every=1,
            save_every=2,
            num_evals=1,
        )
    if run.generate:
        run.generate = dataclasses.replace(
            run.generate,
            prompts="embedded",
            num_prompts=2,
            batch_size=2,
            num_steps=2,
            height=None,
            width=None,
        )
    if run.evaluate:
        run.evaluate = dataclasses.replace(
            run.evaluate,
            protocol="embedded",
            references="",
            num_images=8,
            batch_size=8,
            num_resamples=10,
        )
    if run.sweep:
        points = run.sweep.points
        run.sweep = dataclasses.replace(
            run.sweep,
            points=points[:: -(-len(points) // 3) or 1],  # three
            num_seeds=1,
            num_steps=2,
            cliff=None,
            calibration=_tiny(run.sweep.calibration),
            measure=dataclasses.replace(
                run.sweep.measure, protocol="embedded", references="", num_images=8, batch_size=8
            ),
        )
    return run


def _tiny(section: Calibration) -> Calibration:
    gradients = Gradients(num_images=8, batch_size=8, num_timesteps=2)
    return dataclasses.replace(
        section, prompts="embedded", num_prompts=8, batch_size=8, num_steps=2, gradients=gradients
    )


def _tiny_data(section: RouterData) -> RouterData:
    return dataclasses.replace(
        section, dataset="embedded", encoder="text_encoder", num_images=64, captions_per_image=1
    )
