"""A tiny Stable Diffusion 2 in PyTorch: every kind of layer, random weights, no zero biases."""

import json
import pathlib

import pytest

from sdprune_jax.data import tokenizer

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CLASSES = {
    "text_encoder": transformers.CLIPTextModel,
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
}


def make(seed: int = 0) -> dict:
    """The three components, by name."""
    models = {
        "text_encoder": transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=600,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                hidden_act="gelu",
                bos_token_id=0,
                eos_token_id=2,
            )
        ),
        "unet": diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=(2, 4),
            cross_attention_dim=32,
            norm_num_groups=8,
            use_linear_projection=True,
        ),
        "vae": diffusers.AutoencoderKL(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=8,
        ),
    }
    generator = torch.Generator().manual_seed(seed)
    for model in models.values():
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return models


def save(directory: pathlib.Path, models: dict) -> pathlib.Path:
    """Writes the whole pipeline as diffusers and transformers do."""
    for name, model in models.items():
        model.save_pretrained(directory / name)
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    scheduler.save_pretrained(directory / "scheduler")
    tokenizer.train(["a red face", "a blue cat"], directory / "tokenizer", vocab_size=520)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.10.0.dev0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (directory / "model_index.json").write_text(json.dumps(index))
    (directory / "LICENSE").write_text("CreativeML Open RAIL++-M")
    return directory


def reload(directory: pathlib.Path, name: str, dtype=torch.float32) -> dict:
    """The state dict of a component, and a proof that PyTorch found exactly what it needs."""
    keyword = "dtype" if name == "text_encoder" else "torch_dtype"
    model, info = CLASSES[name].from_pretrained(
        directory / name, output_loading_info=True, **{keyword: dtype}
    )
    assert not any(info.values()), info
    return model.state_dict()
