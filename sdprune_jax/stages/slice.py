"""Stage `slice`: one smaller UNet for all prompts, by one criterion, at one budget of MACs.

It is written as a set of one expert, so that stage `finetune` trains it as it trains APTP's, and
what is compared is the architecture alone.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from sdprune_jax import artefacts, config
from sdprune_jax.aptp import expert_files
from sdprune_jax.data import captions, emoji, pictures
from sdprune_jax.files import model_directory
from sdprune_jax.slicing import criteria
from sdprune_jax.stages import cost_card, inputs
from sdprune_jax.stages.prune import open_calibration


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Cuts the UNet of the run as `run.slice` asks.

    Returns:
        `workdir/experts`, of `expert_files.write`, with one expert.

    Raises:
        ValueError: if the budget cannot be kept, or the UNet not be cut so.
    """
    section, work = run.slice, pathlib.Path(run.workdir)
    assert section is not None
    model = model_directory.open_model(model_directory.directory_of(run.model))
    output = artefacts.output_of("slice", work)
    made_from = {
        "section": dataclasses.asdict(section),
        "seed": run.seed,
        "variant": run.variant,
        "model": artefacts.model_state(model.directory, run.variant),
        "prompts": captions.state(section.calibration.prompts),
        "pictures": pictures.checksums_of(section.data.dataset, section.data.directory),
    }
    if artefacts.is_complete(output, made_from):
        return output.directory

    source = inputs.picture_source(section.data)
    size = section.latent_size or source.side // model.vae.downscale
    dense = model_directory.load(model, "unet", dtype=np.float32, variant=run.variant or None)
    dense = jax.tree.map(np.asarray, dense)
    calibration = open_calibration(section.calibration, model, "unet", mesh, run.seed, run.variant)
    made = criteria.slice_unet(model, dense, _criterion(section, size), calibration, seed=run.seed)

    purpose = expert_files.Purpose(
        source, run.seed, run.variant, section.mac_counter, (size, size), "slice/cache"
    )
    rows = {}
    for split in emoji.SPLITS:
        images = pictures.load(source, split)
        texts = pictures.prompts(images, split, run.seed, source.captions_per_image).texts
        rows[split] = np.zeros(len(texts), np.int32)
    cut = expert_files.Cut(made.params, made.unet, made.kept)
    with artefacts.writing(output, made_from) as partial:
        record = expert_files.write(
            partial.directory, model, dense, [cut], purpose, rows, section.save_dtype
        )
        about = {"criterion": section.criterion, "macs_budget": section.macs_budget} | made.details
        partial.record = dataclasses.replace(record, model=run.model, slice=about)
    logging.info("%s: one UNet for all prompts, by %s", output.directory, section.criterion)
    return output.directory


def check(run: config.Run, num_devices: int) -> None:
    """Checks the model, the data, the calibration if it is read, and the budget."""
    section = run.slice
    assert section is not None
    model = inputs.check_model(run)
    source = inputs.picture_source(section.data)
    pictures.load(source, "train")
    size = section.latent_size or source.side // model.vae.downscale
    criteria.check(model, _criterion(section, size))
    if section.criterion in ("taylor", "diff-pruning", "obs", "operators"):
        inputs.check_calibration(section.calibration, model, num_devices, "slice.calibration")


def plan(run: config.Run, planned: cost_card.Planned) -> str:  # noqa: ARG001
    """Returns the criterion and what it shall leave."""
    assert run.slice is not None
    share = f"{run.slice.macs_budget:.1%} of the UNet's MACs"
    is_fixed = run.slice.criterion.startswith("bksdm-")
    return f"slice: {run.slice.criterion}, to {'a fixed list of blocks' if is_fixed else share}"


def _criterion(section: config.Slice, latent_size: int) -> criteria.Criterion:
    """The criterion that the config describes."""
    names = ("macs_budget", "mac_counter", "damping")
    values: dict[str, Any] = {name: getattr(section, name) for name in names}
    values |= {"name": section.criterion, "latent_size": (latent_size, latent_size)}
    return criteria.Criterion(**values)
