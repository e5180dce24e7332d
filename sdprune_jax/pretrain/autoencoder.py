"""The autoencoder of a pretrained model, and the latents of all images."""

import dataclasses
import pathlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdprune_jax import pipeline
from sdprune_jax.data import cache, emoji
from sdprune_jax.data.order import rows_of_batch
from sdprune_jax.metrics import paired
from sdprune_jax.models import vae
from sdprune_jax.models.initial import ends_a_block, init_params
from sdprune_jax.training import loop


def train_vae(
    training: loop.TrainingSettings,
    vae_config: vae.VAEConfig,
    data: Mapping[str, emoji.Pairs],
    kl_weight: float,
) -> loop.Params:
    """Trains by absolute and squared error and a small divergence from the unit normal.

    `kl_weight` is the weight of the mean divergence of a latent value.

    Source: Rombach et al., CVPR 2022, appendix G (https://arxiv.org/abs/2112.10752), without
        their perceptual and adversarial losses.
    """
    images = data["train"].images
    apply: Any = vae.VAE(vae_config).apply
    reconstruct = jax.jit(apply)

    def loss_fn(params, frozen, batch, key):
        del frozen
        x = pipeline.to_float(batch["images"])
        mean, log_variance = apply({"params": params}, x, method="encode")
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        error = apply({"params": params}, z, method="decode") - x
        kl = jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance) / 2
        absolute, squared = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
        loss = absolute + squared + kl_weight * kl
        return loss, {"loss": loss, "absolute": absolute, "squared": squared, "kl": kl}

    def batch_at(step):
        rows = rows_of_batch(len(images), training.batch_size, step, training.seed)
        return {"images": images[rows]}

    def evaluate(params):
        figures = {}
        for split in ("val", "test"):
            x = np.asarray(pipeline.to_float(data[split].images))
            decoded = [
                np.asarray(reconstruct({"params": params}, x[rows]))
                for rows in cache.in_batches(len(x), 32)
            ]
            psnr = paired.psnr(np.concatenate(decoded)[: len(x)], x)
            figures[f"{split}_psnr"] = float(psnr.mean())
        return figures

    params = init_params(vae.param_shapes(vae_config), training.seed, ends_a_block)
    return loop.fit(training, loss_fn, params, batch_at, {}, evaluate)


def encode(
    vae_config: vae.VAEConfig,
    params: loop.Params,
    data: Mapping[str, emoji.Pairs],
    cache_dir: pathlib.Path,
) -> tuple[vae.VAEConfig, loop.Params, dict[str, cache.Arrays]]:
    """Encodes the pictures of every split, once: `mean` and `log_variance` of their latents.

    Returns:
        Config and parameters of an autoencoder whose latents have mean 0 in every channel, by the
        biases at either end of them, and whose scaling factor is one over their deviation; and
        those latents, before scaling.
    """
    apply = jax.jit(partial(vae.VAE(vae_config).apply, method="encode"))

    def compute(images: np.ndarray) -> cache.Arrays:
        parts = [
            apply({"params": params}, pipeline.to_float(images[rows]))
            for rows in cache.in_batches(len(images), 64)
        ]
        mean, log_variance = (np.concatenate([np.asarray(p[i]) for p in parts]) for i in (0, 1))
        return {"mean": mean[: len(images)], "log_variance": log_variance[: len(images)]}

    latents = {}
    for split, pairs in data.items():
        key, todo = cache.fingerprint(params, pairs.images), partial(compute, pairs.images)
        latents[split] = cache.cached(cache_dir, f"latents-{split}", key, todo)

    mean = latents["train"]["mean"]
    shift = mean.mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    deviation = float(np.std(mean - shift, dtype=np.float64))
    params = jax.tree.map(np.asarray, params)
    quant, post = params["quant_conv"], params["post_quant_conv"]
    shifts = np.concatenate([shift, np.zeros_like(shift)])
    params |= {
        "quant_conv": quant | {"bias": quant["bias"] - shifts},
        "post_quant_conv": post | {"bias": post["bias"] + shift @ post["kernel"][0, 0]},
    }
    latents = {
        split: arrays | {"mean": arrays["mean"] - shift} for split, arrays in latents.items()
    }
    return dataclasses.replace(vae_config, scaling_factor=round(1 / deviation, 5)), params, latents
