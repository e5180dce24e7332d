"""The UNet of a pretrained model, on frozen text states and latents."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax.sharding import Mesh

from sdprune_jax import config
from sdprune_jax.data import cache, emoji, tokenizer
from sdprune_jax.models import clip, noise_schedule, unet, vae
from sdprune_jax.pretrain.contrastive import draw_captions
from sdprune_jax.training import loop

SCHEDULE = noise_schedule.Schedule(class_name="PNDMScheduler", prediction_type="v_prediction")


def configure(
    section: config.PretrainUNet, vae_config: vae.VAEConfig, text_config: clip.TextConfig
) -> unet.UNetConfig:
    """SD2's skeleton with the section's widths: attention on every level but the deepest."""
    attending = len(section.widths) - 1
    return unet.UNetConfig(
        sample_size=vae_config.sample_size // vae_config.downscale,
        block_out_channels=tuple(section.widths),
        down_block_types=(*["CrossAttnDownBlock2D"] * attending, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * attending),
        attention_head_dim=tuple(section.heads),
        cross_attention_dim=text_config.hidden_size,
        norm_num_groups=section.norm_num_groups,
    )


def train_unet(
    section: config.PretrainUNet,
    unet_config: unet.UNetConfig,
    scaling_factor: float,
    latents: Mapping[str, cache.Arrays],
    states: Mapping[str, cache.Arrays],
    seed: int,
    mesh: Mesh,
    directory: pathlib.Path,
) -> loop.Params:
    """Trains the velocity at stratified timesteps, with some captions dropped for guidance.

    Args:
        section: sizes and rates.
        unet_config: the architecture.
        scaling_factor: of the latents.
        latents: `mean` and `log_variance` of every image, by split.
        states: of `encode_captions`.
        seed: of parameters, noise, and order.
        mesh: of `sharding.make_mesh`.
        directory: of this training alone.
    """
    num_images, batch_size = len(latents["train"]["mean"]), section.training.batch_size
    frozen = {"null": jnp.asarray(states["train"]["null"], jnp.float32)}
    loss_fn = make_loss(section, unet_config, scaling_factor)

    def rows_at(split, rows, variant):
        here, text = latents[split], states[split]["states"]
        row = rows * (len(text) // len(here["mean"])) + variant
        return {
            "mean": here["mean"][rows],
            "log_variance": here["log_variance"][rows],
            "text": text[row],
        }

    def batch_at(step):
        rows = loop.rows_of_batch(num_images, batch_size, step, seed)
        rng = np.random.default_rng([seed, step])
        return rows_at("train", rows, rng.integers(section.captions_per_image, size=len(rows)))

    loss_of = jax.jit(loss_fn)

    def evaluate(params):
        figures = {}
        for split in ("train", "val"):  # the same noise and timesteps every time
            count = len(latents["val"]["mean"])
            losses = [
                loss_of(params, frozen, rows_at(split, rows, 0), jax.random.key(int(rows[0])))[1]
                for rows in cache.in_whole_batches(count, batch_size, 8)
            ]
            figures[f"{split}_mse"] = float(np.mean([m["mse"] for m in losses]))
        return figures

    params = loop.init_params(unet.param_shapes(unet_config), seed, loop.ends_a_block)
    return loop.fit_section(
        section.training, loss_fn, params, batch_at, frozen, evaluate, seed, mesh, directory
    )


def make_loss(
    section: config.PretrainUNet, unet_config: unet.UNetConfig, scaling_factor: float
) -> loop.LossFn:
    """The loss of the UNet's parameters; `frozen` has the states of no text, `null`."""
    apply: Any = unet.UNet(unet_config, remat=section.remat).apply
    alphas = noise_schedule.alphas_cumprod(SCHEDULE).astype(np.float32)
    batch_size = section.training.batch_size

    def loss_fn(params, frozen, batch, key):
        keys = jax.random.split(key, 4)
        mean = batch["mean"]
        spread = jnp.exp(batch["log_variance"] / 2) * jax.random.normal(keys[0], mean.shape)
        x0 = (mean + spread) * scaling_factor
        noise = jax.random.normal(keys[1], x0.shape)
        # One timestep in each of `batch_size` equally likely ranges: less variance than of drawn.
        place = (jnp.arange(batch_size) + jax.random.uniform(keys[2])) / batch_size
        skewed = place ** (1 / (1 + section.timestep_skew))
        timestep = (skewed * len(alphas)).astype(jnp.int32)
        timestep = jnp.minimum(timestep, len(alphas) - 1)  # where the sum rounded up
        drop = jax.random.bernoulli(keys[3], section.caption_dropout, x0.shape[:1])
        text = batch["text"].astype(jnp.float32)
        text = jnp.where(drop[:, None, None], frozen["null"], text)
        alpha = jnp.asarray(alphas)[timestep]
        noisy = noise_schedule.add_noise(x0, noise, alpha)
        target = noise_schedule.training_target(x0, noise, alpha, SCHEDULE.prediction_type)
        error = (apply({"params": params}, noisy, timestep, text) - target) ** 2
        weight = jnp.ones_like(alpha)
        if section.min_snr_gamma:
            snr = alpha / (1 - alpha)
            weight = noise_schedule.min_snr_weight(
                snr, section.min_snr_gamma, SCHEDULE.prediction_type
            )
        loss = jnp.mean(weight * error.mean(axis=(1, 2, 3)))
        return loss, {"loss": loss, "mse": error.mean()}

    return loss_fn


def encode_captions(
    text_config: clip.TextConfig,
    params: loop.Params,
    words: transformers.CLIPTokenizer,
    data: Mapping[str, emoji.Pairs],
    captions_per_image: int,
    seed: int,
    cache_dir: pathlib.Path,
) -> dict[str, cache.Arrays]:
    """Hidden states of drawn captions and of no text, for `train` and `val`; computed once.

    Returns:
        By split: `states`, row `image * captions_per_image + i` (one an image for `val`), float16;
        and `null`, of the empty caption.
    """
    apply = jax.jit(clip.TextTower(text_config).apply)
    length = text_config.max_position_embeddings

    def compute(pairs: emoji.Pairs, count: int) -> cache.Arrays:
        rows = np.repeat(np.arange(len(pairs.images)), count)
        ids = draw_captions(words, pairs, rows, length, [seed])
        parts = [
            np.asarray(apply({"params": params}, ids[batch]), np.float16)
            for batch in cache.in_batches(len(ids), 512)
        ]
        null = np.asarray(apply({"params": params}, tokenizer.encode(words, [""], length)))
        return {"states": np.concatenate(parts)[: len(ids)], "null": null}

    states = {}
    for split, count in (("train", captions_per_image), ("val", 1)):
        pairs = data[split]
        key = cache.fingerprint(params, pairs.concept, pairs.style, count, seed)
        todo = lambda pairs=pairs, count=count: compute(pairs, count)
        states[split] = cache.cached(cache_dir, f"text-{split}", key, todo)
    return states
