"""The UNet of a pretrained model, on frozen text states and latents."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from sdprune_jax.data import cache, emoji
from sdprune_jax.data.order import rows_of_batch
from sdprune_jax.data.tokenizer import encode as tokenize
from sdprune_jax.models import clip, noise_schedule, unet
from sdprune_jax.models.initial import ends_a_block, init_params
from sdprune_jax.pretrain.contrastive import draw_captions
from sdprune_jax.training import loop

SCHEDULE = noise_schedule.Schedule(class_name="PNDMScheduler", prediction_type="v_prediction")


def train_unet(
    training: loop.TrainingSettings,
    unet_config: unet.UNetConfig,
    loss_fn: loop.LossFn,
    latents: Mapping[str, cache.Arrays],
    states: Mapping[str, cache.Arrays],
) -> loop.Params:
    """Trains a UNet on latents and text states.

    Args:
        training: how long, on what devices and where.
        unet_config: the architecture.
        loss_fn: from `make_loss`.
        latents: `mean` and `log_variance` of every image, by split.
        states: from `encode_captions`.
    """
    frozen = {"null": jnp.asarray(states["train"]["null"], jnp.float32)}
    num_images, batch_size = len(latents["train"]["mean"]), training.batch_size
    num_captions = len(states["train"]["states"]) // num_images

    def examples(split, rows, caption):
        here, text = latents[split], states[split]["states"]
        first = rows * (len(text) // len(here["mean"]))
        return {
            "mean": here["mean"][rows],
            "log_variance": here["log_variance"][rows],
            "text": text[first + caption],
        }

    def batch_at(step):
        rows = rows_of_batch(num_images, batch_size, step, training.seed)
        rng = np.random.default_rng([training.seed, step])
        return examples("train", rows, rng.integers(num_captions, size=len(rows)))

    loss_of = jax.jit(loss_fn)

    def evaluate(params):
        figures, count = {}, len(latents["val"]["mean"])
        for split in ("train", "val"):  # the same noise and timesteps every time
            metrics = [
                loss_of(params, frozen, examples(split, rows, 0), jax.random.key(int(rows[0])))[1]
                for rows in cache.in_whole_batches(count, batch_size, 8)
            ]
            figures[f"{split}_mse"] = float(np.mean([each["mse"] for each in metrics]))
        return figures

    params = init_params(unet.param_shapes(unet_config), training.seed, ends_a_block)
    return loop.fit(training, loss_fn, params, batch_at, frozen, evaluate)


def make_loss(
    network: unet.UNet,
    scaling_factor: float,
    *,
    caption_dropout: float,
    timestep_skew: float,
    min_snr_gamma: float,
) -> loop.LossFn:
    """Makes the loss of a UNet that predicts velocities at stratified timesteps.

    Its frozen parameter is `null`, the text states of no text.

    Args:
        network: the UNet.
        scaling_factor: factor of the latents.
        caption_dropout: share of the examples that see no text, for classifier-free guidance.
        timestep_skew: the density of timesteps t is t ** skew; 0 is uniform.
        min_snr_gamma: the largest signal-to-noise ratio that counts; 0 weighs all alike.
    """
    apply: Any = network.apply
    alphas = noise_schedule.alphas_cumprod(SCHEDULE).astype(np.float32)
    kind = SCHEDULE.prediction_type

    def loss_fn(params, frozen, batch, key):
        keys, mean = jax.random.split(key, 4), batch["mean"]
        spread = jnp.exp(batch["log_variance"] / 2) * jax.random.normal(keys[0], mean.shape)
        x0 = (mean + spread) * scaling_factor
        noise = jax.random.normal(keys[1], x0.shape)
        # One timestep in each of equally likely ranges, one an example: less variance than drawn.
        place = (jnp.arange(len(x0)) + jax.random.uniform(keys[2])) / len(x0)
        skewed = place ** (1 / (1 + timestep_skew))
        timestep = (skewed * len(alphas)).astype(jnp.int32)
        timestep = jnp.minimum(timestep, len(alphas) - 1)  # where the sum rounded up
        drop = jax.random.bernoulli(keys[3], caption_dropout, x0.shape[:1])
        text = batch["text"].astype(jnp.float32)
        text = jnp.where(drop[:, None, None], frozen["null"], text)
        alpha = jnp.asarray(alphas)[timestep]
        noisy = noise_schedule.add_noise(x0, noise, alpha)
        target = noise_schedule.training_target(x0, noise, alpha, kind)
        error = (apply({"params": params}, noisy, timestep, text) - target) ** 2
        weight = jnp.ones_like(alpha)
        if min_snr_gamma:
            snr = alpha / (1 - alpha)
            weight = noise_schedule.min_snr_weight(snr, min_snr_gamma, kind)
        loss = jnp.mean(weight * error.mean(axis=(1, 2, 3)))
        return loss, {"loss": loss, "mse": error.mean()}

    return loss_fn


def encode_captions(
    text_config: clip.TextConfig,
    params: loop.Params,
    tokenizer: transformers.CLIPTokenizer,
    data: Mapping[str, emoji.Pairs],
    captions_per_image: int,
    seed: int,
    cache_dir: pathlib.Path,
) -> dict[str, cache.Arrays]:
    """Computes text states of drawn captions and of no text, once, for `train` and `val`.

    Returns:
        By split: `states`, row `image * captions_per_image + i` (one an image for `val`), float16;
        and `null`, the states of the empty caption.
    """
    apply = jax.jit(clip.TextTower(text_config).apply)
    length = text_config.max_position_embeddings

    def compute(pairs: emoji.Pairs, count: int) -> cache.Arrays:
        rows = np.repeat(np.arange(len(pairs.images)), count)
        ids = draw_captions(tokenizer, pairs, rows, length, [seed])
        parts = [
            np.asarray(apply({"params": params}, ids[batch]), np.float16)
            for batch in cache.in_batches(len(ids), 512)
        ]
        null = np.asarray(apply({"params": params}, tokenize(tokenizer, [""], length)))
        return {"states": np.concatenate(parts)[: len(ids)], "null": null}

    states = {}
    for split, count in (("train", captions_per_image), ("val", 1)):
        pairs = data[split]
        key = cache.fingerprint(params, pairs.concept, pairs.style, count, seed)
        todo = lambda pairs=pairs, count=count: compute(pairs, count)
        states[split] = cache.cached(cache_dir, f"text-{split}", key, todo)
    return states
