"""Stage `generate`: the same prompts and noise through every model of the run."""

import collections
import dataclasses
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from sdprune_jax import UserError, artefacts, config, pipeline
from sdprune_jax.aptp import expert_files, routed
from sdprune_jax.data import captions, emoji, tokenizer
from sdprune_jax.files import model_directory
from sdprune_jax.metrics import embedded, paired
from sdprune_jax.models import samplers
from sdprune_jax.stages import cost_card, inputs


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Writes `workdir/images/<model>/0000.png` … and `workdir/images/generate.json`.

    Models are `dense`, the run's own; `pruned`; and `routed`, the experts of the run, each for the
    prompts that are its own: what of these the run has made.

    Raises:
        ValueError: naming everything that cannot be generated as asked.
    """
    section, work = run.generate, pathlib.Path(run.workdir)
    assert section is not None
    directories = expert_files.models_of_run(run.model, work)
    dense = model_directory.open_model(directories["dense"][0])
    prompts, concept, style = _prompts(section, run.seed)
    height, width = _size(section, dense)

    output = artefacts.output_of("generate", work)
    states = routed.states(directories, work, run.variant)
    made_from = {
        "section": dataclasses.asdict(section),
        "seed": run.seed,
        "dtype": run.dtype,
        "variant": run.variant,
        "prompts": prompts,
        "model": states["dense"][0],
        "models": states,
    }
    if artefacts.is_complete(output, made_from):
        return output.directory
    models = routed.models(directories, work, dense, prompts, mesh)
    images, results = {}, {}
    for name, drawn in models.items():
        variant = run.variant if name == "dense" else ""
        images[name], seconds = _draw(run, drawn, prompts, (height, width), mesh, variant)
        files = [f"{name}/{i:04d}.png" for i in range(len(prompts))]
        results[name] = drawn.described() | {"files": files} | _timing(seconds)
        if len(drawn.directories) > 1:
            results[name]["expert"] = drawn.expert.tolist()
        results[name] |= _scores(directories["dense"][0], images[name], concept, style)
    for name in images.keys() - {"dense"}:
        pairs = (images[kind] / np.float32(127.5) - 1 for kind in (name, "dense"))
        results[name]["psnr_to_dense"] = paired.psnr(*pairs).tolist()
    chance = {f"clip_embedded_r_at_{k}": k / len(emoji.concepts()) for k in (1, 10)}
    with artefacts.writing(output, made_from) as partial:
        partial.record = {
            "protocol": _protocol(run, dense, concept is not None, height, width),
            "prompts": prompts,
            "models": results,
            "chance": chance if concept is not None else {},
        }
        if jax.process_index() == 0:
            _write(partial.directory, images, results)
    return output.directory


def _draw(
    run: config.Run,
    drawn: routed.Drawn,
    prompts: list[str],
    size: tuple[int, int],
    mesh: Mesh,
    variant: str,
) -> tuple[UInt8[np.ndarray, "n h w 3"], dict[str, float]]:
    """Returns the pictures of a model, or of its experts, and what they took in seconds."""
    section = run.generate
    assert section is not None
    pictures: dict[int, np.ndarray] = {}
    seconds: collections.Counter[str] = collections.Counter()
    for directory, index in drawn.parts():
        model = model_directory.open_model(directory)
        sample = pipeline.make_sample(
            model,
            mesh,
            sampler=section.sampler,
            num_steps=section.num_steps,
            guided=section.guidance_scale > 1,
            dtype=jnp.dtype(run.dtype),
        )
        images, times = _generate(
            model, sample, prompts, index, section, run.seed, size, mesh, variant
        )
        pictures |= zip(index, images, strict=True)
        seconds.update(times)
    return np.stack([pictures[i] for i in range(len(prompts))]), dict(seconds)


def _protocol(
    run: config.Run, dense: model_directory.ModelConfig, is_embedded: bool, height: int, width: int
) -> dict[str, Any]:
    """Returns how the pictures are made, for the record."""
    section = run.generate
    assert section is not None
    return {
        "prompts": section.prompts + (f":{section.split}" if is_embedded else ""),
        "sampler": section.sampler or dense.schedule.class_name,
        "num_steps": section.num_steps,
        "guidance_scale": section.guidance_scale,
        "negative_prompt": section.negative_prompt,
        "height": height,
        "width": width,
        "seed": run.seed,
        "dtype": run.dtype,
    }


def _write(
    directory: pathlib.Path,
    images: Mapping[str, UInt8[np.ndarray, "n h w 3"]],
    results: Mapping[str, Any],
) -> None:
    for name, pictures in images.items():
        (directory / name).mkdir(parents=True)
        for file, image in zip(results[name]["files"], pictures, strict=True):
            Image.fromarray(image).save(directory / file)


def _prompts(
    section: config.Generate, seed: int
) -> tuple[list[str], np.ndarray | None, np.ndarray | None]:
    """The prompts and, for embedded captions, the concept and style of each."""
    if section.prompts != "embedded":
        return captions.read(section.prompts, section.num_prompts), None, None
    return captions.drawn(section.split, section.num_prompts, seed)


def _size(section: config.Generate, model: model_directory.ModelConfig) -> tuple[int, int]:
    """Height and width in pixels."""
    downscale = model.vae.downscale
    own = model.unet.sample_size * downscale
    height, width = section.height or own, section.width or own
    problems = [
        f"config.generate.{name} is {value}, expected a multiple of {downscale}"
        for name, value in (("height", height), ("width", width))
        if value < downscale or value % downscale
    ]
    if problems:
        raise UserError("cannot generate:\n  " + "\n  ".join(problems))
    return height, width


def _generate(
    model: model_directory.ModelConfig,
    sample: pipeline.Sample,
    prompts: list[str],
    index: list[int],
    section: config.Generate,
    seed: int,
    size: tuple[int, int],
    mesh: Mesh,
    variant: str,
) -> tuple[np.ndarray, dict[str, float]]:
    """Images as bytes; how many came after the first batch, and the seconds of it and of all."""
    params = pipeline.load(model, mesh, variant or None)
    batches = pipeline.render(
        model,
        params,
        sample,
        prompts,
        index,
        size=size,
        seed=seed,
        guidance_scale=section.guidance_scale,
        negative_prompt=section.negative_prompt,
        batch_size=section.batch_size,
    )
    images, seconds, start = [], [], time.perf_counter()
    with tqdm(desc="images", total=len(index), disable=not sys.stderr.isatty()) as bar:
        for batch in batches:
            images.append(batch.images)
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            bar.update(len(batch.index))
    logging.info("%d images in %.1f s", len(index), sum(seconds))
    times = {"first": seconds[0], "all": sum(seconds), "rest": len(index) - len(images[0])}
    return np.concatenate(images), times


def _timing(times: Mapping[str, float]) -> dict[str, float]:
    """Seconds of first batches, compilation included, of all, and of an image of the others."""
    timing = {"first_batch_seconds": times["first"], "seconds": times["all"]}
    if times["rest"]:
        timing["seconds_per_image"] = (times["all"] - times["first"]) / times["rest"]
    return timing


def _scores(
    directory: pathlib.Path,
    images: np.ndarray,
    concept: np.ndarray | None,
    style: np.ndarray | None,
) -> dict[str, Any]:
    """Retrieval of each image's concept by the CLIP that comes with the embedded model."""
    if concept is None or style is None or not (directory / "clip").is_dir():
        return {"scores": {}, "found": []}
    scorer = embedded.load_scorer(directory / "clip", tokenizer.load(directory / "tokenizer"))
    if images.shape[1:3] != (scorer.model.config.vision.image_size,) * 2:
        return {"scores": {}, "found": []}
    found = scorer.recall(images / np.float32(127.5) - 1, concept, style)
    scores = {f"clip_embedded_{name}": float(hits.mean()) for name, hits in found.items()}
    return {"scores": scores | {"num": len(images)}, "found": found["r_at_10"].tolist()}


def check(run: config.Run, num_devices: int) -> None:  # noqa: ARG001
    """Checks the model, the prompts, the size of the pictures, and the sampler."""
    section = run.generate
    assert section is not None
    model = inputs.check_model(run)
    _prompts(section, run.seed)
    _size(section, model)
    samplers.timetable(model.schedule, section.sampler, section.num_steps)


def plan(run: config.Run, planned: cost_card.Planned) -> str:  # noqa: ARG001
    """Returns how many pictures are drawn."""
    assert run.generate is not None
    batch, count = run.generate.batch_size, run.generate.num_prompts
    return f"generate: {count:,} prompts, {batch} at once, {cost_card.models_of(run)}"
