"""The parameters of one component: read into any sharding, written leaf by leaf."""

import functools
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Shaped

from sdprune_jax import UserError
from sdprune_jax.files import convert, json_files, tensors
from sdprune_jax.sharding import to_host

MAX_SHARD_BYTES = 10 * 10**9  # as in diffusers: every part of Stable Diffusion 2 is one file


def load_params(
    directory: str | os.PathLike[str],
    shapes: Mapping[str, Any],
    *,
    dtype: Any = None,
    variant: str | None = None,
    sharding: Any = None,
    allow_nonfinite: bool = False,
) -> dict[str, Any]:
    """Reads the parameters of one component; a device reads only the part that it holds.

    Args:
        directory: holds one safetensors file, or several and their index.
        shapes: nested `jax.ShapeDtypeStruct`s of the parameters that the model has.
        dtype: dtype of the result; None is that in the file (float32 for float64).
        variant: "fp16" reads `*.fp16.safetensors`.
        sharding: one for all parameters, or a tree; None places all on one device.
        allow_nonfinite: accept NaN and infinity.

    Returns:
        Arrays, nested as `shapes`.

    Raises:
        ValueError: if the files are not intact safetensors, naming every tensor that is missing,
            unexpected, of another shape or dtype, or not finite.
    """
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = convert.flatten(shapes)
    shardings = convert.flatten(jax.tree.broadcast(sharding, shapes))
    stored = _match(tensors.open_tensors(directory, variant), wanted, directory)
    flat, problems = {}, []
    for path, tensor in stored.items():
        target = np.dtype(dtype or tensors.FLOATS[tensor.dtype])
        if target == np.float64:  # JAX has none unless told so
            target = np.dtype(np.float32)
        flat[path], count = _place(path, tensor, wanted[path].shape, target, shardings[path])
        if count:
            problems.append(f"{convert.torch_key(path)}: {count} values")
    if problems and not allow_nonfinite:
        raise UserError(
            f"{directory}: {len(problems)} tensors are not finite:\n  "
            f"{json_files.listing(problems)}\n"
            "the weights are damaged, or too large for the dtype"
        )
    return convert.unflatten(flat, shapes)


def check_params(
    directory: str | os.PathLike[str], shapes: Mapping[str, Any], variant: str | None = None
) -> None:
    """Checks names, shapes and dtypes of the parameters of a component; reads no parameter.

    Raises:
        UserError: as `load_params`, but for values that are not finite.
    """
    _match(tensors.open_tensors(directory, variant), convert.flatten(shapes), directory)


def save_params(
    directory: str | os.PathLike[str],
    params: Mapping[str, Any],
    *,
    dtype: Any,
    name: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the parameters of one component in PyTorch's layout, then reads them back to check.

    Every process calls it, because sharded leaves are gathered one by one; the first one writes.

    Args:
        directory: exists.
        params: nested parameters.
        dtype: dtype in the file; None keeps that of each leaf.
        name: file name less its suffix: "diffusion_pytorch_model" or "model".
        max_shard_bytes: what exceeds it is split into several files and an index.

    Raises:
        ValueError: naming every tensor that is not finite in `dtype`.
    """
    directory = pathlib.Path(directory)
    flat = convert.flatten(params)
    paths = {convert.torch_key(path): path for path in sorted(flat)}
    specs = {key: _torch_spec(path, flat[path], dtype) for key, path in paths.items()}
    problems, num_lost = [], 0

    def read(key: str) -> Shaped[np.ndarray, "..."]:
        nonlocal num_lost
        x = to_host(flat[paths[key]])
        with np.errstate(over="ignore", under="ignore"):  # both are counted
            cast = x.astype(specs[key].dtype, copy=False)
        num_lost += np.count_nonzero(x) - np.count_nonzero(cast)
        if count := _num_nonfinite(cast):
            problems.append(f"{key}: {count} values")
        return convert.to_torch(paths[key], cast)

    files, weight_map = _shards(specs, name, max_shard_bytes), {}
    for file, keys in files.items():
        part = {key: specs[key] for key in keys}
        sums = tensors.write_file(directory / file, part, read)
        weight_map |= dict.fromkeys(keys, file)
        if jax.process_index() == 0:
            tensors.check_file(directory / file, part, sums)
    if problems:
        raise UserError(
            f"{directory}: {len(problems)} tensors are not finite as {dtype or 'they are'}:\n  "
            + json_files.listing(problems)
        )
    if num_lost:
        logging.info("%s: %d weights became zero, being too small", directory, num_lost)
    if len(files) > 1 and jax.process_index() == 0:
        total = sum(map(tensors.num_bytes, specs.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        json_files.write_json(directory / f"{name}.safetensors.index.json", index)


def _match(
    stored: Mapping[str, tensors.StoredTensor], wanted: Mapping[str, Any], directory: Any
) -> dict[str, tensors.StoredTensor]:
    """The tensor of every parameter, by path."""
    paths = {convert.torch_key(path): path for path in wanted}
    names = convert.match_names(stored, paths.keys())
    missing = sorted(paths.keys() - names.keys())
    unexpected = sorted(names[key] for key in names.keys() - paths.keys())
    misshapen, matched = [], {}
    for key in sorted(paths.keys() & names.keys()):
        tensor = matched[paths[key]] = stored[names[key]]
        shape = _torch_spec(paths[key], wanted[paths[key]], None).shape
        fits = tensor.shape == shape or (
            convert.was_convolution(key) and tensor.shape == (*shape, 1, 1)
        )
        if not fits or tensor.dtype not in tensors.FLOATS:
            misshapen.append(f"{names[key]}: {tensor.dtype} {tensor.shape}, expected {shape}")
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape or dtype": misshapen}
    problems = [
        f"{len(items)} {kind}:\n  {json_files.listing(items)}"
        for kind, items in kinds.items()
        if items
    ]
    if problems:
        raise UserError(
            f"{directory} does not hold this model ({len(paths)} tensors, dtypes "
            f"{', '.join(tensors.FLOATS)}):\n" + "\n".join(problems)
        )
    return {path: matched[path] for path in wanted}


def _place(
    path: str,
    tensor: tensors.StoredTensor,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
) -> tuple[Any, int]:
    """One parameter on its devices, and how many of its values are not finite."""
    part = functools.cache(functools.partial(_part, path, tensor, shape, dtype))  # for replicas
    bounds = lambda index: tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
    x = jax.make_array_from_callback(shape, sharding, lambda index: part(bounds(index))[0])
    indices = sharding.addressable_devices_indices_map(shape).values()
    return x, sum(part(one)[1] for one in set(map(bounds, indices)))


def _part(
    path: str,
    tensor: tensors.StoredTensor,
    shape: tuple[int, ...],
    dtype: np.dtype,
    bounds: tuple[tuple[int, int, int], ...],
) -> tuple[Shaped[np.ndarray, "..."], int]:
    """What `bounds` hold of a parameter, and how many of its values are not finite."""
    index = tuple(slice(*bounds[axis]) for axis in convert.torch_axes(path, len(shape)))
    x = tensor.slices[index] if index else tensor.read()
    x = convert.from_torch(path, x.reshape(x.shape[: len(shape)]))
    with np.errstate(over="ignore"):  # counted
        x = x.astype(dtype, copy=False)
    return x, _num_nonfinite(x)


def _torch_spec(path: str, leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    shape = tuple(leaf.shape[axis] for axis in convert.torch_axes(path, len(leaf.shape)))
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype or leaf.dtype))


def _num_nonfinite(x: Shaped[np.ndarray, "..."]) -> int:
    return math.prod(x.shape) - int(np.count_nonzero(np.isfinite(x)))


def _shards(
    specs: Mapping[str, jax.ShapeDtypeStruct], name: str, max_shard_bytes: int
) -> dict[str, list[str]]:
    """Which tensors go into which file."""
    shards, size = [[]], 0
    for key, spec in specs.items():
        if shards[-1] and size + tensors.num_bytes(spec) > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensors.num_bytes(spec)
    if len(shards) == 1:
        return {f"{name}.safetensors": shards[0]}
    return {
        f"{name}-{i:05}-of-{len(shards):05}.safetensors": keys for i, keys in enumerate(shards, 1)
    }
