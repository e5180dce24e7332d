"""How a smaller UNet learns from the dense one: loss and optimizer of fine-tuning."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sdprune_jax.files import model_directory
from sdprune_jax.models import noise_schedule, unet
from sdprune_jax.training import encoded, loop

SNR_WEIGHTS = ("published", "min_snr")


def make_loss(
    model: model_directory.ModelConfig,
    network: unet.UNet,
    weights: Mapping[str, float],
    *,
    caption_dropout: float,
    min_snr_gamma: float,
    snr_weight: str,
) -> loop.LossFn:
    """Makes the loss of an expert's parameters.

    Its frozen parameters are `teacher`, the dense UNet, and `null`, the text states of no text.
    Teacher and student see the same, and no text at times. Blocks that only one of them has are not
    compared.

    Args:
        model: configs of the model whose UNet teaches.
        network: the expert's UNet; the teacher computes in its dtype.
        weights: weights of the losses `denoising`, `output` and `block`.
        caption_dropout: share of the examples that see no text.
        min_snr_gamma: see `denoising`.
        snr_weight: see `denoising`.
    """
    common = common_blocks(network.config, model.unet)
    teach: Any = unet.UNet(model.unet, network.dtype).apply
    apply: Any = network.apply
    error = partial(
        denoising,
        prediction_type=model.schedule.prediction_type,
        gamma=min_snr_gamma,
        snr_weight=snr_weight,
    )

    def loss_fn(params, frozen, batch, key):
        keys = jax.random.split(key)
        noisy = encoded.draw_noisy(batch, keys[0], model.schedule, model.vae.scaling_factor)
        drop = jax.random.bernoulli(keys[1], caption_dropout, noisy.timestep.shape)
        text = jnp.where(drop[:, None, None], frozen["null"], batch["text"].astype(jnp.float32))
        inputs = (noisy.latents, noisy.timestep, text)
        teacher, teacher_blocks = teach({"params": frozen["teacher"]}, *inputs, return_blocks=True)
        student, blocks = apply({"params": params}, *inputs, return_blocks=True)
        parts = {
            "denoising": error(student, noisy.target, noisy.alpha_cumprod),
            "output": output_distillation(student, teacher),
            "block": block_distillation(
                [blocks[i] for i, _ in common], [teacher_blocks[j] for _, j in common]
            ),
        }
        loss = weighted_sum(parts, weights)
        return loss, parts | {"loss": loss}

    return loss_fn


def constant_adamw(
    learning_rate: float, warmup_steps: int, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """AdamW whose rate stays after a linear warm-up, as APTP's experts are fine-tuned."""
    ramp = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    rate_at = ramp if warmup_steps else optax.constant_schedule(learning_rate)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(rate_at, b1=0.9, b2=0.999, weight_decay=weight_decay),
    )


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
    gamma: float = 5.0,
    snr_weight: str = "published",
) -> Float[Array, ""]:
    """Squared error of a prediction, weighted by the signal-to-noise ratio of each example.

    Args:
        prediction: what the UNet predicts.
        target: from `noise_schedule.training_target`.
        alpha_cumprod: noise level of each example.
        prediction_type: "epsilon" or "v_prediction".
        gamma: the largest ratio that counts; 0 weighs all examples the same.
        snr_weight: rule for velocities. "published" is `min(snr + 1, gamma) / (snr + 1)`, which is
            1 for all but the least noise; "min_snr" is `min(snr, gamma) / (snr + 1)`, as derived.
    """
    assert snr_weight in SNR_WEIGHTS, snr_weight
    error = jnp.mean((prediction - target) ** 2, axis=(1, 2, 3))
    if not gamma:
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
    """Pairs the outputs of `return_blocks` that are of one block, as (student, teacher) indices.

    A student may lack the middle block and the teacher's innermost levels. The down block that has
    become its innermost is left out: it no longer resamples.
    """
    few, many = len(student.block_out_channels), len(teacher.block_out_channels)
    common = [(i, i) for i in range(few if few == many else few - 1)]
    middles = [int(config.mid_block_type is not None) for config in (student, teacher)]
    if all(middles) and few == many:
        common.append((few, many))
    first_up = (few + middles[0], many + middles[1] + many - few)
    return common + [(first_up[0] + i, first_up[1] + i) for i in range(few)]
