"""How a smaller UNet learns from the dense one: loss, optimizer and loop of fine-tuning."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Int

from sdprune_jax import checkpoint, config, sharding, train
from sdprune_jax.aptp import data, losses
from sdprune_jax.aptp.layout import Layout, to_gates
from sdprune_jax.data import cache
from sdprune_jax.models import unet

_NUM_EVALUATED = 8  # batches of unseen prompts

Rows = Int[np.ndarray, " rows"]


def make_loss(
    section: config.Finetune,
    model: checkpoint.Model,
    unet_config: unet.UNetConfig,
    dtype: Any = jnp.float32,
    layout: Layout | None = None,
) -> train.LossFn:
    """The loss of a student's parameters; `frozen` has `teacher` and the states of no text, `null`.

    Teacher and student see the same, and no text at times. Blocks that only one of them has are
    not compared.

    Args:
        section: weights of the losses.
        model: whose UNet teaches.
        unet_config: of the student.
        dtype: of the activations.
        layout: of the student's gates, which the batch has as `gates`, a vector of each prompt;
            None if it has none.
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
        gates = to_gates(batch["gates"], layout) if layout else None
        student, blocks = apply({"params": params}, *inputs, gates, return_blocks=True)
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


def make_optimizer(section: config.Finetune, num_steps: int) -> optax.GradientTransformation:
    """AdamW whose rate decays to zero by `num_steps` or, as published, stays."""
    training = section.training
    if section.schedule == "cosine":
        return train.adamw(
            training.learning_rate, training.warmup_steps, num_steps, training.weight_decay,
            training.clip_norm, training.cycles,
        )  # fmt: skip
    ramp = optax.linear_schedule(0.0, training.learning_rate, training.warmup_steps)
    rate_at = ramp if training.warmup_steps else optax.constant_schedule(training.learning_rate)
    return optax.chain(
        optax.clip_by_global_norm(training.clip_norm),
        optax.adamw(rate_at, b1=0.9, b2=0.999, weight_decay=training.weight_decay),
    )


def fit(
    section: config.Finetune,
    num_steps: int,
    loss_fn: train.LossFn,
    params: train.Params,
    batch_of: Callable[[str, Rows, list[int]], Mapping[str, Any]],
    rows: Mapping[str, Rows],
    frozen: train.Params,
    *,
    mesh: Mesh,
    seed: int,
    directory: pathlib.Path,
) -> tuple[train.Params, dict[str, dict[str, float]]]:
    """Trains a student, or resumes it.

    Args:
        section: of the config.
        num_steps: optimizer steps in all.
        loss_fn: of `make_loss`.
        params: where to start.
        batch_of: examples of some rows of a split, mirrored as a seed draws.
        rows: by split, train and val, those that the student is for.
        frozen: of `loss_fn`.
        mesh: of `sharding.make_mesh`.
        seed: of the order and of the noise.
        directory: of this training alone.

    Returns:
        The moving average of the parameters, and the losses of unseen prompts `before` and `after`.
    """
    training, mine = section.training, rows["train"]

    def batch_at(step: int) -> Mapping[str, Any]:
        picked = train.rows_of_batch(len(mine), training.batch_size, step, seed)
        return batch_of("train", mine[picked], [seed, step])

    loss_of, split = jax.jit(loss_fn), sharding.batch_sharding(mesh)
    count = min(len(rows["val"]), _NUM_EVALUATED * training.batch_size)

    def evaluate(params: train.Params) -> dict[str, float]:
        """With the same noise and timesteps every time."""
        found: list[train.Metrics] = []
        for picked in cache.in_batches(count if training.num_evals else 0, training.batch_size):
            batch = sharding.place(batch_of("val", rows["val"][picked], [0]), split)
            found.append(loss_of(params, frozen, batch, jax.random.key(int(picked[0])))[1])
        fetched = jax.device_get(found)
        names = fetched[0] if fetched else ()
        return {f"val_{name}": float(np.mean([m[name] for m in fetched])) for name in names}

    before = evaluate(params)
    params = train.fit(
        loss_fn, params, make_optimizer(section, num_steps), batch_at, frozen,
        mesh=mesh, num_steps=num_steps, ema_decay=training.ema_decay, seed=seed,
        directory=directory, log_every=training.log_every, save_every=training.save_every,
        evaluate=evaluate, eval_every=max(num_steps // max(training.num_evals, 1), 1),
    )  # fmt: skip
    return params, {"before": before, "after": evaluate(params)}
