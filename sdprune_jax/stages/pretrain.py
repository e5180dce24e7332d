"""Stage `pretrain`: a model of Stable Diffusion 2's architecture, from nothing but captions.

As the original was trained: a CLIP first, then an autoencoder, then the UNet on the frozen text
tower and the autoencoder's latents.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import transformers
from jax.sharding import Mesh

from sdprune_jax import artefacts, config, sharding
from sdprune_jax.data import captions, emoji, pictures, tokenizer
from sdprune_jax.files import json_files, model_directory
from sdprune_jax.files.weights import save_params
from sdprune_jax.models import clip, unet, vae
from sdprune_jax.pretrain import autoencoder, contrastive, denoiser, soup
from sdprune_jax.stages import cost_card, inputs
from sdprune_jax.training import loop, settings_file


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Trains what `run.pretrain` asks for, or resumes it.

    Returns:
        The diffusers directory `workdir/model`, with the whole CLIP in `workdir/model/clip`.

    Raises:
        UserError: if the run was begun with other settings.
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
    data = {
        split: emoji.Pairs(*(x[: section.num_images or None] for x in emoji.load(split)))
        for split in emoji.SPLITS
    }

    def training_of(settings: config.Training, name: str) -> loop.TrainingSettings:
        place = {"seed": run.seed, "mesh": mesh, "directory": work / name}
        return inputs.training_settings(settings, optimizer=inputs.adamw(settings), **place)

    own_tokenizer = _tokenizer(section.clip, work / "tokenizer", begun)
    clip_config, clip_params = _train_clip(section.clip, own_tokenizer, data, training_of)
    vae_config = configure_vae(section.vae)
    training = training_of(section.vae.training, "vae")
    vae_params = autoencoder.train_vae(training, vae_config, data, section.vae.kl_weight)
    vae_config, vae_params, latents = autoencoder.encode(
        vae_config, vae_params, data, work / "cache"
    )
    text_config, text_params = contrastive.text_encoder(clip_config, clip_params)
    count = section.unet.captions_per_image
    states = denoiser.encode_captions(
        text_config, text_params, own_tokenizer, data, count, run.seed, work / "cache"
    )
    unet_config = configure_unet(section.unet, vae_config, text_config)
    loss_fn = make_unet_loss(section.unet, unet_config, vae_config.scaling_factor)
    training = training_of(section.unet.training, "unet")
    unet_params = denoiser.train_unet(training, unet_config, loss_fn, latents, states)
    model = model_directory.ModelConfig(
        text_config, unet_config, vae_config, denoiser.SCHEDULE, work
    )
    params = {"text_encoder": text_params, "unet": unet_params, "vae": vae_params}
    with artefacts.writing(output, made_from) as partial:
        partial.record = {"parameters": {name: _size(tree) for name, tree in params.items()}}
        model_directory.write(model, params, partial.directory, dtype=np.float16)
        _write_clip(partial.directory / "clip", clip_config, clip_params)
    return output.directory


def _size(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _train_clip(
    section: config.PretrainCLIP,
    own_tokenizer: transformers.CLIPTokenizer,
    data: Mapping[str, emoji.Pairs],
    training_of: Callable[[config.Training, str], loop.TrainingSettings],
) -> tuple[clip.CLIPConfig, loop.Params]:
    clip_config = configure_clip(section, len(own_tokenizer))
    training, starts = (
        training_of(section.training, "clip"),
        (section.hard_from, section.whole_from),
    )
    params = contrastive.train_clip(training, clip_config, own_tokenizer, data, *starts)
    if section.soup_strengths:
        tuning, strengths = training_of(section.tuning, "clip"), section.soup_strengths
        whole_from = section.tuning_whole_from
        params = soup.average(
            tuning, clip_config, params, own_tokenizer, data, strengths, whole_from
        )
    return clip_config, params


def _write_clip(directory: pathlib.Path, clip_config: clip.CLIPConfig, params: loop.Params) -> None:
    if jax.process_index() == 0:
        directory.mkdir()
    sharding.wait_for_all(directory.name)
    save_params(directory, params, dtype=np.float16, name="model")
    if jax.process_index() == 0:
        json_files.write_json(directory / "config.json", clip_config.to_json())


def _tokenizer(
    section: config.PretrainCLIP, directory: pathlib.Path, begun: bool
) -> transformers.CLIPTokenizer:
    """Trains a tokenizer anew, until a training has read it: its captions may have changed."""
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


def configure_clip(section: config.PretrainCLIP, vocab_size: int) -> clip.CLIPConfig:
    """Returns two towers of one width, with SD2's exact GELU, for ids of `tokenizer.train`."""
    shared = {
        "hidden_size": section.width,
        "intermediate_size": 4 * section.width,
        "num_attention_heads": section.heads,
        "hidden_act": "gelu",
        "projection_dim": section.width,
    }
    text = clip.TextConfig(
        **shared,
        vocab_size=vocab_size,
        num_hidden_layers=section.text_layers,
        max_position_embeddings=section.max_length,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=0,
    )
    vision = clip.VisionConfig(
        **shared,
        num_hidden_layers=section.vision_layers,
        image_size=emoji.SIZE,
        patch_size=section.patch_size,
    )
    return clip.CLIPConfig(text, vision, section.width)


def configure_vae(section: config.PretrainVAE) -> vae.VAEConfig:
    """Returns the autoencoder; its scaling factor is known after the training."""
    return vae.VAEConfig(
        sample_size=emoji.SIZE,
        block_out_channels=tuple(section.widths),
        layers_per_block=section.layers_per_block,
        norm_num_groups=section.norm_num_groups,
        scaling_factor=1.0,
    )


def configure_unet(
    section: config.PretrainUNet, vae_config: vae.VAEConfig, text_config: clip.TextConfig
) -> unet.UNetConfig:
    """Returns SD2's skeleton with other widths: attention on every level but the deepest."""
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


def make_unet_loss(
    section: config.PretrainUNet, unet_config: unet.UNetConfig, scaling_factor: float
) -> loop.LossFn:
    """Returns the loss that the section describes."""
    return denoiser.make_loss(
        unet.UNet(unet_config, remat=section.remat),
        scaling_factor,
        caption_dropout=section.caption_dropout,
        timestep_skew=section.timestep_skew,
        min_snr_gamma=section.min_snr_gamma,
    )


def check(run: config.Run, num_devices: int) -> None:
    """Checks nothing more than the config: the data is in the package."""


def plan(run: config.Run, planned: cost_card.Planned) -> str:
    """Returns the trainings; a state is parameters, their average, and two moments, in float32."""
    section, shapes, mesh = run.pretrain, planned.shapes, planned.mesh
    assert section is not None
    clip_config = configure_clip(section.clip, section.clip.vocab_size)
    shapes = shapes | {"clip": clip.clip_param_shapes(clip_config)}  # text encoder and more
    rows: list[cost_card.Row] = [("pretrain", "parameters", "steps", "batch", "state a device")]
    for name in ("clip", "vae", "unet"):
        training, tree = getattr(section, name).training, shapes[name]
        optimizer = inputs.adamw(training)
        state = jax.eval_shape(lambda params, o=optimizer: loop.init_state(params, o), tree)
        counts = (cost_card.num_parameters(tree), training.num_steps, training.batch_size)
        held = cost_card.in_bytes(cost_card.bytes_a_device(state, mesh))
        rows.append((name, *(f"{n:,}" for n in counts), held))
    return cost_card.aligned(rows)


def planned_model(run: config.Run) -> model_directory.ModelConfig:
    """Returns the configs of the model that will be made, its vocabulary at its largest."""
    section = run.pretrain
    assert section is not None
    clip_config = configure_clip(section.clip, section.clip.vocab_size)
    text_config, _ = contrastive.text_encoder(clip_config, {"text_model": {}})
    vae_config = configure_vae(section.vae)
    unet_config = configure_unet(section.unet, vae_config, text_config)
    directory = pathlib.Path(run.workdir) / "model"
    return model_directory.ModelConfig(
        text_config, unet_config, vae_config, denoiser.SCHEDULE, directory
    )
