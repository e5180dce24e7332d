"""A set of experts on disk: stages `materialise` and `slice` write it, `finetune` reads it."""

import dataclasses
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Int32

from sdprune_jax import UserError, config, sharding, sites
from sdprune_jax.data import emoji, pictures
from sdprune_jax.files import convert, model_directory, tensors
from sdprune_jax.models import unet
from sdprune_jax.sites import macs

_RECORD = "experts.json"


@dataclasses.dataclass(frozen=True)
class Purpose:
    """What a set of experts is for.

    Attributes:
        data: pictures and prompts that the experts share.
        seed: of these prompts.
        variant: of the model's files; empty for none.
        mac_counter: one of `macs.COUNTERS`.
        latent_size: height and width that MACs are counted at.
        cache: directory within the run where latents and text states are kept.
    """

    data: config.RouterData
    seed: int
    variant: str
    mac_counter: str
    latent_size: tuple[int, int]
    cache: str


class Cut(NamedTuple):
    """An expert's UNet.

    Attributes:
        params: of `unet`.
        unet: its config.
        kept: units that are left, by site of the dense UNet.
        padded: parameters of the dense shape that compute the same; None if not wanted.
    """

    params: Any
    unet: unet.UNetConfig
    kept: dict[str, int]
    padded: Any = None


class Experts(NamedTuple):
    """What a training of experts has to know.

    Attributes:
        directories: of the experts, in their order.
        data: pictures and prompts that they share.
        seed: of these prompts.
        rows: by split, the expert of every prompt.
        cache: where latents and text states are kept.
        made_from: a fingerprint.
    """

    directories: list[pathlib.Path]
    data: config.RouterData
    seed: int
    rows: dict[str, Int32[np.ndarray, " rows"]]
    cache: pathlib.Path
    made_from: str


def is_written(work: pathlib.Path, made_from: str) -> bool:
    return is_complete(work / "experts", made_from, _RECORD)


def write(
    run: config.Run,
    model: model_directory.Model,
    dense: Any,
    cuts: Iterable[Cut],
    purpose: Purpose,
    rows: Mapping[str, Int32[np.ndarray, " _rows"]],
    save_dtype: str,
    record: Mapping[str, Any],
) -> pathlib.Path:
    """Writes `workdir/experts`, which appears when complete.

    It has diffusers directories `00`, `01`, …, each with its prompts in `prompts.json`, and
    `00_dense`, … of those that are padded; `experts_<split>.npy`, the expert of every prompt; and
    `experts.json`, with MACs, parameters and `purpose`.

    Args:
        run: whose experts they are.
        model: that they are cut from.
        dense: parameters of its UNet.
        cuts: one expert after another, so that no two need to be in memory.
        purpose: what they are for.
        rows: by split, the expert of every prompt.
        save_dtype: of the weights.
        record: more for `experts.json`, with at least `made_from`.
    """
    output = pathlib.Path(run.workdir) / "experts"
    size, tokens = purpose.latent_size, model.text_encoder.max_position_embeddings
    count = lambda unet_config: macs.by_site(unet_config, size, tokens, purpose.mac_counter).total
    whole, parameters = count(model.unet), _num_parameters(dense)
    texts = {
        split: pictures.prompts(
            purpose.data, pictures.load(purpose.data, split), split, purpose.seed
        ).texts
        for split in rows
    }
    every = (*sites.table(model.unet), *sites.operators(model.unet))
    units = {site.name: site.units for site in every}
    partial, found = fresh(output), []
    variant, dtype = purpose.variant or None, jnp.dtype(save_dtype)
    for index, cut in enumerate(cuts):
        name = f"{index:02d}"
        sliced = dataclasses.replace(model, unet=cut.unet)
        model_directory.save(
            sliced, {"unet": cut.params}, partial / name, dtype=dtype, variant=variant
        )
        if cut.padded is not None:
            model_directory.save(
                model, {"unet": cut.padded}, partial / f"{name}_dense", dtype=dtype, variant=variant
            )
        own = {
            split: [texts[split][row] for row in np.flatnonzero(of_prompt == index)]
            for split, of_prompt in rows.items()
        }
        if jax.process_index() == 0:
            tensors.write_json(partial / name / "prompts.json", own)
        cost = count(cut.unet)
        found.append(
            {
                "directory": name,
                "macs": cost,
                "share_of_macs": cost / whole,
                "parameters": _num_parameters(cut.params),
                "share_of_parameters": _num_parameters(cut.params) / parameters,
                "prompts": {split: len(prompts) for split, prompts in own.items()},
                "kept": cut.kept,
            }
        )
    save_arrays(partial, {f"experts_{split}": of_prompt for split, of_prompt in rows.items()})
    values = {
        **record,
        "model": run.model,
        **dataclasses.asdict(purpose),
        "text_tokens": tokens,
        "dense": {"macs": whole, "parameters": parameters, "units": units},
        "experts": found,
    }
    return finish(partial, output, _RECORD, values)


def read(work: pathlib.Path) -> Experts:
    """The experts of a run.

    Raises:
        ValueError: if it has none.
    """
    directory = work / "experts"
    if not (directory / _RECORD).is_file():
        raise UserError(
            f"{directory} has no experts: make them with --config.materialise=build, or one for"
            " all prompts with --config.slice=build"
        )
    values = tensors.read_json(directory / _RECORD)
    return Experts(
        [directory / row["directory"] for row in values["experts"]],
        config.RouterData(**values["data"]),
        values["seed"],
        {split: np.load(directory / f"experts_{split}.npy") for split in emoji.SPLITS},
        work / values["cache"],
        values["made_from"],
    )


def record(work: pathlib.Path, name: str = f"experts/{_RECORD}") -> dict[str, Any]:
    """What a stage has said of the experts of a run; empty if it has said nothing."""
    return tensors.read_json(work / name) if (work / name).is_file() else {}


def is_complete(output: pathlib.Path, made_from: str, name: str) -> bool:
    """Whether a stage has written `output`, with its record `name`, from the same inputs."""
    done = bool(sharding.of_first(lambda: tensors.is_record_of(output / name, made_from)))
    if done:
        logging.info("%s is complete: made from the same config and inputs", output)
    return done


def fresh(output: pathlib.Path) -> pathlib.Path:
    """An empty directory to write in, which takes the name of `output` when complete.

    Every process calls this and the functions that follow; the first one writes.
    """
    partial = output.with_name(f"{output.name}.tmp")
    if jax.process_index() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
    return partial


def save_arrays(directory: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    if jax.process_index() == 0:
        for name, array in arrays.items():
            np.save(directory / f"{name}.npy", array)


def finish(
    partial: pathlib.Path, output: pathlib.Path, name: str, values: dict[str, Any]
) -> pathlib.Path:
    if jax.process_index() == 0:
        tensors.write_json(partial / name, values)
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
    sharding.wait_for_all(output.name)
    return output


def _num_parameters(params: Any) -> int:
    return sum(x.size for x in convert.flatten(params).values())
