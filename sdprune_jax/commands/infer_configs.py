"""Configs of a single-file Stable Diffusion 2, from the shapes of its tensors."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from sdprune_jax import UserError
from sdprune_jax.commands.single_file import TEXT, UNET, VAE
from sdprune_jax.files import json_files, tensors

_HEAD_SIZE = 64  # of every attention of Stable Diffusion 2
_GROUPS = 32  # of every group norm
_CLIP_LAYERS = 24  # of the CLIP of Stable Diffusion 2, which uses all but the last


def write_configs(
    stored: Mapping[str, tensors.StoredTensor], prediction_type: str, directory: pathlib.Path
) -> None:
    """Writes the JSON files of a diffusers directory; there is no tokenizer in a single file.

    Raises:
        ValueError: if the tensors are not those of Stable Diffusion 2.
    """
    if (
        UNET + "input_blocks.1.1.proj_in.weight" not in stored
        or TEXT + "ln_final.weight" not in stored
    ):
        raise UserError(
            "the file is no Stable Diffusion 2 checkpoint: it lacks "
            f"{UNET}input_blocks.1.1.proj_in.weight or {TEXT}ln_final.weight"
        )
    is_768 = prediction_type == "v_prediction"
    values = {
        "text_encoder/config.json": _text_config(stored),
        "unet/config.json": _unet_config(stored) | {"sample_size": 96 if is_768 else 64},
        "vae/config.json": _vae_config(stored),
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler" if is_768 else "PNDMScheduler",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "prediction_type": prediction_type,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "trained_betas": None,
        },
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
    }
    values["unet/config.json"]["upcast_attention"] = is_768  # without it float16 overflows there
    for name, contents in values.items():
        (directory / name).parent.mkdir(exist_ok=True)
        json_files.write_json(directory / name, contents)


def _unet_config(stored: Mapping[str, tensors.StoredTensor]) -> dict[str, Any]:
    shape = lambda name: stored[f"{UNET}{name}"].shape
    downsamplers = _numbers(stored, rf"{re.escape(UNET)}input_blocks\.(\d+)\.0\.op\.weight")
    num_each, num_levels = downsamplers[0], len(downsamplers) + 1
    channels = [
        shape(f"input_blocks.{1 + i * num_each}.0.in_layers.2.weight")[0] for i in range(num_levels)
    ]
    has_attention = lambda block: f"{UNET}{block}.1.proj_in.weight" in stored
    down = [has_attention(f"input_blocks.{1 + i * num_each}") for i in range(num_levels)]
    up = [has_attention(f"output_blocks.{i * num_each}") for i in range(num_levels)]
    text = shape("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")[1]
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": [max(1, width // _HEAD_SIZE) for width in channels],
        "block_out_channels": channels,
        "cross_attention_dim": text,
        "down_block_types": [f"{'CrossAttn' if yes else ''}DownBlock2D" for yes in down],
        "in_channels": shape("input_blocks.0.0.weight")[1],
        "layers_per_block": num_each - 1,
        "norm_num_groups": _GROUPS,
        "out_channels": shape("out.2.weight")[0],
        "up_block_types": [f"{'CrossAttn' if yes else ''}UpBlock2D" for yes in up],
        "use_linear_projection": len(shape("input_blocks.1.1.proj_in.weight")) == 2,
    }


def _vae_config(stored: Mapping[str, tensors.StoredTensor]) -> dict[str, Any]:
    shape = lambda name: stored[f"{VAE}{name}"].shape
    start = re.escape(VAE) + r"encoder\.down\."
    levels = _numbers(stored, start + r"(\d+)\.block\.0\.conv1\.weight")
    resnets = _numbers(stored, start + r"0\.block\.(\d+)\.conv1\.weight")
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in levels],
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "in_channels": shape("encoder.conv_in.weight")[1],
        "latent_channels": shape("post_quant_conv.weight")[0],
        "layers_per_block": len(resnets),
        "norm_num_groups": _GROUPS,
        "out_channels": shape("decoder.conv_out.weight")[0],
        "sample_size": 768,
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
    }


def _text_config(stored: Mapping[str, tensors.StoredTensor]) -> dict[str, Any]:
    shape = lambda name: stored[f"{TEXT}{name}"].shape
    layers = _numbers(stored, re.escape(TEXT) + r"transformer\.resblocks\.(\d+)\.ln_1\.weight")
    # A whole CLIP ends in a layer and a projection that are not used; an export has neither.
    is_whole = len(layers) == _CLIP_LAYERS or f"{TEXT}text_projection" in stored
    vocab_size, width = shape("token_embedding.weight")
    return {
        "architectures": ["CLIPTextModel"],
        "hidden_act": "gelu",
        "hidden_size": width,
        "intermediate_size": shape("transformer.resblocks.0.mlp.c_fc.weight")[0],
        "max_position_embeddings": shape("positional_embedding")[0],
        "model_type": "clip_text_model",
        "num_attention_heads": max(1, width // _HEAD_SIZE),
        "num_hidden_layers": len(layers) - is_whole,
        "vocab_size": vocab_size,
    }


def _numbers(stored: Mapping[str, tensors.StoredTensor], pattern: str) -> list[int]:
    """The numbers in the names that match `pattern`, in order."""
    return sorted(int(found[1]) for name in stored if (found := re.fullmatch(pattern, name)))
