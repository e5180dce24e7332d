"""Stage `finetune`: every expert learns from its own prompts and from the dense UNet."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Int

from sdprune_jax import checkpoint, config, sharding, tensors, train, train_settings
from sdprune_jax.aptp import data, expert_files, losses, pictures
from sdprune_jax.data import cache
from sdprune_jax.models import unet

_NUM_EVALUATED = 8  # batches of unseen prompts


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
    training, problems = section.training, []
    if training.batch_size % mesh.size:
        problems.append(
            f"batch_size is {training.batch_size}, expected a multiple of the {mesh.size} devices"
        )
    if training.warmup_steps >= training.num_steps // training.cycles:
        problems.append(
            f"warmup_steps is {training.warmup_steps}, not fewer than the"
            f" {training.num_steps // training.cycles} steps of a cycle"
        )
    if problems:
        text = "\n  its ".join(problems)
        raise ValueError(f"config.finetune.training is not possible:\n  its {text}")
    train_settings.keep(trainings, settings, run.force)

    rows = {split: experts.rows[split] for split in ("train", "val")}
    examples = {}
    for split in rows:
        pairs = pictures.load(experts.data, split)
        texts = pictures.prompts(experts.data, pairs, split, experts.seed).texts
        examples[split] = data.examples(
            experts.data, model, pairs, texts, mesh, experts.cache, run.variant or None
        )
    frozen = {
        "teacher": _load(model, mesh, run.variant or None),
        "null": jnp.asarray(examples["train"].null, jnp.float32),
    }

    partial = _partial(output, made_from)
    done, skipped = [], []
    for expert, source in enumerate(experts.directories):
        name = source.name
        mine = {split: np.flatnonzero(found == expert) for split, found in rows.items()}
        if not len(mine["train"]):
            logging.warning("expert %s has no prompt to train on: skipped", name)
            skipped.append(name)
            continue
        if not sharding.of_first((partial / name / "finetune.json").exists):
            figures = _train_expert(
                run, model, source, partial / name, examples, mine, frozen, mesh,
                trainings / f"expert-{name}",
            )  # fmt: skip
            if jax.process_index() == 0:
                shutil.copyfile(source / "prompts.json", partial / name / "prompts.json")
                tensors.write_json(partial / name / "finetune.json", figures)
            sharding.wait_for_all(name)
        done.append({"directory": name} | tensors.read_json(partial / name / "finetune.json"))
    if not done:
        raise ValueError(f"none of the {len(skipped)} experts in {work} has a prompt to train on")
    values = {"made_from": made_from, "section": dataclasses.asdict(section)}
    values |= {"experts": done, "skipped": skipped}
    return expert_files.finish(partial, output, "finetune.json", values)


def make_loss(
    section: config.Finetune,
    model: checkpoint.Model,
    unet_config: unet.UNetConfig,
    dtype: Any = jnp.float32,
) -> train.LossFn:
    """The loss of an expert's parameters; `frozen` has `teacher` and the states of no text, `null`.

    Teacher and student see the same, and no text at times. Blocks that only one of them has are
    not compared.
    """
    pairs = losses.common_blocks(unet_config, model.unet)
    teach: Any = unet.UNet(model.unet, dtype).apply
    apply: Any = unet.UNet(unet_config, dtype, remat=section.remat).apply
    kind = model.schedule.prediction_type
    weights = {"denoising": section.denoising, "output": section.output, "block": section.block}

    def loss_fn(params, frozen, batch, key):
        keys = jax.random.split(key)
        noisy = data.noised(batch, keys[0], model.schedule, model.vae.scaling_factor)
        drop = jax.random.bernoulli(keys[1], section.caption_dropout, noisy.timestep.shape)
        text = jnp.where(drop[:, None, None], frozen["null"], batch["text"].astype(jnp.float32))
        inputs = (noisy.latents, noisy.timestep, text)
        teacher, teacher_blocks = teach({"params": frozen["teacher"]}, *inputs, return_blocks=True)
        student, blocks = apply({"params": params}, *inputs, return_blocks=True)
        parts = {
            "denoising": losses.denoising(
                student, noisy.target, noisy.alpha_cumprod, kind, section.min_snr_gamma or None,
                section.snr_weight,
            ),
            "output": losses.output_distillation(student, teacher),
            "block": losses.block_distillation(
                [blocks[i] for i, _ in pairs], [teacher_blocks[j] for _, j in pairs]
            ),
        }  # fmt: skip
        loss = losses.weighted_sum(parts, weights)
        return loss, parts | {"loss": loss}

    return loss_fn


def make_optimizer(section: config.Finetune) -> optax.GradientTransformation:
    """AdamW whose rate decays to zero or, as published, stays."""
    training = section.training
    if section.schedule == "cosine":
        return train.adamw(
            training.learning_rate, training.warmup_steps, training.num_steps,
            training.weight_decay, training.clip_norm, training.cycles,
        )  # fmt: skip
    ramp = optax.linear_schedule(0.0, training.learning_rate, training.warmup_steps)
    rate_at = ramp if training.warmup_steps else optax.constant_schedule(training.learning_rate)
    return optax.chain(
        optax.clip_by_global_norm(training.clip_norm),
        optax.adamw(rate_at, b1=0.9, b2=0.999, weight_decay=training.weight_decay),
    )


def _train_expert(
    run: config.Run,
    model: checkpoint.Model,
    source: pathlib.Path,
    target: pathlib.Path,
    examples: dict[str, data.Examples],
    rows: dict[str, Int[np.ndarray, " _rows"]],
    frozen: train.Params,
    mesh: Mesh,
    directory: pathlib.Path,
) -> dict[str, Any]:
    """Trains one expert and writes it; returns its figures on unseen prompts."""
    section = run.finetune
    assert section is not None
    expert, training = checkpoint.open_model(source), section.training
    loss_fn = make_loss(section, model, expert.unet, jnp.dtype(run.dtype))
    params = _load(expert, mesh, None)

    def batch_at(step: int) -> dict[str, Any]:
        mine = rows["train"]
        picked = train.rows_of_batch(len(mine), training.batch_size, step, run.seed)
        return examples["train"].batch(mine[picked], [run.seed, step])

    unseen = rows["val"] if training.num_evals else rows["val"][:0]
    evaluate = _evaluator(loss_fn, examples["val"], unseen, training.batch_size, frozen, mesh)
    before = evaluate(params)
    params = train.fit(
        loss_fn, params, make_optimizer(section), batch_at, frozen,
        mesh=mesh, num_steps=training.num_steps, ema_decay=training.ema_decay, seed=run.seed,
        directory=directory, log_every=training.log_every, save_every=training.save_every,
        evaluate=evaluate, eval_every=max(training.num_steps // max(training.num_evals, 1), 1),
    )  # fmt: skip
    dtype = jnp.dtype(section.save_dtype)
    checkpoint.save(expert, {"unet": params}, target, dtype=dtype, overwrite=target.exists())
    return {
        "prompts": {split: len(mine) for split, mine in rows.items()},
        "before": before,
        "after": evaluate(params),
    }


def _evaluator(
    loss_fn: train.LossFn,
    examples: data.Examples,
    rows: Int[np.ndarray, " rows"],
    batch_size: int,
    frozen: train.Params,
    mesh: Mesh,
) -> Callable[[train.Params], dict[str, float]]:
    """Losses of unseen prompts, with the same noise and timesteps every time; none without any."""
    loss_of, split = jax.jit(loss_fn), sharding.batch_sharding(mesh)
    count = min(len(rows), _NUM_EVALUATED * batch_size)

    def evaluate(params: train.Params) -> dict[str, float]:
        found: list[train.Metrics] = []
        for picked in cache.in_batches(count, batch_size):
            batch = sharding.place(examples.batch(rows[picked], [0]), split)
            found.append(loss_of(params, frozen, batch, jax.random.key(int(picked[0])))[1])
        fetched = jax.device_get(found)
        names = fetched[0] if fetched else ()
        return {f"val_{name}": float(np.mean([m[name] for m in fetched])) for name in names}

    return evaluate


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
