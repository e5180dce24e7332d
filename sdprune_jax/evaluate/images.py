"""Generated images on disk, one file each, so that an interrupted evaluation goes on."""

import io
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float, UInt8
from PIL import Image
from tqdm import tqdm

from sdprune_jax import pipeline, sharding
from sdprune_jax.files.model_directory import ModelConfig


def complete(
    directory: pathlib.Path,
    model: ModelConfig,
    params: Any,
    sample: pipeline.Sample,
    prompts: Sequence[str],
    index: Sequence[int] | None = None,
    **settings: Any,
) -> None:
    """Renders every prompt, or every one of `index`, whose files are not in `directory` yet.

    `000000.png` is written after its latents, `000000.npy`, and each under another name first: a
    picture that is there is whole. Every process calls it; the first one writes.

    Args:
        directory: for these settings and this model alone, or the experts of one.
        model: as loaded into `params`.
        prompts: one an image.
        index: places of the prompts that this model draws; None draws all.
        **settings: size, seed and guidance, as `pipeline.render` takes them.

    Raises:
        FloatingPointError: if an image is not finite.
    """
    is_writer = jax.process_index() == 0
    if is_writer:
        directory.mkdir(parents=True, exist_ok=True)
    wanted = range(len(prompts)) if index is None else index
    there = sharding.of_first(
        lambda: [picture_path(directory, i).exists() for i in wanted], (len(wanted),)
    )
    missing = [i for i, is_there in zip(wanted, there, strict=True) if not is_there]
    num_there = len(wanted) - len(missing)
    if num_there:
        logging.info("%s has %d of these images already", directory, num_there)
    with tqdm(
        desc=directory.name,
        total=len(wanted),
        initial=num_there,
        disable=not (is_writer and sys.stderr.isatty()),
    ) as bar:
        for batch in pipeline.render(model, params, sample, prompts, missing, **settings):
            for i, latents, image in zip(*batch, strict=True):
                if is_writer:
                    path = picture_path(directory, i)
                    _write(path.with_suffix(".npy"), lambda file, x=latents: np.save(file, x))
                    _write(path, lambda file, x=image: Image.fromarray(x).save(file, "png"))
            bar.update(len(batch.index))
    sharding.wait_for_all(f"{directory.name} is complete")


def picture_path(directory: pathlib.Path, index: int) -> pathlib.Path:
    return directory / f"{index:06d}.png"


def picture(directory: pathlib.Path, index: int) -> UInt8[np.ndarray, "h w 3"]:
    return np.asarray(Image.open(picture_path(directory, index)).convert("RGB"))


def latents(directory: pathlib.Path, index: Sequence[int]) -> Float[np.ndarray, "n h w c"]:
    return np.stack([np.load(picture_path(directory, i).with_suffix(".npy")) for i in index])


def pictures(directory: pathlib.Path, index: Sequence[int]) -> UInt8[np.ndarray, "n h w 3"]:
    return np.stack([picture(directory, i) for i in index])


def through_jpeg(image: UInt8[np.ndarray, "h w 3"], quality: int) -> UInt8[np.ndarray, "h w 3"]:
    """What a JPEG file keeps of an image."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def _write(path: pathlib.Path, save: Any) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("wb") as file:
        save(file)
    os.replace(partial, path)
