"""Stage `finetune`: every expert learns from its own prompts and from the dense UNet."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Int

from sdprune_jax import UserError, artefacts, config, sharding
from sdprune_jax.aptp import expert_files
from sdprune_jax.aptp.records import ExpertsRecord, FinetuneRecord, FinetuneRow
from sdprune_jax.data import cache, pictures
from sdprune_jax.data.order import rows_of_batch
from sdprune_jax.files import model_directory
from sdprune_jax.models import unet
from sdprune_jax.stages import cost_card, inputs
from sdprune_jax.training import distillation, encoded, loop, settings_file

_NUM_EVALUATED = 8  # batches of unseen prompts


class _Task(NamedTuple):
    """What the trainings of all experts have in common."""

    run: config.Run
    section: config.Finetune
    model: model_directory.ModelConfig
    examples: Mapping[str, encoded.Examples]
    frozen: loop.Params
    mesh: Mesh
    trainings: pathlib.Path


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Trains the experts of the run one after another, or resumes where it was.

    Returns:
        `workdir/finetuned`: diffusers directories `00`, `01`, … with their `prompts.json`, and
        `finetune.json`, with the losses before and after, and the experts that were skipped.

    Raises:
        ValueError: if the run has no experts, none of them has prompts, or the section asks for
            what cannot be.
    """
    section, work = run.finetune, pathlib.Path(run.workdir)
    assert section is not None
    model, output = inputs.open_model(run), artefacts.output_of("finetune", work)
    state = artefacts.model_state(model.directory, run.variant)
    experts = expert_files.read(work, state)
    settings = dataclasses.asdict(section)
    settings |= {"seed": run.seed, "dtype": run.dtype, "variant": run.variant}
    made_from = settings | {
        "model": state,
        "experts": experts.identity,
        "pictures": pictures.checksums_of(experts.data.dataset, experts.data.directory),
    }
    if artefacts.is_complete(output, made_from):
        return output.directory
    trainings = work / "finetune" / experts.identity[:16]
    settings_file.keep(trainings, settings, run.force)

    variant = run.variant or None
    encoders = encoded.Encoders(model, mesh, experts.cache, variant)
    examples = {
        split: encoded.encode_split(encoders, experts.data, split, experts.seed)
        for split in ("train", "val")
    }
    frozen = {
        "teacher": _load(model, mesh, variant),
        "null": jnp.asarray(examples["train"].null, jnp.float32),
    }
    task = _Task(run, section, model, examples, frozen, mesh, trainings)
    with artefacts.writing(output, made_from, resume=True) as partial:
        rows, skipped = [], []
        for index, source in enumerate(experts.directories):
            own = {split: np.flatnonzero(experts.rows[split] == index) for split in examples}
            if len(own["train"]):
                rows.append(_finished_expert(task, source, partial.directory, own, made_from))
            else:
                logging.warning("expert %s has no prompt to train on: skipped", source.name)
                skipped.append(source.name)
        if not rows:
            raise UserError(
                f"none of the {len(skipped)} experts in {work} has a prompt to train on"
            )
        partial.record = FinetuneRecord(rows, skipped)
    return output.directory


def _finished_expert(
    task: _Task,
    source: pathlib.Path,
    directory: pathlib.Path,
    rows: Mapping[str, Int[np.ndarray, " _rows"]],
    made_from: Mapping[str, Any],
) -> FinetuneRow:
    """Trains an expert into `directory`, unless it is there; it waits there for the others."""
    target = directory / source.name
    output = artefacts.Output("finetune", target, target / "finetune.json")
    if not artefacts.is_complete(output, made_from):
        with artefacts.writing(output, made_from) as partial:
            figures = _train_expert(task, source, partial.directory, rows)
            if jax.process_index() == 0:
                shutil.copyfile(source / "prompts.json", partial.directory / "prompts.json")
            partial.record = FinetuneRow(source.name, **figures)
    return artefacts.read(output.record, FinetuneRow)


def _train_expert(
    task: _Task,
    source: pathlib.Path,
    target: pathlib.Path,
    rows: Mapping[str, Int[np.ndarray, " _rows"]],
) -> dict[str, Any]:
    """Trains the expert in `source` and writes it to `target`.

    Returns:
        How many prompts it has, by split, and its losses on unseen ones, `before` and `after`.
    """
    section, seed, expert = task.section, task.run.seed, model_directory.open_model(source)
    loss_fn = make_loss(section, task.model, expert.unet, jnp.dtype(task.run.dtype))
    params = _load(expert, task.mesh, None)
    training = inputs.training_settings(
        section.training,
        optimizer=make_optimizer(section),
        seed=seed,
        mesh=task.mesh,
        directory=task.trainings / f"expert-{source.name}",
    )

    def batch_at(step: int) -> dict[str, Any]:
        picked = rows_of_batch(len(rows["train"]), training.batch_size, step, seed)
        return task.examples["train"].batch(rows["train"][picked], [seed, step])

    evaluate = _evaluator(task, loss_fn, rows["val"] if training.num_evals else rows["val"][:0])
    before = evaluate(params)
    params = loop.fit(training, loss_fn, params, batch_at, task.frozen, evaluate)
    dtype = jnp.dtype(section.save_dtype)
    model_directory.write(expert, {"unet": params}, target, dtype=dtype)
    prompts = {split: len(mine) for split, mine in rows.items()}
    return {"prompts": prompts, "before": before, "after": evaluate(params)}


def make_loss(
    section: config.Finetune,
    model: model_directory.ModelConfig,
    unet_config: unet.UNetConfig,
    dtype: Any = jnp.float32,
) -> loop.LossFn:
    """Returns the loss that the section describes."""
    return distillation.make_loss(
        model,
        unet.UNet(unet_config, dtype, section.remat),
        {name: getattr(section, name) for name in ("denoising", "output", "block")},
        caption_dropout=section.caption_dropout,
        min_snr_gamma=section.min_snr_gamma,
        snr_weight=section.snr_weight,
    )


def make_optimizer(section: config.Finetune) -> optax.GradientTransformation:
    """Returns the optimizer that the section describes."""
    training = section.training
    if section.schedule == "cosine":
        return inputs.adamw(training)
    return distillation.constant_adamw(
        training.learning_rate, training.warmup_steps, training.weight_decay, training.clip_norm
    )


def _evaluator(
    task: _Task, loss_fn: loop.LossFn, rows: Int[np.ndarray, " rows"]
) -> Callable[[loop.Params], dict[str, float]]:
    """Losses of unseen prompts, with the same noise and timesteps every time; none without any."""
    loss_of, split = jax.jit(loss_fn), sharding.batch_sharding(task.mesh)
    batch_size = task.section.training.batch_size

    def evaluate(params: loop.Params) -> dict[str, float]:
        found: list[loop.Metrics] = []
        for picked in cache.in_whole_batches(len(rows), batch_size, _NUM_EVALUATED):
            batch = sharding.place(task.examples["val"].batch(rows[picked], [0]), split)
            found.append(loss_of(params, task.frozen, batch, jax.random.key(int(picked[0])))[1])
        fetched = jax.device_get(found)
        names = fetched[0] if fetched else ()
        return {f"val_{name}": float(np.mean([m[name] for m in fetched])) for name in names}

    return evaluate


def _load(model: model_directory.ModelConfig, mesh: Mesh, variant: str | None) -> loop.Params:
    """Parameters of a UNet in float32, the large ones split over the mesh."""
    shardings = sharding.fsdp_shardings(model_directory.param_shapes(model, "unet"), mesh)
    return model_directory.load(
        model, "unet", dtype=np.float32, variant=variant, sharding=shardings
    )


def check(run: config.Run, num_devices: int) -> None:  # noqa: ARG001
    """Checks the model, and that there are, or will be, experts."""
    inputs.check_model(run)
    if not (run.materialise or run.slice):
        expert_files.read(pathlib.Path(run.workdir))


def plan(run: config.Run, planned: cost_card.Planned) -> str:
    """Returns the steps of each expert; one is a pass of the teacher, and three of the expert.

    What the run does not make now, it has made before: its experts are looked up.
    """
    section, made_by = run.finetune, run.router or run.slice
    assert section is not None
    training, shapes, mesh = section.training, planned.shapes["unet"], planned.mesh
    if made_by:
        source, shares = inputs.picture_source(made_by.data), [made_by.macs_budget]
        count = run.router.num_codes if run.router else 1
    else:
        record = artefacts.output_of("materialise", run.workdir).record
        cut = artefacts.read(record, ExpertsRecord) if record.is_file() else None
        source = cut.data if cut else pictures.PictureSource()
        shares = [row.share_of_macs for row in cut.experts] if cut else [1.0]
        count = len(shares)
    unet_macs = cost_card.unet_macs(planned, source.side)
    work = training.batch_size * unet_macs * (1 + (3 + section.remat) * float(np.mean(shares)))
    optimizer = make_optimizer(section)
    state = jax.eval_shape(lambda params: loop.init_state(params, optimizer), shapes)
    frozen, own = (
        cost_card.in_bytes(cost_card.bytes_a_device(tree, mesh)) for tree in (shapes, state)
    )
    return (
        f"finetune: experts {count}, each {training.num_steps:,} steps of"
        f" {training.batch_size:,} prompts, about {work / 1e12:,.3g} TMACs each; a device holds"
        f" {frozen} of teacher and at most {own} of state"
    )
