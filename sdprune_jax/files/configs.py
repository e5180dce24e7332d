"""The small files of a diffusers directory: checked when read, brought up to date when written."""

import pathlib
import shutil
import warnings
from collections.abc import Mapping
from typing import Any

from sdprune_jax import UserError
from sdprune_jax.files import json_files
from sdprune_jax.models.noise_schedule import Schedule

_FULL_CHANNELS = [320, 640, 1280, 1280]  # of the released UNets, 865,910,724 parameters

# Library and classes of every entry of model_index.json; the first class is the one we write.
CLASSES = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "tokenizer": ("transformers", "CLIPTokenizer", "CLIPTokenizerFast"),
    "feature_extractor": ("transformers", "CLIPImageProcessor", "CLIPFeatureExtractor"),
    "safety_checker": ("stable_diffusion", "StableDiffusionSafetyChecker"),
}


def index_problems(index: Mapping[str, Any]) -> list[str]:
    """What in model_index.json is not a Stable Diffusion 2 pipeline."""
    problems = []
    if _without_flax(index.get("_class_name")) != "StableDiffusionPipeline":
        problems.append(
            f"model_index.json: _class_name is {index.get('_class_name')!r}, "
            "expected 'StableDiffusionPipeline'"
        )
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        library, *classes = CLASSES.get(name, ("diffusers",))
        found = [_without_flax(part) for part in entry]
        is_known = len(found) == 2 and found[0] == library
        if name != "scheduler":  # its class is checked with its config
            is_known = is_known and found[1] in classes
        if not is_known:
            problems.append(f"model_index.json: {name} is {entry}, expected {[library, *classes]}")
    if index.get("safety_checker", [None, None]) != [None, None]:
        warnings.warn("the safety checker is not used, nor written with the model", stacklevel=3)
    return problems


def other_models(values: Mapping[str, Any]) -> list[str]:
    """Names the relative of Stable Diffusion 2 that a unet/config.json belongs to."""
    hint = None
    if values.get("addition_embed_type") or values.get("cross_attention_dim") in (1280, 2048):
        hint = "Stable Diffusion XL"
    elif values.get("cross_attention_dim") == 768:
        hint = "Stable Diffusion 1"
    elif values.get("in_channels") == 7:
        hint = "the upscaler"
    elif values.get("class_embed_type"):
        hint = "unCLIP"
    return [f"this looks like {hint}, not Stable Diffusion 2 text-to-image"] if hint else []


def warn_of_prediction_type(values: Mapping[str, Any], prediction_type: str) -> None:
    """Warns if the UNet seems to predict another target than the scheduler takes it for."""
    size, is_full = values.get("sample_size"), values.get("block_out_channels") == _FULL_CHANNELS
    looks_like = "v_prediction" if values.get("upcast_attention") or size == 96 else "epsilon"
    if looks_like != prediction_type and (looks_like == "v_prediction" or (is_full and size == 64)):
        warnings.warn(
            f"the UNet looks trained for {looks_like} (sample_size {size}), but the scheduler "
            f"says {prediction_type}: if images are noise, correct prediction_type",
            stacklevel=3,
        )


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """Reads the config of a component, named by its folder; class names of Flax become PyTorch's.

    Raises:
        ValueError: if the file cannot be read, or is that of another class or of custom code.
    """
    values = json_files.read_json(path)
    if "auto_map" in values:
        raise UserError(f"{path} names code of its own (auto_map), which is never run")
    for key in ("_class_name", "architectures"):  # of diffusers, of transformers
        if not values.get(key):
            continue
        named = [values[key]] if key == "_class_name" else values[key]
        named = [_without_flax(name) for name in named]
        expected = CLASSES.get(path.parent.name)
        if expected and named != [expected[1]]:
            raise UserError(f"{path}: {key} is {values[key]!r}, expected {expected[1]!r}")
        values[key] = named[0] if key == "_class_name" else named
    return values


def write_small_files(source: pathlib.Path, new: pathlib.Path, schedule: Schedule) -> None:
    """Writes all files of a model but those of its components.

    Args:
        source: a model, or a directory that holds at least `tokenizer/`.
        new: the directory that is written.
        schedule: becomes `scheduler/scheduler_config.json`.
    """
    json_files.write_json(_made(new / "scheduler") / "scheduler_config.json", schedule.to_json())
    for folder in ("tokenizer", "feature_extractor"):
        for file in sorted((source / folder).glob("*")):
            if file.suffix in (".json", ".txt") and file.is_file():
                shutil.copyfile(file, _made(new / folder) / file.name)
    for file in sorted([*source.glob("*.md"), *source.glob("LICENSE*"), *source.glob("NOTICE*")]):
        if file.is_file():
            shutil.copyfile(file, new / file.name)

    processor = new / "feature_extractor" / "preprocessor_config.json"
    if processor.is_file():  # the class of the past is no longer found
        values = json_files.read_json(processor)
        values.pop("feature_extractor_type", None)
        json_files.write_json(processor, values | {"image_processor_type": "CLIPImageProcessor"})
    path = source / "model_index.json"
    index = json_files.read_json(path) if path.is_file() else {}
    index |= {
        name: list(CLASSES[name][:2]) for name in ("text_encoder", "unet", "vae", "tokenizer")
    }
    index |= {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": index.get("_diffusers_version", "0.10.0"),
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", schedule.class_name],
    }
    if processor.is_file():
        index["feature_extractor"] = list(CLASSES["feature_extractor"][:2])
    json_files.write_json(new / "model_index.json", dict(sorted(index.items())))


def _without_flax(name: Any) -> Any:
    return name.removeprefix("Flax") if isinstance(name, str) else name


def _made(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    return folder
