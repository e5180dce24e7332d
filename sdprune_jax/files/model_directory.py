"""Whole diffusers directories of Stable Diffusion 2: opened without the weights, written whole.

Optimizer states are saved by `train`; parameters and configs of finished models only here.
"""

import contextlib
import dataclasses
import fcntl
import functools
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from sdprune_jax import UserError, sharding
from sdprune_jax.files import configs as config_files
from sdprune_jax.files import convert, json_files, tensors, weights
from sdprune_jax.files.weights import load_params as load_params
from sdprune_jax.files.weights import save_params as save_params
from sdprune_jax.models import clip, unet, vae
from sdprune_jax.models.noise_schedule import Schedule

COMPONENTS = ("text_encoder", "unet", "vae")
_STEMS = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
_FICLONE = 0x40049409  # Linux: makes one file share the blocks of another


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The configs of a diffusers directory.

    Attributes:
        directory: where weights are loaded from, and tokenizer and licence are copied from.
    """

    text_encoder: clip.TextConfig
    unet: unet.UNetConfig
    vae: vae.VAEConfig
    schedule: Schedule
    directory: pathlib.Path


def directory_of(name: str | os.PathLike[str]) -> pathlib.Path:
    """Returns where a model lies.

    Args:
        name: a path; `embedded` for the model in this package; or the id of a repository of the
            Hugging Face hub whose snapshot is in the local cache.

    Raises:
        UserError: if `name` looks like an id and is not in the cache, saying how to get it there.
    """
    if name == "embedded":
        return pathlib.Path(__file__).parents[1] / "embedded"
    path = pathlib.Path(name)
    if path.exists() or not re.fullmatch(r"[\w-]+[\w.-]*/[\w.-]+", str(name)):
        return path
    import huggingface_hub  # a second, for nobody who names a directory

    index = huggingface_hub.try_to_load_from_cache(str(name), "model_index.json")
    if not isinstance(index, str):
        raise UserError(
            f"there is no directory {name}, and no model of that id in the cache of the Hugging"
            f" Face hub; hf download {name} --include '*.json' '*.txt' '*.safetensors' gets it"
        )
    return pathlib.Path(index).parent


def open_model(directory: str | os.PathLike[str]) -> ModelConfig:
    """Reads and checks every config of a diffusers directory; weights are not touched.

    Class names of Flax and other names of the past are taken as what they were.

    Raises:
        ValueError: naming everything that is not Stable Diffusion 2.
    """
    directory = pathlib.Path(directory)
    problems = config_files.index_problems(json_files.read_json(directory / "model_index.json"))
    readers = {
        "text_encoder": clip.TextConfig.from_json,
        "unet": unet.UNetConfig.from_json,
        "vae": vae.VAEConfig.from_json,
        "scheduler": Schedule.from_json,
    }
    values, configs = {}, {}
    for name, from_json in readers.items():
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        try:
            values[name] = config_files.read_config(directory / name / file)
            configs[name] = from_json(values[name])
        except ValueError as error:
            problems.append(str(error))
        except (TypeError, ZeroDivisionError) as error:  # a list for a number, 0 groups
            problems.append(f"{name}/{file} has a value that cannot be: {error}")
    problems += config_files.other_models(values.get("unet", {}))
    if problems:
        raise UserError(f"{directory} cannot be used:\n  " + "\n  ".join(problems))
    config_files.warn_of_prediction_type(values["unet"], configs["scheduler"].prediction_type)
    return ModelConfig(schedule=configs.pop("scheduler"), directory=directory, **configs)


def files_of(directory: pathlib.Path, variant: str | None = None) -> list[pathlib.Path]:
    """Returns the files of a diffusers directory that are read: configs, weights, tokenizer.

    Raises:
        UserError: if the weights of a component are not there.
    """
    paths = [directory / "model_index.json"]
    for name in COMPONENTS:
        weight_file = tensors.find_weights(directory / name, variant)
        paths += [directory / name / "config.json", weight_file]
        if weight_file.suffix == ".json":
            shards = sorted(set(tensors.read_weight_map(weight_file).values()))
            paths += [weight_file.parent / shard for shard in shards]
    for name in ("scheduler", "tokenizer"):
        paths += [p for p in sorted((directory / name).glob("*")) if p.suffix in (".json", ".txt")]
    return paths


def param_shapes(model: ModelConfig, component: str) -> dict[str, Any]:
    """Nested `jax.ShapeDtypeStruct`s of a component: one of `COMPONENTS`."""
    return _traced_shapes(component, getattr(model, component))


@functools.cache  # tracing a UNet takes seconds
def _traced_shapes(component: str, config: Any) -> dict[str, Any]:
    shapes = {
        "text_encoder": clip.text_param_shapes,
        "unet": unet.param_shapes,
        "vae": vae.param_shapes,
    }
    return shapes[component](config)


def check_weights(model: ModelConfig, component: str, variant: str | None = None) -> None:
    """Checks that the weights of a component are there and fit its config; none is read."""
    weights.check_params(model.directory / component, param_shapes(model, component), variant)


def load(
    model: ModelConfig,
    component: str,
    *,
    dtype: Any = None,
    variant: str | None = None,
    sharding: Any = None,
    allow_nonfinite: bool = False,
) -> dict[str, Any]:
    """Reads the parameters of a component; see `load_params`."""
    return load_params(
        model.directory / component,
        param_shapes(model, component),
        dtype=dtype,
        variant=variant,
        sharding=sharding,
        allow_nonfinite=allow_nonfinite,
    )


def save(
    model: ModelConfig,
    params: Mapping[str, Any],
    directory: str | os.PathLike[str],
    *,
    dtype: Any,
    variant: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = weights.MAX_SHARD_BYTES,
) -> None:
    """Writes a complete diffusers directory, which appears under its name only when complete.

    Every process calls it; the first one writes.

    Args:
        model: its configs are written, over the keys of those in `model.directory`.
        params: parameters by component. Components left out are copied from `model.directory`
            byte for byte.
        directory: must not exist, unless `overwrite`.
        dtype: dtype of the weights in `params`; None keeps that of each leaf.
        variant: variant of the weights that are copied.
        overwrite: replace a model that is there.
        max_shard_bytes: see `save_params`.

    Raises:
        UserError: if `directory` is taken, or `save_params` or `find_weights` raises.
    """
    directory = pathlib.Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        if not overwrite:
            raise UserError(f"{directory} exists: choose another name, or overwrite it")
        if not (directory / "model_index.json").is_file():
            raise UserError(f"{directory} is not a model, so it is not overwritten")
    sharding.wait_for_all(f"{directory.name} checked")
    with replacing(directory) as new:
        write(model, params, new, dtype=dtype, variant=variant, max_shard_bytes=max_shard_bytes)
    sharding.wait_for_all(f"{directory.name} written")


@contextlib.contextmanager
def replacing(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a name for a new directory, which takes the place of `directory` when it is whole.

    If the block fails nothing of the new directory is left, and `directory` is as it was. Every
    process may enter the block; the first one removes and renames.
    """
    new, old = (directory.with_name(f"{directory.name}.{end}") for end in ("tmp", "old"))
    is_writer = jax.process_index() == 0
    remove = lambda path: shutil.rmtree(path, ignore_errors=True) if is_writer else None
    remove(new)  # left by a run that was killed
    try:
        yield new
    except BaseException:
        remove(new)
        raise
    if is_writer:
        for path in (new, *new.rglob("*")):  # a name must not survive a crash that its bytes do not
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if directory.exists() and any(directory.iterdir()):
            remove(old)  # left by a save that was killed at its end
            directory.rename(old)
            new.rename(directory)
            remove(old)
        else:
            new.rename(directory)


def write(
    model: ModelConfig,
    params: Mapping[str, Any],
    directory: pathlib.Path,
    *,
    dtype: Any,
    variant: str | None = None,
    max_shard_bytes: int = weights.MAX_SHARD_BYTES,
) -> None:
    """Writes the files of a diffusers directory; see `save`, which has the same arguments.

    Args:
        directory: holds no model yet.
    """
    is_writer = jax.process_index() == 0
    if is_writer:
        directory.mkdir(parents=True, exist_ok=True)
        config_files.write_small_files(model.directory, directory, model.schedule)
    for component in COMPONENTS:
        folder = directory / component
        if is_writer:
            folder.mkdir()
        if component in params:
            tree, stem = params[component], _STEMS[component]
            save_params(folder, tree, dtype=dtype, name=stem, max_shard_bytes=max_shard_bytes)
            if is_writer:
                _write_config(model, component, tree, dtype, directory)
        elif is_writer:
            _copy_component(model.directory / component, folder, variant)


def _write_config(
    model: ModelConfig, component: str, params: Mapping[str, Any], dtype: Any, new: pathlib.Path
) -> None:
    config = getattr(model, component)
    path = model.directory / component / "config.json"
    ours = {field.name for field in dataclasses.fields(config)} | {"dtype", "torch_dtype"}
    values = config_files.read_config(path) if path.is_file() else {}
    values = {key: value for key, value in values.items() if key not in ours} | config.to_json()
    if component == "text_encoder":  # transformers loads in the dtype that it reads here
        leaf = next(iter(convert.flatten(params).values()))
        values["torch_dtype"] = np.dtype(dtype or leaf.dtype).name
    json_files.write_json(new / component / "config.json", values)


def _copy_component(source: pathlib.Path, target: pathlib.Path, variant: str | None) -> None:
    """Copies config and weights; a variant is given the name that needs no variant."""
    mark = f".{variant}" if variant else ""
    path = tensors.find_weights(source, variant)
    names = {path.name: path.name.replace(mark, "")}
    if path.suffix == ".json":
        names |= {shard: shard for shard in tensors.read_weight_map(path).values()}
    for name, new_name in names.items():
        _copy_file(source / name, target / new_name)
    json_files.write_json(target / "config.json", config_files.read_config(source / "config.json"))


def _copy_file(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file; no byte moves where the file system shares blocks until one is written."""
    try:
        with source.open("rb") as old, target.open("wb") as new:
            fcntl.ioctl(new, _FICLONE, old.fileno())
    except OSError:  # another file system, or one that shares nothing
        shutil.copyfile(source, target)
