"""Stage `finetune`: every expert learns from its own prompts and from the dense UNet.

Experts may first learn together: one set of weights of the dense shape, of which each batch uses,
for every prompt, what the prompt's expert keeps. So every expert profits from all prompts and
steps, then goes on alone. Source: weights shared by networks of several widths, as in Slimmable
Neural Networks, ICLR 2019 (https://arxiv.org/abs/1812.08928), and Once-for-All, ICLR 2020
(https://arxiv.org/abs/1908.09791).
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from sdprune_jax import checkpoint, config, sharding, sites, tensors, train, train_settings
from sdprune_jax.aptp import data, distillation, expert_files, pictures
from sdprune_jax.aptp.distillation import Rows
from sdprune_jax.aptp.layout import layout_of, to_architecture
from sdprune_jax.data import cache


class _Task(NamedTuple):
    """What the trainings of a run have in common."""

    run: config.Run
    section: config.Finetune
    model: checkpoint.Model
    experts: expert_files.Experts
    examples: Mapping[str, data.Examples]
    frozen: train.Params
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
    experts, output = expert_files.read(work), work / "finetuned"
    model = checkpoint.open_model(checkpoint.directory_of(run.model))
    settings = dataclasses.asdict(section)
    settings |= {"seed": run.seed, "dtype": run.dtype, "variant": run.variant}
    made_from = cache.fingerprint(settings, experts.made_from)
    record, trainings = output / "finetune.json", work / "finetune" / experts.made_from
    if sharding.of_first(lambda: tensors.is_record_of(record, made_from)):
        logging.info("%s is complete: made from the same config and experts", output)
        return output
    together, alone = _num_steps(section, experts)
    _check(section, together, alone, mesh)
    train_settings.keep(trainings, settings, run.force)

    examples = {}
    for split in ("train", "val"):
        pairs = pictures.load(experts.data, split)
        texts = pictures.prompts(experts.data, pairs, split, experts.seed).texts
        examples[split] = data.examples(
            experts.data, model, pairs, texts, mesh, experts.cache, run.variant or None
        )
    frozen = {
        "teacher": _load(model, mesh, run.variant or None),
        "null": jnp.asarray(examples["train"].null, jnp.float32),
    }
    task = _Task(run, section, model, experts, examples, frozen, mesh, trainings)
    partial = _partial(output, made_from)
    shared, figures = _train_shared(task, together) if together else (None, {})

    done, skipped = [], []
    for expert, source in enumerate(experts.directories):
        name = source.name
        if expert not in experts.rows["train"]:
            logging.warning("expert %s has no prompt to train on: skipped", name)
            skipped.append(name)
            continue
        if not sharding.of_first((partial / name / "finetune.json").exists):
            own = _train_expert(task, expert, _start(task, shared, expert), alone, partial / name)
            if jax.process_index() == 0:
                shutil.copyfile(source / "prompts.json", partial / name / "prompts.json")
                tensors.write_json(partial / name / "finetune.json", own)
            sharding.wait_for_all(name)
        done.append({"directory": name} | tensors.read_json(partial / name / "finetune.json"))
    if not done:
        raise ValueError(f"none of the {len(skipped)} experts in {work} has a prompt to train on")
    values = {"made_from": made_from, "section": dataclasses.asdict(section), "shared": figures}
    values |= {"experts": done, "skipped": skipped}
    return expert_files.finish(partial, output, "finetune.json", values)


def _num_steps(section: config.Finetune, experts: expert_files.Experts) -> tuple[int, int]:
    """How many steps all experts take together, and how many each of them alone.

    One expert, or one that was not cut by gates, has nothing to share.
    """
    training, count = section.training, len(np.unique(experts.rows["train"]))
    if experts.architectures is None or count < 2:
        return 0, training.num_steps
    shared = round(section.shared * training.num_steps)
    return shared * count, training.num_steps - shared


def _check(section: config.Finetune, together: int, alone: int, mesh: Mesh) -> None:
    """Refuses what cannot be trained, naming every problem."""
    training, problems = section.training, []
    if training.batch_size % mesh.size:
        problems.append(
            f"training.batch_size is {training.batch_size}, expected a multiple of the"
            f" {mesh.size} devices"
        )
    asked = {"an expert alone": alone} | ({"all experts together": together} if together else {})
    for of, steps in asked.items():
        length = steps // training.cycles
        if training.warmup_steps >= length:
            problems.append(
                f"training.warmup_steps is {training.warmup_steps}, not fewer than the {length}"
                f" steps of a cycle of {of}"
            )
    if problems:
        text = "\n  its ".join(problems)
        raise ValueError(f"config.finetune is not possible:\n  its {text}")


def _train_shared(task: _Task, num_steps: int) -> tuple[train.Params, dict[str, dict[str, float]]]:
    """Trains weights of the dense shape for all experts; returns them, on the host, and losses."""
    model, experts, layout = task.model, task.experts, layout_of(sites.table(task.model.unet))
    assert experts.architectures is not None
    keep = experts.architectures.astype(np.float32)

    def batch_of(split: str, rows: Rows, seed: list[int]) -> dict[str, Any]:
        gates = keep[experts.rows[split][rows]]
        return task.examples[split].batch(rows, seed) | {"gates": gates}

    dtype = jnp.dtype(task.run.dtype)
    params, figures = distillation.fit(
        task.section, num_steps,
        distillation.make_loss(task.section, model, model.unet, dtype, layout),
        jax.tree.map(jnp.copy, task.frozen["teacher"]),  # a training gives its buffers away
        batch_of, {split: np.arange(len(experts.rows[split])) for split in task.examples},
        task.frozen, mesh=task.mesh, seed=task.run.seed, directory=task.trainings / "shared",
    )  # fmt: skip
    return jax.tree.map(sharding.to_host, params), figures


def _start(task: _Task, shared: train.Params | None, expert: int) -> train.Params:
    """What an expert starts from: its part of the shared weights or, without any, its own."""
    model, architectures = _open(task, expert), task.experts.architectures
    if shared is None or architectures is None:
        return _load(model, task.mesh, None)
    keep = to_architecture(architectures[expert], layout_of(sites.table(task.model.unet)))
    params, _ = sites.slice_params(shared, task.model.unet, keep)
    shapes = checkpoint.param_shapes(model, "unet")
    return sharding.place(params, sharding.fsdp_shardings(shapes, task.mesh))


def _train_expert(
    task: _Task, expert: int, params: train.Params, num_steps: int, target: pathlib.Path
) -> dict[str, Any]:
    """Trains one expert from `params` and writes it; returns its figures."""
    section, model = task.section, _open(task, expert)
    rows = {split: np.flatnonzero(task.experts.rows[split] == expert) for split in task.examples}
    params, figures = distillation.fit(
        section, num_steps,
        distillation.make_loss(section, task.model, model.unet, jnp.dtype(task.run.dtype)),
        params, lambda split, rows, seed: task.examples[split].batch(rows, seed), rows,
        task.frozen, mesh=task.mesh, seed=task.run.seed,
        directory=task.trainings / f"expert-{target.name}",
    )  # fmt: skip
    dtype = jnp.dtype(section.save_dtype)
    checkpoint.save(model, {"unet": params}, target, dtype=dtype, overwrite=target.exists())
    return {"prompts": {split: len(mine) for split, mine in rows.items()}, **figures}


def _open(task: _Task, expert: int) -> checkpoint.Model:
    return checkpoint.open_model(task.experts.directories[expert])


def _load(model: checkpoint.Model, mesh: Mesh, variant: str | None) -> train.Params:
    """Parameters of a UNet in float32, the large ones split over the mesh."""
    shardings = sharding.fsdp_shardings(checkpoint.param_shapes(model, "unet"), mesh)
    return checkpoint.load(model, "unet", dtype=np.float32, variant=variant, sharding=shardings)


def _partial(output: pathlib.Path, made_from: str) -> pathlib.Path:
    """Where finished experts wait for the others; emptied if they are of another config."""
    partial = output.with_name(f"{output.name}.tmp")
    record = partial / "made_from.json"
    if jax.process_index() == 0 and not tensors.is_record_of(record, made_from):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors.write_json(record, {"made_from": made_from})
    return partial
