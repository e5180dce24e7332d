"""Gradients of the denoising loss by the UNet's parameters, summed over timesteps."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sdprune_jax import UserError, pipeline, sharding
from sdprune_jax.data import cache, emoji, pictures
from sdprune_jax.files import model_directory
from sdprune_jax.models import noise_schedule, unet
from sdprune_jax.scoring.settings import GradientSettings
from sdprune_jax.training import encoded


class Sums(NamedTuple):
    """What a first-order criterion reads.

    Attributes:
        grads: nested as the parameters; float32, on the host.
        losses: mean loss of the pictures at every timestep that counted, from the least noise on.
    """

    grads: Any
    losses: list[float]


def of_pictures(
    model: model_directory.ModelConfig,
    params: Any,
    mesh: Mesh,
    settings: GradientSettings,
    seed: int,
    variant: str | None = None,
) -> Sums:
    """The sums over some of the embedded training pictures, under their canonical captions.

    Raises:
        ValueError: as `sums`.
    """
    pairs = pictures.embedded("train")
    rows = np.random.default_rng(seed).permutation(len(pairs.images))[: settings.num_images]
    pairs = emoji.Pairs(*(x[rows] for x in pairs))
    texts = pictures.prompts(pairs, "train", seed, captions_per_image=1).texts
    examples = encoded.encode(encoded.Encoders(model, mesh, variant=variant), pairs, texts)
    latents = examples.mean[:, 0] * np.float32(model.vae.scaling_factor)
    return sums(model, params, mesh, latents, examples.states, settings, seed)


def sums(
    model: model_directory.ModelConfig,
    params: Any,
    mesh: Mesh,
    latents: Float[np.ndarray, "images h w c"],
    text: Float[np.ndarray, "images n d"],
    settings: GradientSettings,
    seed: int,
) -> Sums:
    """Sums, over timesteps, the gradient of the loss of the same pictures under the same noise.

    Args:
        model: architecture and schedule.
        params: float32 parameters of the UNet.
        mesh: batches are split over all of its axes.
        latents: clean latents, scaled as the UNet knows them.
        text: last hidden states of the prompt of each.
        settings: timesteps, and where they end.
        seed: draws the noise, which is a picture's own.

    Raises:
        ValueError: if a batch does not divide among the devices.

    Source: Diff-Pruning (https://arxiv.org/abs/2305.10924), algorithm 1: steps from the clean
        picture on, up to the first whose loss is below a share of the largest.
    """
    if settings.batch_size % mesh.size:
        raise UserError(
            f"gradients.batch_size is {settings.batch_size}, expected a multiple of the"
            f" {mesh.size} devices"
        )
    alphas = noise_schedule.alphas_cumprod(model.schedule).astype(np.float32)
    add = partial(_add, model.unet, model.schedule.prediction_type, mesh)
    shardings = sharding.fsdp_shardings(model_directory.param_shapes(model, "unet"), mesh)
    params = sharding.place(params, shardings)
    zeros, losses = jax.tree.map(jnp.zeros_like, params), []
    total = zeros
    for step in range(settings.num_timesteps):
        timestep = step * len(alphas) // settings.num_timesteps
        grads, loss = jax.tree.map(jnp.copy, zeros), 0.0
        for rows in cache.in_batches(len(latents), settings.batch_size):
            weight = np.zeros(len(rows), np.float32)  # a row that fills up the batch has none
            weight[: len(set(rows.tolist()))] = 1 / len(latents)
            noise = pipeline.image_noise(jax.random.key(seed), jnp.asarray(rows), latents.shape[1:])
            batch = (latents[rows], noise, text[rows].astype(np.float32), weight)
            batch = sharding.place(batch, sharding.batch_sharding(mesh))
            at = jnp.int32(timestep), jnp.float32(alphas[timestep])
            grads, part = add(params, grads, *batch, *at)
            loss += float(part)
        if loss < settings.loss_threshold * max(losses, default=0):
            logging.info("timesteps from %d on have too small a loss to count", timestep)
            break
        losses.append(loss)
        total = jax.tree.map(jnp.add, total, grads)
    return Sums(jax.tree.map(sharding.to_host, total), losses)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="grads")
def _add(
    config: unet.UNetConfig,
    prediction_type: str,
    mesh: Mesh,
    params: Any,
    grads: Any,
    x0: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    text: Float[Array, "b n d"],
    weight: Float[Array, " b"],
    timestep: Int[Array, ""],
    alpha: Float[Array, ""],
) -> tuple[Any, Float[Array, ""]]:
    """Adds the gradient of a weighted loss; also returns that loss."""
    alphas = jnp.broadcast_to(alpha, weight.shape)
    target = noise_schedule.training_target(x0, noise, alphas, prediction_type)
    noisy = noise_schedule.add_noise(x0, noise, alphas)
    timesteps = jnp.broadcast_to(timestep, weight.shape)

    def loss_of(params: Any) -> Float[Array, ""]:
        out: Any = unet.UNet(config).apply({"params": params}, noisy, timesteps, text)
        return jnp.sum(weight * jnp.mean((out - target) ** 2, axis=(1, 2, 3)))

    loss, new = jax.value_and_grad(loss_of)(params)
    grads = jax.tree.map(jnp.add, grads, new)
    places = sharding.fsdp_shardings(grads, mesh)
    return jax.lax.with_sharding_constraint(grads, places), loss
