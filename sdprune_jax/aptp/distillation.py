"""How a smaller UNet learns from the dense one: loss and optimizer of fine-tuning."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sdprune_jax import checkpoint, config, train
from sdprune_jax.aptp import data, losses
from sdprune_jax.models import unet


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
