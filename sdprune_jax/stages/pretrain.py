"""Stage `pretrain`: a model of Stable Diffusion 2's architecture, from nothing but captions.

As the original was trained: a CLIP first, then an autoencoder, then the UNet on the frozen text
tower and the autoencoder's latents.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import transformers
from jax.sharding import Mesh

from sdprune_jax import artefacts, config, sharding
from sdprune_jax.data import captions, emoji, pictures, tokenizer
from sdprune_jax.files import model_directory, tensors
from sdprune_jax.files.weights import save_params
from sdprune_jax.models import clip
from sdprune_jax.pretrain import autoencoder, contrastive, denoiser, soup
from sdprune_jax.stages import cost_card
from sdprune_jax.training import loop, settings_file


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Trains what `run.pretrain` asks for, or resumes it.

    Returns:
        The diffusers directory `workdir/model`, with the whole CLIP in `workdir/model/clip`.

    Raises:
        ValueError: if the run was begun with other settings.
    """
    section, work = run.pretrain, pathlib.Path(run.workdir) / "pretrain"
    assert section is not None
    output = artefacts.output_of("pretrain", run.workdir)
    made_from: dict[str, Any] = {"section": dataclasses.asdict(section), "seed": run.seed}
    made_from["pictures"] = pictures.checksums_of("embedded", "")
    if artefacts.is_complete(output, made_from):
        return output.directory
    settings = {"seed": run.seed} | dataclasses.asdict(section)
    begun = settings_file.keep(work, settings, run.force)
    data = {split: emoji.load(split) for split in emoji.SPLITS}
    if section.num_images:
        data = {
            split: emoji.Pairs(*(x[: section.num_images] for x in pairs))
            for split, pairs in data.items()
        }
    words = _tokenizer(section.clip, work / "tokenizer", begun)
    clip_config = contrastive.configure(section.clip, len(words))
    clip_params = contrastive.train_clip(
        section.clip, clip_config, words, data, run.seed, mesh, work / "clip"
    )
    clip_params = soup.averaged(
        section.clip, clip_config, clip_params, words, data, run.seed, mesh, work / "clip"
    )
    vae_config = autoencoder.configure(section.vae)
    vae_params = autoencoder.train_vae(section.vae, vae_config, data, run.seed, mesh, work / "vae")
    vae_config, vae_params, latents = autoencoder.encode(
        vae_config, vae_params, data, work / "cache"
    )
    text_config, text_params = contrastive.text_encoder(clip_config, clip_params)
    states = denoiser.encode_captions(
        text_config,
        text_params,
        words,
        data,
        section.unet.captions_per_image,
        run.seed,
        work / "cache",
    )
    unet_config = denoiser.configure(section.unet, vae_config, text_config)
    unet_params = denoiser.train_unet(
        section.unet,
        unet_config,
        vae_config.scaling_factor,
        latents,
        states,
        run.seed,
        mesh,
        work / "unet",
    )
    model = model_directory.ModelConfig(
        text_config, unet_config, vae_config, denoiser.SCHEDULE, work
    )
    params = {"text_encoder": text_params, "unet": unet_params, "vae": vae_params}
    with artefacts.writing(output, made_from) as partial:
        partial.record = {"parameters": {name: _size(tree) for name, tree in params.items()}}
        model_directory.write(model, params, partial.directory, dtype=np.float16)
        clip_directory = partial.directory / "clip"
        if jax.process_index() == 0:
            clip_directory.mkdir()
        sharding.wait_for_all("clip")
        save_params(clip_directory, clip_params, dtype=np.float16, name="model")
        if jax.process_index() == 0:
            tensors.write_json(clip_directory / "config.json", clip_config.to_json())
    return output.directory


def _size(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _tokenizer(
    section: config.PretrainCLIP, directory: pathlib.Path, begun: bool
) -> transformers.CLIPTokenizer:
    """Made anew until a training has read it: what it is made from may have changed."""
    if jax.process_index() == 0 and not (begun and (directory / "vocab.json").exists()):
        rng = np.random.default_rng(0)
        drawn = [pair for pair, split in emoji.split_of().items() if split == "train"]
        texts = [
            captions.augmented(rng, emoji.concepts()[concept], emoji.styles()[style].word)
            for concept, style in drawn
            for _ in range(3)
        ]
        tokenizer.train(texts, directory, section.vocab_size, section.max_length)
    sharding.wait_for_all(directory.name)
    return tokenizer.load(directory)


def check(run: config.Run, num_devices: int) -> None:
    """Checks nothing more than the config: the data is in the package."""


def plan(run: config.Run, planned: cost_card.Planned) -> str:
    """Returns the trainings; a state is parameters, their average, and two moments, in float32."""
    section, shapes, mesh = run.pretrain, planned.shapes, planned.mesh
    assert section is not None
    clip_config = contrastive.configure(section.clip, section.clip.vocab_size)
    shapes = shapes | {"clip": clip.clip_param_shapes(clip_config)}  # text encoder and more
    rows: list[cost_card.Row] = [("pretrain", "parameters", "steps", "batch", "state a device")]
    for name in ("clip", "vae", "unet"):
        training, tree = getattr(section, name).training, shapes[name]
        optimizer = loop.adamw(
            training.learning_rate,
            training.warmup_steps,
            training.num_steps,
            training.weight_decay,
            training.clip_norm,
        )
        state = jax.eval_shape(lambda params, o=optimizer: loop.init_state(params, o), tree)
        counts = (cost_card.num_parameters(tree), training.num_steps, training.batch_size)
        rows.append(
            (
                name,
                *(f"{n:,}" for n in counts),
                cost_card.in_bytes(cost_card.bytes_a_device(state, mesh)),
            )
        )
    return cost_card.aligned(rows)


def planned_model(run: config.Run) -> model_directory.ModelConfig:
    """Returns the configs of the model that will be made, its vocabulary at its largest."""
    section = run.pretrain
    assert section is not None
    from sdprune_jax.pretrain import (
        autoencoder,  # seconds: data libraries
        contrastive,
        denoiser,
    )

    clip_config = contrastive.configure(section.clip, section.clip.vocab_size)
    text_config, _ = contrastive.text_encoder(clip_config, {"text_model": {}})
    vae_config = autoencoder.configure(section.vae)
    unet_config = denoiser.configure(section.unet, vae_config, text_config)
    directory = pathlib.Path(run.workdir) / "model"
    return model_directory.ModelConfig(
        text_config, unet_config, vae_config, denoiser.SCHEDULE, directory
    )
