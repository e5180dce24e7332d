"""A set of experts on disk: stages `materialise` and `slice` write it, `finetune` reads it."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from sdprune_jax import UserError, artefacts, sites
from sdprune_jax.aptp.records import DenseRow, ExpertRow, ExpertsRecord
from sdprune_jax.data import emoji, pictures
from sdprune_jax.files import convert, json_files, model_directory
from sdprune_jax.models import unet
from sdprune_jax.sites import macs


@dataclasses.dataclass(frozen=True)
class Purpose:
    """What a set of experts is for."""

    data: pictures.PictureSource  # pictures and prompts that the experts share
    seed: int  # seed of the draw of these prompts
    variant: str  # variant of the model's files; empty for none
    mac_counter: str  # one of `macs.COUNTERS`
    latent_size: tuple[int, int]  # height and width that MACs are counted at
    cache: str  # directory within the run where latents and text states are kept


class Cut(NamedTuple):
    """The UNet of one expert."""

    params: Any  # its parameters
    unet: unet.UNetConfig  # its config
    kept: dict[str, int]  # units that are left, by site of the dense UNet
    padded: Any = None  # parameters of the dense shape that compute the same; None if not wanted


class Experts(NamedTuple):
    """What a training of experts has to know."""

    directories: list[pathlib.Path]  # one an expert, in their order
    data: pictures.PictureSource  # pictures and prompts that they share
    seed: int  # seed of the draw of these prompts
    rows: dict[str, Int32[np.ndarray, " rows"]]  # the expert of every prompt, by split
    cache: pathlib.Path  # where latents and text states are kept
    identity: str  # changes if the experts do


def write(
    directory: pathlib.Path,
    model: model_directory.ModelConfig,
    dense: Any,
    cuts: Iterable[Cut],
    purpose: Purpose,
    rows: Mapping[str, Int32[np.ndarray, " _rows"]],
    save_dtype: str,
) -> ExpertsRecord:
    """Writes a set of experts.

    It has diffusers directories `00`, `01`, …, each with its prompts in `prompts.json`, and
    `00_dense`, … for those that are padded; and `experts_<split>.npy`, the expert of every prompt.

    Args:
        directory: exists, and is empty.
        model: configs of the model that experts are cut from.
        dense: parameters of its UNet.
        cuts: one expert after another, so that no two need to be in memory.
        purpose: what they are for.
        rows: the expert of every prompt, by split.
        save_dtype: dtype of the weights in the files.
    """
    size, tokens = purpose.latent_size, model.text_encoder.max_position_embeddings
    count = lambda unet_config: macs.by_site(unet_config, size, tokens, purpose.mac_counter).total
    units = {s.name: s.units for s in (*sites.table(model.unet), *sites.operators(model.unet))}
    whole = DenseRow(count(model.unet), _num_parameters(dense), units)
    dtype, variant = jnp.dtype(save_dtype), purpose.variant or None
    texts, experts = {split: _texts(purpose, split) for split in rows}, []
    for index, cut in enumerate(cuts):
        name = f"{index:02d}"
        versions = {name: (dataclasses.replace(model, unet=cut.unet), cut.params)}
        if cut.padded is not None:
            versions[f"{name}_dense"] = (model, cut.padded)
        for folder, (configs, params) in versions.items():
            target, weights = directory / folder, {"unet": params}
            model_directory.write(configs, weights, target, dtype=dtype, variant=variant)
        prompts = {
            split: [texts[split][row] for row in np.flatnonzero(expert == index)]
            for split, expert in rows.items()
        }
        if jax.process_index() == 0:
            json_files.write_json(directory / name / "prompts.json", prompts)
        num_macs, parameters = count(cut.unet), _num_parameters(cut.params)
        row = ExpertRow(
            directory=name,
            macs=num_macs,
            share_of_macs=num_macs / whole.macs,
            parameters=parameters,
            share_of_parameters=parameters / whole.parameters,
            prompts={split: len(own) for split, own in prompts.items()},
            kept=cut.kept,
        )
        experts.append(row)
    save_arrays(directory, {f"experts_{split}": expert for split, expert in rows.items()})
    about: dict[str, Any] = dict(vars(purpose), text_tokens=tokens, dense=whole, experts=experts)
    return ExpertsRecord(model=str(model.directory), **about)


def read(work: pathlib.Path, model: Mapping[str, str] | None = None) -> Experts:
    """Returns the experts of a run.

    Args:
        work: directory of the run.
        model: state of the model of the run; None does not compare it.

    Raises:
        UserError: if there are none, they are damaged, or they are cut from another model.
    """
    output = artefacts.output_of("materialise", work)
    if not output.record.is_file():
        raise UserError(
            f"{output.directory} has no experts: make them with --config.materialise=build, or one"
            " for all prompts with --config.slice=build"
        )
    record = artefacts.require(output, ExpertsRecord, model)
    return Experts(
        [output.directory / row.directory for row in record.experts],
        record.data,
        record.seed,
        {split: np.load(output.directory / f"experts_{split}.npy") for split in emoji.SPLITS},
        work / record.cache,
        artefacts.identity(output),
    )


def models_of_run(
    model: str, workdir: str | os.PathLike[str]
) -> dict[str, tuple[pathlib.Path, ...]]:
    """Returns the directories of the models to compare: `dense`, and what the run has made.

    `pruned` has one too; `routed` has one an expert, in their order: as it was fine-tuned, or, if
    it had no prompts to learn from, as it was cut.
    """
    work = pathlib.Path(workdir)
    models: dict[str, tuple[pathlib.Path, ...]] = {"dense": (model_directory.directory_of(model),)}
    if (work / "pruned").is_dir():
        models["pruned"] = (work / "pruned",)
    paths = [*(work / "experts").glob("[0-9]*"), *(work / "finetuned").glob("[0-9]*")]
    experts = {int(path.name): path for path in paths if path.name.isdigit()}
    if experts:
        models["routed"] = tuple(experts[index] for index in sorted(experts))
    return models


def save_arrays(directory: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    if jax.process_index() == 0:
        for name, array in arrays.items():
            np.save(directory / f"{name}.npy", array)


def _texts(purpose: Purpose, split: str) -> list[str]:
    images, count = pictures.load(purpose.data, split), purpose.data.captions_per_image
    return pictures.prompts(images, split, purpose.seed, count).texts


def _num_parameters(params: Any) -> int:
    return sum(x.size for x in convert.flatten(params).values())
