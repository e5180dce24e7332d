"""The autoencoder of a pretrained model, and the latents of all images."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdprune_jax import config, pipeline
from sdprune_jax.data import cache, emoji
from sdprune_jax.metrics import paired
from sdprune_jax.models import vae
from sdprune_jax.training import loop


def configure(section: config.PretrainVAE) -> vae.VAEConfig:
    """The architecture; its scaling factor is known after the training."""
    return vae.VAEConfig(
        sample_size=emoji.SIZE,
        block_out_channels=tuple(section.widths),
        layers_per_block=section.layers_per_block,
        norm_num_groups=section.norm_num_groups,
        scaling_factor=1.0,
    )


def train_vae(
    section: config.PretrainVAE,
    vae_config: vae.VAEConfig,
    data: Mapping[str, emoji.Pairs],
    seed: int,
    mesh: Mesh,
    directory: pathlib.Path,
) -> loop.Params:
    """Trains by absolute and squared error and a small divergence from the unit normal.

    Source: Rombach et al., CVPR 2022, appendix G (https://arxiv.org/abs/2112.10752), without
        their perceptual and adversarial losses.
    """
    pictures = data["train"].images
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
        loss = absolute + squared + section.kl_weight * kl
        return loss, {"loss": loss, "absolute": absolute, "squared": squared, "kl": kl}

    def batch_at(step):
        rows = loop.rows_of_batch(len(pictures), section.training.batch_size, step, seed)
        return {"images": pictures[rows]}

    def evaluate(params):
        figures = {}
        for split in ("val", "test"):
            x = np.asarray(pipeline.to_float(data[split].images))
            got = [
                np.asarray(reconstruct({"params": params}, x[rows]))
                for rows in cache.in_batches(len(x), 32)
            ]
            figures[f"{split}_psnr"] = float(paired.psnr(np.concatenate(got)[: len(x)], x).mean())
        return figures

    params = loop.init_params(vae.param_shapes(vae_config), seed, loop.ends_a_block)
    return loop.fit_section(
        section.training, loss_fn, params, batch_at, {}, evaluate, seed, mesh, directory
    )


def encode(
    vae_config: vae.VAEConfig,
    params: loop.Params,
    data: Mapping[str, emoji.Pairs],
    cache_dir: pathlib.Path,
) -> tuple[vae.VAEConfig, loop.Params, dict[str, cache.Arrays]]:
    """Latents of every split, as `mean` and `log_variance`; computed once.

    Returns:
        Config and parameters of an autoencoder whose latents have mean 0 in every channel, by the
        biases at either end of them, and whose scaling factor is one over their deviation; and
        those latents, before scaling.
    """
    apply = jax.jit(functools.partial(vae.VAE(vae_config).apply, method="encode"))

    def compute(images: np.ndarray) -> cache.Arrays:
        parts = [
            apply({"params": params}, pipeline.to_float(images[rows]))
            for rows in cache.in_batches(len(images), 64)
        ]
        mean, log_variance = (np.concatenate([np.asarray(p[i]) for p in parts]) for i in (0, 1))
        return {"mean": mean[: len(images)], "log_variance": log_variance[: len(images)]}

    latents = {}
    for split, pairs in data.items():
        key = cache.fingerprint(params, pairs.images)
        name, todo = f"latents-{split}", functools.partial(compute, pairs.images)
        latents[split] = cache.cached(cache_dir, name, key, todo)

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
