"""Configs alone: which directories are taken for Stable Diffusion 2."""

import json
import pathlib

import pytest

from sdprune_jax.files import model_directory
from sdprune_jax.models import clip, noise_schedule, unet, vae


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    """The configs of Stable Diffusion 2.1-base."""
    values = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "scheduler/scheduler_config.json": noise_schedule.Schedule().to_json(),
        "text_encoder/config.json": clip.TextConfig().to_json(),
        "unet/config.json": unet.UNetConfig().to_json(),
        "vae/config.json": vae.VAEConfig().to_json(),
    }
    for name, contents in values.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(contents))
    return tmp_path


def _edit(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_no_weights_are_needed_to_open_a_model(directory):
    schedule = noise_schedule.Schedule.from_json(noise_schedule.Schedule().to_json())
    want = (clip.TextConfig(), unet.UNetConfig(), vae.VAEConfig(), schedule, directory)
    assert model_directory.open_model(directory) == model_directory.ModelConfig(*want)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "XLPipeline"),
        ("model_index.json", {"unet": ["my_module", "MyUNet"]}, r"unet is \['my_module'"),
        ("model_index.json", {"depth_estimator": ["transformers", "DPT"]}, "depth_estimator"),
        ("unet/config.json", {"auto_map": {"AutoModel": "x.py"}}, "never run"),
        ("unet/config.json", {"_class_name": "UNet3D"}, "UNet3D"),
        ("text_encoder/config.json", {"architectures": ["T5Encoder"]}, "T5Encoder"),
        ("unet/config.json", {"cross_attention_dim": 768}, "looks like Stable Diffusion 1"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "Stable Diffusion XL"),
        ("unet/config.json", {"in_channels": 9}, "inpainting"),
        ("unet/config.json", {"in_channels": 5}, "depth"),
        ("unet/config.json", {"in_channels": 7}, "the upscaler"),
        ("unet/config.json", {"class_embed_type": "projection"}, "unCLIP"),
        ("unet/config.json", {"block_out_channels": 32}, "unet/config.json has a value"),
        ("vae/config.json", {"norm_num_groups": 7}, "7 groups"),
        ("vae/config.json", {"norm_num_groups": 0}, "vae/config.json has a value"),
        ("scheduler/scheduler_config.json", {"prediction_type": "x0"}, "x0"),
    ],
)
def test_other_models_are_refused(directory, file, changes, message):
    _edit(directory / file, **changes)
    with pytest.raises(ValueError, match=message):
        model_directory.open_model(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[1]", "expected an object"),
        ("[" * 10**5, "not JSON"),
        (" " * 10**7 + "{}", "at most"),
    ],
)
def test_all_damaged_configs_are_named_at_once(directory, text, message):
    (directory / "unet/config.json").write_text(text)
    (directory / "vae/config.json").unlink()
    with pytest.raises(ValueError, match=message) as error:
        model_directory.open_model(directory)
    assert "vae/config.json is missing" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "prediction_type", "warns"),
    [
        ({"sample_size": 64}, "epsilon", False),
        ({"sample_size": 64}, "v_prediction", True),
        ({"sample_size": 96}, "epsilon", True),
        ({"sample_size": 96}, "v_prediction", False),
        ({"upcast_attention": True}, "epsilon", True),
        (
            {"block_out_channels": [64, 128, 128, 128], "attention_head_dim": 1},
            "v_prediction",
            False,
        ),
    ],
)
def test_mismatched_prediction_type_warns(directory, changes, prediction_type, warns):
    _edit(directory / "unet/config.json", **changes)
    _edit(directory / "scheduler/scheduler_config.json", prediction_type=prediction_type)
    if warns:
        with pytest.warns(UserWarning, match=f"says {prediction_type}"):
            model_directory.open_model(directory)
    else:
        model_directory.open_model(directory)


def test_safety_checker_is_said_to_be_left_out(directory):
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    _edit(directory / "model_index.json", safety_checker=checker)
    with pytest.warns(UserWarning, match="safety checker"):
        model_directory.open_model(directory)
