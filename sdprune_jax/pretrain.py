"""Stage `pretrain`: a model of Stable Diffusion 2's architecture, from nothing but captions.

As the original was trained: a CLIP first, then an autoencoder, then the UNet on the frozen text
tower and the autoencoder's latents.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt8

from sdprune_jax import checkpoint, config, diffusion, metrics, train
from sdprune_jax.data import cache, captions, emoji, tokenizer
from sdprune_jax.models import clip, unet, vae

SCHEDULE = diffusion.Schedule(class_name="PNDMScheduler", prediction_type="v_prediction")
_IMAGE_SIZE = 64  # pixels
_DATA = pathlib.Path.home() / ".cache" / "sdprune_jax" / "tfds"


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Trains what `run.pretrain` asks for, or resumes it.

    Returns:
        The diffusers directory `workdir/model`, with the whole CLIP in `workdir/model/clip`.
    """
    section = run.pretrain
    assert section is not None
    work = pathlib.Path(run.workdir) / "pretrain"
    images = {split: emoji.load(split, _DATA) for split in emoji.SPLITS}
    if section.num_images:
        images = {
            split: emoji.Pairs(*(x[: section.num_images] for x in pairs))
            for split, pairs in images.items()
        }
    words = _tokenizer(section.clip, work / "tokenizer")
    clip_config = _clip_config(section.clip, words)
    clip_params = _train_clip(section.clip, clip_config, words, images, run.seed, mesh, work)
    vae_config = vae.VAEConfig(
        sample_size=_IMAGE_SIZE,
        block_out_channels=tuple(section.vae.widths),
        layers_per_block=section.vae.layers_per_block,
        norm_num_groups=section.vae.norm_num_groups,
        scaling_factor=1.0,
    )
    vae_params = _train_vae(section.vae, vae_config, images, run.seed, mesh, work)
    latents = {
        split: _latents(vae_config, vae_params, pairs.images, work, split)
        for split, pairs in images.items()
    }
    vae_config, vae_params, latents = _centre(vae_config, vae_params, latents)
    text_config, text_params = _text_encoder(clip_config, clip_params)
    unet_config = unet.UNetConfig(
        sample_size=_IMAGE_SIZE // vae_config.downscale,
        block_out_channels=tuple(section.unet.widths),
        attention_head_dim=tuple(section.unet.heads),
        cross_attention_dim=section.clip.width,
        norm_num_groups=section.unet.norm_num_groups,
    )
    states = functools.partial(_text_states, text_config, text_params, words, run.seed, work)
    unet_params = _train_unet(
        section.unet, unet_config, vae_config.scaling_factor, images, latents, states,
        run.seed, mesh, work,
    )  # fmt: skip
    model = checkpoint.Model(text_config, unet_config, vae_config, SCHEDULE, work)
    params = {"text_encoder": text_params, "unet": unet_params, "vae": vae_params}
    directory = pathlib.Path(run.workdir) / "model"
    checkpoint.save(model, params, directory, dtype=np.float16, overwrite=True)
    (directory / "clip").mkdir()
    checkpoint.save_params(directory / "clip", clip_params, dtype=np.float16, name="model")
    (directory / "clip" / "config.json").write_text(json.dumps(clip_config.to_json(), indent=2))
    return directory


def _tokenizer(section: config.PretrainCLIP, directory: pathlib.Path) -> tokenizer.Tokenizer:
    if not (directory / "vocab.json").exists():
        rng = np.random.default_rng(0)
        drawn = [(c, s) for (c, s), split in emoji.split_of().items() if split == "train"]
        texts = [
            captions.augmented(rng, emoji.concepts()[c], emoji.styles()[s].word)
            for c, s in drawn
            for _ in range(3)
        ]
        tokenizer.train(texts, directory, section.vocab_size, section.max_length)
    return tokenizer.load(directory)


def _clip_config(section: config.PretrainCLIP, words: tokenizer.Tokenizer) -> clip.CLIPConfig:
    shared = {
        "hidden_size": section.width,
        "intermediate_size": 4 * section.width,
        "num_attention_heads": section.heads,
        "hidden_act": "gelu",
        "projection_dim": section.width,
    }
    text = clip.TextConfig(
        **shared,
        vocab_size=words.vocab_size,
        num_hidden_layers=section.text_layers,
        max_position_embeddings=section.max_length,
        bos_token_id=words.start_id,
        eos_token_id=words.end_id,
        pad_token_id=words.pad_id,
    )
    vision = clip.VisionConfig(
        **shared,
        num_hidden_layers=section.vision_layers,
        image_size=_IMAGE_SIZE,
        patch_size=section.patch_size,
    )
    return clip.CLIPConfig(text, vision, section.width)


def _captions(
    words: tokenizer.Tokenizer, pairs: emoji.Pairs, rows: np.ndarray, length: int, seed: list[int]
) -> np.ndarray:
    """Token ids of newly drawn captions of some rows."""
    rng = np.random.default_rng(seed)
    concepts, styles = emoji.concepts(), emoji.styles()
    texts = [
        captions.augmented(rng, concepts[pairs.concept[row]], styles[pairs.style[row]].word)
        for row in rows
    ]
    return tokenizer.encode(words, texts, length)


def _train_clip(
    section: config.PretrainCLIP,
    clip_config: clip.CLIPConfig,
    words: tokenizer.Tokenizer,
    images: dict[str, emoji.Pairs],
    seed: int,
    mesh: Mesh,
    work: pathlib.Path,
) -> train.Params:
    model, pairs, val = clip.CLIP(clip_config), images["train"], images["val"]

    def loss_fn(params, frozen, batch, key):
        del frozen
        shown = _shifted(metrics.to_float(batch["images"]), key)
        texts, pictures, scale = model.apply({"params": params}, batch["ids"], shown)
        logits = jnp.minimum(scale, 100.0) * texts @ pictures.T
        both = jax.nn.log_softmax(logits, 0) + jax.nn.log_softmax(logits, 1)
        loss = -jnp.mean(jnp.diagonal(both)) / 2
        return loss, {"loss": loss, "scale": scale}

    def batch_at(step):
        rows = train.rows_of_batch(len(pairs.images), section.training.batch_size, step, seed)
        ids = _captions(words, pairs, rows, section.max_length, [seed, step])
        return {"images": pairs.images[rows], "ids": ids}

    def evaluate(params):
        scorer = metrics.Scorer(clip_config, params, words)
        pictures = np.asarray(metrics.to_float(val.images))
        found = scorer.recall(pictures, val.concept, val.style)
        return {f"val_{name}": float(hits.mean()) for name, hits in found.items()}

    params = train.init_params(clip.clip_param_shapes(clip_config), seed)
    params["logit_scale"] = np.float32(np.log(1 / 0.07))
    return _fit(
        section.training, loss_fn, params, batch_at, {}, evaluate, seed, mesh, work / "clip"
    )


def _train_vae(
    section: config.PretrainVAE,
    vae_config: vae.VAEConfig,
    images: dict[str, emoji.Pairs],
    seed: int,
    mesh: Mesh,
    work: pathlib.Path,
) -> train.Params:
    model, pictures = vae.VAE(vae_config), images["train"].images
    reconstruct = jax.jit(model.apply)

    def loss_fn(params, frozen, batch, key):
        del frozen
        x = metrics.to_float(batch["images"])
        mean, log_variance = model.apply({"params": params}, x, method="encode")
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        error = model.apply({"params": params}, z, method="decode") - x
        kl = jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance) / 2
        absolute, squared = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
        loss = absolute + squared + section.kl_weight * kl
        return loss, {"loss": loss, "absolute": absolute, "squared": squared, "kl": kl}

    def batch_at(step):
        rows = train.rows_of_batch(len(pictures), section.training.batch_size, step, seed)
        return {"images": pictures[rows]}

    def evaluate(params):
        figures = {}
        for split in ("val", "test"):
            x = np.asarray(metrics.to_float(images[split].images))
            got = [
                np.asarray(reconstruct({"params": params}, x[rows]))
                for rows in cache.in_batches(len(x), 32)
            ]
            figures[f"{split}_psnr"] = float(metrics.psnr(np.concatenate(got)[: len(x)], x).mean())
        return figures

    params = train.init_params(vae.param_shapes(vae_config), seed, _ends_a_block)
    return _fit(section.training, loss_fn, params, batch_at, {}, evaluate, seed, mesh, work / "vae")


def _train_unet(
    section: config.PretrainUNet,
    unet_config: unet.UNetConfig,
    scaling_factor: float,
    images: dict[str, emoji.Pairs],
    latents: dict[str, cache.Arrays],
    text_states: Any,
    seed: int,
    mesh: Mesh,
    work: pathlib.Path,
) -> train.Params:
    model, pairs = unet.UNet(unet_config), images["train"]
    alphas = diffusion.alphas_cumprod(SCHEDULE).astype(np.float32)
    variants = section.captions_per_image
    states = {
        "train": text_states("train", pairs, variants),
        "val": text_states("val", images["val"], 1),
    }
    frozen = {"null": jnp.asarray(states["train"]["null"], jnp.float32)}

    def loss_fn(params, frozen, batch, key):
        keys = jax.random.split(key, 4)
        mean = batch["mean"]
        spread = jnp.exp(batch["log_variance"] / 2) * jax.random.normal(keys[0], mean.shape)
        x0 = (mean + spread) * scaling_factor
        noise = jax.random.normal(keys[1], x0.shape)
        timestep = jax.random.randint(keys[2], x0.shape[:1], 0, len(alphas))
        drop = jax.random.bernoulli(keys[3], section.caption_dropout, x0.shape[:1])
        text = batch["text"].astype(jnp.float32)
        text = jnp.where(drop[:, None, None], frozen["null"], text)
        alpha = jnp.asarray(alphas)[timestep]
        noisy = diffusion.add_noise(x0, noise, alpha)
        target = diffusion.training_target(x0, noise, alpha, SCHEDULE.prediction_type)
        error = (model.apply({"params": params}, noisy, timestep, text) - target) ** 2
        weight = jnp.ones_like(alpha)
        if section.min_snr_gamma:
            snr = alpha / (1 - alpha)
            weight = diffusion.min_snr_weight(snr, section.min_snr_gamma, SCHEDULE.prediction_type)
        loss = jnp.mean(weight * error.mean(axis=(1, 2, 3)))
        return loss, {"loss": loss, "mse": error.mean()}

    def rows_at(split, rows, variant):
        here, text = latents[split], states[split]["states"]
        row = rows * (len(text) // len(here["mean"])) + variant
        return {
            "mean": here["mean"][rows],
            "log_variance": here["log_variance"][rows],
            "text": text[row],
        }

    def batch_at(step):
        rows = train.rows_of_batch(len(pairs.images), section.training.batch_size, step, seed)
        variant = np.random.default_rng([seed, step]).integers(variants, size=len(rows))
        return rows_at("train", rows, variant)

    loss_of = jax.jit(loss_fn)

    def evaluate(params):
        figures = {}
        for split in ("train", "val"):  # the same noise and timesteps every time
            count, size = len(images["val"].images), section.training.batch_size
            losses = [
                loss_of(params, frozen, rows_at(split, rows, 0), jax.random.key(int(rows[0])))[1]
                for rows in cache.in_batches(min(count, 8 * size), size)
            ]
            figures[f"{split}_mse"] = float(np.mean([m["mse"] for m in losses]))
        return figures

    params = train.init_params(unet.param_shapes(unet_config), seed, _ends_a_block)
    return _fit(
        section.training, loss_fn, params, batch_at, frozen, evaluate, seed, mesh, work / "unet"
    )


def _fit(
    section: config.Training,
    loss_fn: train.LossFn,
    params: train.Params,
    batch_at: Any,
    frozen: train.Params,
    evaluate: Any,
    seed: int,
    mesh: Mesh,
    directory: pathlib.Path,
) -> train.Params:
    optimizer = train.adamw(
        section.learning_rate,
        section.warmup_steps,
        section.num_steps,
        section.weight_decay,
        section.clip_norm,
    )
    return train.fit(
        loss_fn, params, optimizer, batch_at, frozen,
        mesh=mesh, num_steps=section.num_steps, ema_decay=section.ema_decay, seed=seed,
        directory=directory, log_every=section.log_every, save_every=section.save_every,
        evaluate=evaluate, eval_every=max(section.num_steps // 8, 1),
    )  # fmt: skip


def _ends_a_block(path: str) -> bool:
    """Whether a kernel writes into the residual stream last: it starts at 0, as in DDPM."""
    return path.endswith(("conv2.kernel", "proj_out.kernel"))


def _shifted(images: Float[Array, "b h w 3"], key: Key[Array, ""]) -> Float[Array, "b h w 3"]:
    """Images on white, each moved, resized and recoloured a little."""
    b, h, w, _ = images.shape
    keys = jax.random.split(key, 3)
    scale = jax.random.uniform(keys[0], (b, 2), minval=0.8, maxval=1.15)
    centre = jax.random.uniform(keys[1], (b, 2), minval=-5, maxval=5)  # pixels
    offset = (1 - scale) * jnp.array([h, w], jnp.float32)[None] / 2 + centre
    resample = lambda image, scale, offset: jax.image.scale_and_translate(
        image, image.shape, (0, 1), scale, offset, "linear"
    )
    moved = 1 - jax.vmap(resample)(1 - images, scale, offset)
    strength = jax.random.uniform(keys[2], (b, 1, 1, 3), minval=0.85, maxval=1.0)
    return 1 - (1 - moved) * strength


def _latents(
    vae_config: vae.VAEConfig,
    params: train.Params,
    images: UInt8[np.ndarray, "n h w 3"],
    work: pathlib.Path,
    split: str,
) -> cache.Arrays:
    encode = jax.jit(functools.partial(vae.VAE(vae_config).apply, method="encode"))

    def compute() -> cache.Arrays:
        parts = [
            encode({"params": params}, metrics.to_float(images[rows]))
            for rows in cache.in_batches(len(images), 64)
        ]
        mean, log_variance = (np.concatenate([np.asarray(p[i]) for p in parts]) for i in (0, 1))
        return {"mean": mean[: len(images)], "log_variance": log_variance[: len(images)]}

    key = cache.fingerprint(params, images)
    return cache.cached(work / "cache", f"latents-{split}", key, compute)


def _centre(
    vae_config: vae.VAEConfig, params: train.Params, latents: dict[str, cache.Arrays]
) -> tuple[vae.VAEConfig, train.Params, dict[str, cache.Arrays]]:
    """Gives latents mean 0, by the biases at either end of them, and notes their deviation."""
    mean = latents["train"]["mean"]
    shift = mean.mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    params = jax.tree.map(np.asarray, params)
    quant, post = dict(params["quant_conv"]), dict(params["post_quant_conv"])
    quant["bias"] = quant["bias"] - np.concatenate([shift, np.zeros_like(shift)])
    post["bias"] = post["bias"] + shift @ post["kernel"][0, 0]
    params = params | {"quant_conv": quant, "post_quant_conv": post}
    centred = {split: arrays | {"mean": arrays["mean"] - shift} for split, arrays in latents.items()}
    deviation = float(np.std(centred["train"]["mean"], dtype=np.float64))
    return dataclasses.replace(vae_config, scaling_factor=round(1 / deviation, 5)), params, centred


def _text_encoder(
    clip_config: clip.CLIPConfig, params: train.Params
) -> tuple[clip.TextConfig, train.Params]:
    """The text tower without its last layer, on which Stable Diffusion 2 conditions."""
    last = clip_config.text.num_hidden_layers - 1
    kept = {k: v for k, v in params["text_model"].items() if k != f"encoder.layers.{last}"}
    return dataclasses.replace(clip_config.text, num_hidden_layers=last), {"text_model": kept}


def _text_states(
    text_config: clip.TextConfig,
    params: train.Params,
    words: tokenizer.Tokenizer,
    seed: int,
    work: pathlib.Path,
    split: str,
    pairs: emoji.Pairs,
    variants: int,
) -> cache.Arrays:
    """Hidden states of each image's captions: row `image * variants + variant`, and of no text."""
    encode = jax.jit(clip.TextTower(text_config).apply)
    length = text_config.max_position_embeddings

    def compute() -> cache.Arrays:
        rows = np.repeat(np.arange(len(pairs.images)), variants)
        ids = _captions(words, pairs, rows, length, [seed])
        parts = [
            np.asarray(encode({"params": params}, ids[batch]), np.float16)
            for batch in cache.in_batches(len(ids), 512)
        ]
        null = tokenizer.encode(words, [""], length)
        null = np.asarray(encode({"params": params}, null), np.float32)
        return {"states": np.concatenate(parts)[: len(ids)], "null": null}

    key = cache.fingerprint(params, pairs.concept, pairs.style, variants, seed)
    return cache.cached(work / "cache", f"text-{split}", key, compute)
