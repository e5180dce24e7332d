"""Stage `generate`: the same prompts and noise through every model of the run."""

import dataclasses
import pathlib
import shutil
import sys
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from sdprune_jax import checkpoint, config, pipeline, tensors
from sdprune_jax.data import cache, captions, emoji, tokenizer
from sdprune_jax.metrics import embedded, paired


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Writes `workdir/images/<model>/0000.png` … and `workdir/images/generate.json`.

    Models are `dense`, the run's own, and `pruned`, if the run has made one.

    Raises:
        ValueError: naming everything that cannot be generated as asked.
    """
    section, work = run.generate, pathlib.Path(run.workdir)
    assert section is not None
    directories = checkpoint.models_of_run(run.model, work)
    models = {name: checkpoint.open_model(path) for name, path in directories.items()}
    prompts, concept, style = _prompts(section, run.seed)
    height, width = _size(section, models["dense"], mesh)

    output = work / "images"
    made_from = cache.fingerprint(
        dataclasses.asdict(section), run.seed, run.dtype, prompts,
        [cache.directory_state(path) for path in directories.values()],
    )  # fmt: skip
    record = output / "generate.json"
    if record.exists() and tensors.read_json(record)["made_from"] == made_from:
        logging.info("%s is complete: made from the same config and models", output)
        return output
    partial = work / "images.tmp"
    shutil.rmtree(partial, ignore_errors=True)

    samples: dict[Any, pipeline.Sample] = {}
    images, results = {}, {}
    for name, model in models.items():
        architecture = (model.text_encoder, model.unet, model.vae, model.schedule)
        if architecture not in samples:  # a masked model runs the same program
            samples[architecture] = pipeline.make_sample(
                model, mesh, sampler=section.sampler, num_steps=section.num_steps,
                guided=section.guidance_scale > 1, dtype=jnp.dtype(run.dtype),
            )  # fmt: skip
        variant = run.variant if name == "dense" else ""
        images[name], seconds = _generate(
            model, samples[architecture], prompts, section, run.seed, (height, width), mesh, variant
        )
        (partial / name).mkdir(parents=True)
        files = [f"{name}/{i:04d}.png" for i in range(len(prompts))]
        for file, image in zip(files, images[name], strict=True):
            Image.fromarray(image).save(partial / file)
        results[name] = {"directory": str(directories[name]), "files": files} | seconds
        results[name] |= _scores(directories["dense"], images[name], concept, style)
    for name in models:
        if name != "dense":
            pairs = (images[kind] / np.float32(127.5) - 1 for kind in (name, "dense"))
            results[name]["psnr_to_dense"] = paired.psnr(*pairs).tolist()

    chance = {f"clip_embedded_r_at_{k}": k / len(emoji.concepts()) for k in (1, 10)}
    protocol = {
        "prompts": section.prompts + (f":{section.split}" if concept is not None else ""),
        "sampler": section.sampler or models["dense"].schedule.class_name,
        "num_steps": section.num_steps,
        "guidance_scale": section.guidance_scale,
        "negative_prompt": section.negative_prompt,
        "height": height,
        "width": width,
        "seed": run.seed,
        "dtype": run.dtype,
    }
    values = {"made_from": made_from, "protocol": protocol, "prompts": prompts}
    values |= {"models": results, "chance": chance if concept is not None else {}}
    tensors.write_json(partial / "generate.json", values)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    return output


def _prompts(
    section: config.Generate, seed: int
) -> tuple[list[str], np.ndarray | None, np.ndarray | None]:
    """The prompts and, for embedded captions, the concept and style of each."""
    if section.prompts != "embedded":
        return captions.read(section.prompts, section.num_prompts), None, None
    return captions.drawn(section.split, section.num_prompts, seed)


def _size(section: config.Generate, model: checkpoint.Model, mesh: Mesh) -> tuple[int, int]:
    """Height and width in pixels."""
    downscale = model.vae.downscale
    own = model.unet.sample_size * downscale
    height, width = section.height or own, section.width or own
    problems = [
        f"config.generate.{name} is {value}, expected a multiple of {downscale}"
        for name, value in (("height", height), ("width", width))
        if value < downscale or value % downscale
    ]
    if section.batch_size % mesh.size:
        problems.append(
            f"config.generate.batch_size is {section.batch_size}, expected a multiple of"
            f" the {mesh.size} devices"
        )
    if problems:
        raise ValueError("cannot generate:\n  " + "\n  ".join(problems))
    return height, width


def _generate(
    model: checkpoint.Model,
    sample: pipeline.Sample,
    prompts: list[str],
    section: config.Generate,
    seed: int,
    size: tuple[int, int],
    mesh: Mesh,
    variant: str,
) -> tuple[np.ndarray, dict[str, float]]:
    """Images as bytes, and the seconds of the first batch (compilation included) and the rest."""
    params = pipeline.load(model, mesh, variant or None)
    batches = pipeline.render(
        model, params, sample, prompts, range(len(prompts)), size=size, seed=seed,
        guidance_scale=section.guidance_scale, negative_prompt=section.negative_prompt,
        batch_size=section.batch_size,
    )  # fmt: skip
    images, seconds, start = [], [], time.perf_counter()
    with tqdm(desc="images", total=len(prompts), disable=not sys.stderr.isatty()) as bar:
        for batch in batches:
            images.append(batch.images)
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            bar.update(len(batch.index))
    logging.info("%d images in %.1f s", len(prompts), sum(seconds))
    timing = {"first_batch_seconds": seconds[0], "seconds": sum(seconds)}
    if len(seconds) > 1:
        timing["seconds_per_image"] = sum(seconds[1:]) / (len(prompts) - len(images[0]))
    return np.concatenate(images), timing


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
