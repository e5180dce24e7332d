"""What stages look at before the first of them starts, and what they make of their sections."""

import dataclasses
from typing import Any

import optax

from sdprune_jax import UserError, config
from sdprune_jax.data import captions, pictures, tokenizer
from sdprune_jax.files import model_directory
from sdprune_jax.models import samplers
from sdprune_jax.training import loop


def open_model(run: config.Run) -> model_directory.ModelConfig:
    """Returns the configs of the model of a run."""
    return model_directory.open_model(model_directory.directory_of(run.model))


def check_model(run: config.Run, *, reads_texts: bool = True) -> model_directory.ModelConfig:
    """Checks the headers of the weights and, if texts are read, the tokenizer; no weight is read.

    Raises:
        UserError: naming every file and tensor that is missing or not what the config says.
    """
    model = open_model(run)
    problems = []
    for name in model_directory.COMPONENTS:
        try:
            model_directory.check_weights(model, name, run.variant or None)
        except UserError as error:
            problems.append(str(error))
    if reads_texts:
        try:
            tokenizer.load(model.directory / "tokenizer")
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return model


def check_calibration(
    section: config.Calibration, model: model_directory.ModelConfig, num_devices: int, key: str
) -> None:
    """Checks what a calibration reads and how its batches divide.

    Raises:
        UserError: naming the field that cannot be as it is.
    """
    captions.prompts(section.prompts, "train", section.num_prompts, 0)
    samplers.timetable(model.schedule, None, section.num_steps)
    batches = {
        "batch_size": section.batch_size,
        "gradients.batch_size": section.gradients.batch_size,
    }
    problems = [
        f"config.{key}.{name} is {size}, expected a multiple of the {num_devices} devices"
        for name, size in batches.items()
        if size % num_devices
    ]
    if problems:
        raise UserError("\n".join(problems))


def fields_of(kind: type, section: Any) -> dict[str, Any]:
    """Returns the fields of a section that a dataclass of the package has too."""
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: getattr(section, name) for name in names if hasattr(section, name)}


def picture_source(section: config.RouterData) -> pictures.PictureSource:
    """Returns the pictures and prompts that a section describes."""
    return pictures.PictureSource(**dataclasses.asdict(section))


def training_settings(
    section: config.Training | config.Router, **others: Any
) -> loop.TrainingSettings:
    """Returns the training that a section describes; `others` are the fields it does not have."""
    return loop.TrainingSettings(**fields_of(loop.TrainingSettings, section), **others)


def adamw(section: config.Training) -> optax.GradientTransformation:
    """Returns the optimizer that a section describes."""
    names = ("learning_rate", "warmup_steps", "num_steps", "weight_decay", "clip_norm", "cycles")
    return loop.adamw(**{name: getattr(section, name) for name in names})
