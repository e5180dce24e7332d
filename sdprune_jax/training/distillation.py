"""How a smaller UNet learns from the dense one: loss and optimizer of fine-tuning."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sdprune_jax import config
from sdprune_jax.files import model_directory
from sdprune_jax.models import noise_schedule, unet
from sdprune_jax.training import encoded, loop


def make_loss(
    section: config.Finetune,
    model: model_directory.ModelConfig,
    unet_config: unet.UNetConfig,
    dtype: Any = jnp.float32,
) -> loop.LossFn:
    """The loss of an expert's parameters; `frozen` has `teacher` and the states of no text, `null`.

    Teacher and student see the same, and no text at times. Blocks that only one of them has are
    not compared.
    """
    pairs = common_blocks(unet_config, model.unet)
    teach: Any = unet.UNet(model.unet, dtype).apply
    apply: Any = unet.UNet(unet_config, dtype, remat=section.remat).apply
    kind = model.schedule.prediction_type
    weights = {"denoising": section.denoising, "output": section.output, "block": section.block}

    def loss_fn(params, frozen, batch, key):
        keys = jax.random.split(key)
        noisy = encoded.noised(batch, keys[0], model.schedule, model.vae.scaling_factor)
        drop = jax.random.bernoulli(keys[1], section.caption_dropout, noisy.timestep.shape)
        text = jnp.where(drop[:, None, None], frozen["null"], batch["text"].astype(jnp.float32))
        inputs = (noisy.latents, noisy.timestep, text)
        teacher, teacher_blocks = teach({"params": frozen["teacher"]}, *inputs, return_blocks=True)
        student, blocks = apply({"params": params}, *inputs, return_blocks=True)
        parts = {
            "denoising": denoising(
                student, noisy.target, noisy.alpha_cumprod, kind, section.min_snr_gamma or None,
                section.snr_weight,
            ),
            "output": output_distillation(student, teacher),
            "block": block_distillation(
                [blocks[i] for i, _ in pairs], [teacher_blocks[j] for _, j in pairs]
            ),
        }  # fmt: skip
        loss = weighted_sum(parts, weights)
        return loss, parts | {"loss": loss}

    return loss_fn


def make_optimizer(section: config.Finetune) -> optax.GradientTransformation:
    """AdamW whose rate decays to zero or, as published, stays."""
    training = section.training
    if section.schedule == "cosine":
        return loop.adamw(
            training.learning_rate, training.warmup_steps, training.num_steps,
            training.weight_decay, training.clip_norm, training.cycles,
        )  # fmt: skip
    ramp = optax.linear_schedule(0.0, training.learning_rate, training.warmup_steps)
    rate_at = ramp if training.warmup_steps else optax.constant_schedule(training.learning_rate)
    return optax.chain(
        optax.clip_by_global_norm(training.clip_norm),
        optax.adamw(rate_at, b1=0.9, b2=0.999, weight_decay=training.weight_decay),
    )


SNR_WEIGHTS = ("published", "min_snr")


def weighted_sum(
    parts: Mapping[str, Float[Array, ""]], weights: Mapping[str, float]
) -> Float[Array, ""]:
    """Sums losses by the weights of their names; a loss without a weight is an error."""
    return sum((weights[name] * loss for name, loss in parts.items()), start=jnp.zeros(()))


def denoising(
    prediction: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    alpha_cumprod: Float[Array, " b"],
    prediction_type: str,
    gamma: float | None = 5.0,
    snr_weight: str = "published",
) -> Float[Array, ""]:
    """Squared error, weighed by the signal-to-noise ratio of each example.

    Args:
        prediction: of the UNet.
        target: of `diffusion.training_target`.
        alpha_cumprod: of each example.
        prediction_type: "epsilon" or "v_prediction".
        gamma: the largest ratio that counts; None weighs all examples the same.
        snr_weight: for velocities alone. "published" is `min(snr + 1, gamma) / (snr + 1)`, which is
            1 for all but the least noise; "min_snr" is `min(snr, gamma) / (snr + 1)`, as derived.
    """
    assert snr_weight in SNR_WEIGHTS, snr_weight
    error = jnp.mean((prediction - target) ** 2, axis=(1, 2, 3))
    if gamma is None:
        return error.mean()
    snr = alpha_cumprod / (1 - alpha_cumprod)
    if prediction_type == "v_prediction" and snr_weight == "published":
        snr, prediction_type = snr + 1, "epsilon"
    return jnp.mean(noise_schedule.min_snr_weight(snr, gamma, prediction_type) * error)


def output_distillation(
    student: Float[Array, "b h w c"], teacher: Float[Array, "b h w c"]
) -> Float[Array, ""]:
    """Squared error to the prediction of the ungated UNet."""
    return jnp.mean((student - jax.lax.stop_gradient(teacher)).astype(jnp.float32) ** 2)


def block_distillation(
    student: Sequence[Float[Array, "b ..."]], teacher: Sequence[Float[Array, "b ..."]]
) -> Float[Array, ""]:
    """Mean over the blocks (`return_blocks` of the UNet) of their squared errors."""
    errors = [output_distillation(s, t) for s, t in zip(student, teacher, strict=True)]
    return jnp.stack(errors).mean()


def common_blocks(student: unet.UNetConfig, teacher: unet.UNetConfig) -> list[tuple[int, int]]:
    """Which outputs of `return_blocks` are of the same block: (the student's, the teacher's) index.

    A student may lack the middle block and the teacher's innermost levels. The down block that has
    become its innermost is left out: it no longer resamples.
    """
    few, many = len(student.block_out_channels), len(teacher.block_out_channels)
    pairs = [(i, i) for i in range(few if few == many else few - 1)]
    middles = [int(config.mid_block_type is not None) for config in (student, teacher)]
    if all(middles) and few == many:
        pairs.append((few, many))
    first = (few + middles[0], many + middles[1] + many - few)
    return pairs + [(first[0] + i, first[1] + i) for i in range(few)]
