"""Stage `prune`: masks the weights of each component that has a section."""

import dataclasses
import pathlib
import time
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Shaped

from sdprune_jax import checkpoint, config, convert, sites, tensors
from sdprune_jax.data import cache
from sdprune_jax.pruning import allocate, masks, scores

_BINS = 64  # of a histogram, over 4 standard deviations to either side
_SAMPLED = 4 * 2**20  # weights in a histogram, at most
_COMPRESSED = 4 * 2**20  # bytes of a tensor, at most, that are compressed to estimate a size


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Writes `workdir/pruned`, a diffusers directory, and `workdir/prune.json`, what was done.

    Selection needs no mesh: one component at a time is on the host.

    Raises:
        ValueError: if no component has a section, or the model cannot be read.
    """
    del mesh
    assert run.prune is not None
    sections = {
        name: section
        for name in checkpoint.COMPONENTS
        if (section := getattr(run.prune, name, None)) is not None
    }
    if not sections:
        raise ValueError("config.prune has no component: set config.prune.unet or text_encoder")
    model = checkpoint.open_model(checkpoint.directory_of(run.model))
    work = pathlib.Path(run.workdir)
    output, record = work / "pruned", work / "prune.json"
    made_from = cache.fingerprint(
        dataclasses.asdict(run.prune), run.variant, cache.directory_state(model.directory)
    )
    if record.exists() and output.is_dir() and tensors.read_json(record)["made_from"] == made_from:
        logging.info("%s is complete: made from the same config and model", output)
        return output
    record.unlink(missing_ok=True)

    shapes = {name: checkpoint.param_shapes(model, name) for name in checkpoint.COMPONENTS}
    sizes = {name: _num_parameters(tree) for name, tree in shapes.items()}
    seconds = {"load": 0.0, "select": 0.0, "save": 0.0, "verify": 0.0}
    pruned, done = {}, {}
    for name, section in sections.items():
        start = time.perf_counter()
        loaded = checkpoint.load(model, name, variant=run.variant or None)
        flat = {path: np.array(x) for path, x in convert.flatten(loaded).items()}
        del loaded
        seconds["load"] += time.perf_counter() - start
        start = time.perf_counter()
        layers = sites.prunable(shapes[name], name, section.scope)
        done[name] = _prune_component(flat, layers, section)
        seconds["select"] += time.perf_counter() - start
        pruned[name] = convert.unflatten(flat, shapes[name])
        logging.info("%s: %d zeros in %d layers", name, done[name]["zeros"], len(layers))

    start = time.perf_counter()
    dtype = jnp.dtype(run.prune.save_dtype)
    checkpoint.save(
        model, pruned, output, dtype=dtype, variant=run.variant or None, overwrite=output.exists()
    )
    seconds["save"] = time.perf_counter() - start
    start = time.perf_counter()
    for name, tree in pruned.items():
        stored = _verify(output, name, tree, dtype)
        done[name]["underflow_zeros"] = stored - done[name].pop("all_zeros")
    seconds["verify"] = time.perf_counter() - start

    total = sum(sizes.values())
    for name, values in done.items():
        values["parameters"] = sizes[name]
        values["of_component"] = values["zeros"] / sizes[name]
        values["of_pipeline"] = values["zeros"] / total
    bytes_ = _bytes(model, output, pruned, run.variant or None)
    tensors.write_json(
        record,
        {
            "made_from": made_from,
            "model": run.model,
            "directory": output.name,
            "save_dtype": run.prune.save_dtype,
            "seconds": {key: round(value, 3) for key, value in seconds.items()},
            "pipeline_parameters": total,
            "of_pipeline": sum(values["zeros"] for values in done.values()) / total,
            "bytes": bytes_,
            "components": done,
        },
    )
    return output


def _prune_component(
    flat: dict[str, np.ndarray], layers: list[str], section: config.PruneComponent
) -> dict[str, Any]:
    """Zeroes weights of `flat` in place; returns what was done to every layer."""
    weights = {path: convert.to_torch(path, flat[path]) for path in layers}  # views
    sizes = {path: w.size for path, w in weights.items()}
    exact = section.threshold == "exact"
    removed = (allocate.uniform if exact else allocate.each_floored)(sizes, section.sparsity)
    before = _sample(weights)
    rows: list[dict[str, Any]] = []
    for path, keep in masks.lowest_of_each(weights, removed):
        w = weights[path]
        score = np.asarray(scores.magnitude(w))
        kept = keep if exact else masks.without_ties(score, keep)
        threshold = float(score[~kept].max(initial=0))
        masks.zero(w, kept)
        zeros = w.size - int(np.count_nonzero(w))
        rows.append(
            {
                "name": convert.torch_key(path).removesuffix(".weight"),
                "shape": list(w.shape),
                "weights": w.size,
                "zeros": zeros,
                "threshold": threshold,
            }
        )
    order = {convert.torch_key(path).removesuffix(".weight"): i for i, path in enumerate(layers)}
    rows.sort(key=lambda row: order[row["name"]])
    prunable, zeros = sum(sizes.values()), sum(row["zeros"] for row in rows)
    return {
        "requested": section.sparsity,
        "scope": section.scope,
        "threshold": section.threshold,
        "prunable": prunable,
        "zeros": zeros,
        "of_prunable": zeros / prunable,
        "all_zeros": sum(x.size - int(np.count_nonzero(x)) for x in flat.values()),
        "layers": rows,
        "histogram": _histogram(before, _sample(weights)),
    }


def _sample(weights: dict[str, np.ndarray]) -> Shaped[np.ndarray, " n"]:
    """Every k-th weight of every layer, few enough to count."""
    every = -(-sum(w.size for w in weights.values()) // _SAMPLED)
    return np.concatenate([w.reshape(-1)[::every].astype(np.float32) for w in weights.values()])


def _histogram(
    before: Shaped[np.ndarray, " n"], after: Shaped[np.ndarray, " n"]
) -> dict[str, list[Any]]:
    edges = np.linspace(-4, 4, _BINS + 1) * float(before.std() or 1)
    return {
        "edges": [float(edge) for edge in edges],
        "dense": np.histogram(before, edges)[0].tolist(),
        "pruned": np.histogram(after[after != 0], edges)[0].tolist(),  # the zeros are a spike
    }


def _verify(output: pathlib.Path, name: str, tree: Any, dtype: np.dtype) -> int:
    """Loads a component back and compares it, weight for weight; returns its zeros."""
    stored = convert.flatten(checkpoint.load(checkpoint.open_model(output), name))
    zeros = 0
    for path, x in convert.flatten(tree).items():
        got = np.asarray(stored[path])
        if not np.array_equal(got, x.astype(dtype)):
            raise ValueError(f"{output / name}: {convert.torch_key(path)} is not what was written")
        zeros += got.size - int(np.count_nonzero(got))
    return zeros


def _bytes(
    model: checkpoint.Model, output: pathlib.Path, pruned: dict[str, Any], variant: str | None
) -> dict[str, int]:
    """Sizes of the pruned components' weights, in the dtype written, and compressed by zlib.

    Compressed sizes are scaled from the first megabytes of each tensor.
    """
    sizes = {"dense": 0, "pruned": 0, "dense_gzip": 0, "pruned_gzip": 0}
    for name in pruned:
        stored = {
            "pruned": tensors.open_tensors(output / name),
            "dense": tensors.open_tensors(model.directory / name, variant),
        }
        dtypes = {key: tensor.read().dtype for key, tensor in stored["pruned"].items()}
        for kind, files in stored.items():
            for key, tensor in files.items():
                data = tensor.read().astype(dtypes.get(key, tensor.read().dtype)).tobytes()
                sizes[kind] += len(data)
                part = data[:_COMPRESSED]
                sizes[f"{kind}_gzip"] += len(zlib.compress(part, 1)) * len(data) // len(part)
    return sizes


def _num_parameters(shapes: Any) -> int:
    return sum(leaf.size for leaf in convert.flatten(shapes).values())
