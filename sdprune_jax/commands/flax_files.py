"""The msgpack form in which diffusers, until 0.39, and transformers, until 4, kept Flax models."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from flax import serialization

from sdprune_jax import UserError
from sdprune_jax.files import configs, convert, json_files, model_directory, tensors

FILES = {
    "text_encoder": "flax_model.msgpack",
    "unet": "diffusion_flax_model.msgpack",
    "vae": "diffusion_flax_model.msgpack",
}
_NDARRAY = 1  # code of an array in flax's msgpack
_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}


def keys(path: str, component: str) -> tuple[str, ...]:
    """The nested keys of the parameter at our dotted path."""
    if component == "text_encoder":
        return tuple(path.split("."))
    found = re.sub(r"\.(\d+)", r"_\1", path).split(".")
    if component == "vae":
        found = [_VAE_ATTENTION.get(word, word) for word in found]
    return tuple(found)


def read(path: pathlib.Path, shapes: Mapping[str, Any], component: str) -> dict[str, Any]:
    """Reads the parameters of one component.

    Raises:
        ValueError: if the file is not such a file, naming all that is missing, unexpected or of
            another shape or dtype.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    data = path.read_bytes()
    try:
        msgpack.unpackb(data, ext_hook=_check_array, strict_map_key=False)
        stored = serialization.msgpack_restore(data)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise UserError(f"{path} is damaged or no Flax checkpoint: {error}") from error
    leaves = convert.flatten(stored)
    expected = {".".join(keys(leaf, component)): leaf for leaf in convert.flatten(shapes)}
    wanted = convert.flatten(shapes)
    problems = [f"missing {name}" for name in sorted(expected.keys() - leaves.keys())]
    problems += [f"unexpected {name}" for name in sorted(leaves.keys() - expected.keys())]
    for name in sorted(expected.keys() & leaves.keys()):
        want, x = wanted[expected[name]].shape, leaves[name]
        if not isinstance(x, np.ndarray) or x.shape != want:
            problems.append(f"{name}: {getattr(x, 'shape', type(x).__name__)}, expected {want}")
    if problems:
        raise UserError(f"{path} does not fit its config:\n  {json_files.listing(problems)}")
    return convert.unflatten({expected[name]: x for name, x in leaves.items()}, shapes)


def write(
    directory: pathlib.Path,
    model: model_directory.ModelConfig,
    params: Mapping[str, Any],
    dtype: Any,
) -> None:
    """Fills an empty directory with the pipeline that `FlaxStableDiffusionPipeline` read."""
    configs.write_small_files(model.directory, directory, model.schedule)
    index = json_files.read_json(directory / "model_index.json")
    for name in (*model_directory.COMPONENTS, "scheduler"):
        index[name][1] = f"Flax{index[name][1]}"
    json_files.write_json(
        directory / "model_index.json", index | {"_class_name": f"Flax{index['_class_name']}"}
    )
    scheduler = directory / "scheduler" / "scheduler_config.json"
    json_files.write_json(
        scheduler, json_files.read_json(scheduler) | {"_class_name": index["scheduler"][1]}
    )
    for component, file in FILES.items():
        tree: dict[str, Any] = {}
        for path, x in convert.flatten(params[component]).items():
            *parents, last = keys(path, component)
            node = tree
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = np.asarray(x).astype(dtype or x.dtype, copy=False)
        folder = directory / component
        folder.mkdir()
        (folder / file).write_bytes(serialization.msgpack_serialize(tree))
        config = configs.read_config(model.directory / component / "config.json")
        json_files.write_json(folder / "config.json", config | _flax_class(config))


def _flax_class(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"_class_name": f"Flax{config['_class_name']}"} if "_class_name" in config else {}


def _check_array(code: int, data: bytes) -> None:
    """Refuses arrays whose bytes are not exactly those of a shape of floating-point numbers."""
    if code != _NDARRAY:
        raise UserError(f"unexpected extension type {code}")
    shape, dtype, content = msgpack.unpackb(data, raw=True)
    kinds = {np.dtype(kind).name: np.dtype(kind).itemsize for kind in tensors.FLOATS.values()}
    size = kinds.get(dtype.decode(errors="replace") if isinstance(dtype, bytes) else "")
    if size is None:
        raise UserError(f"an array of dtype {dtype!r}, expected one of {list(kinds)}")
    num_bytes = size
    for length in shape:
        if not isinstance(length, int) or not 0 <= length <= len(content):
            raise UserError(f"an array of shape {shape} with {len(content)} bytes")
        num_bytes *= length
    if num_bytes != len(content):
        raise UserError(f"an array of shape {shape} with {len(content)} bytes")
