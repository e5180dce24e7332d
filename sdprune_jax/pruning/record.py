"""What the stage `prune` puts on record, and a check of what was written."""

import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from sdprune_jax import UserError
from sdprune_jax.files import convert, model_directory, tensors
from sdprune_jax.pruning.methods import Pruned

_BINS = 64  # of a histogram, over 4 standard deviations to either side
_SAMPLED = 4 * 2**20  # weights in a histogram, at most
_COMPRESSED = 4 * 2**20  # bytes of a tensor, at most, that are compressed to estimate a size


def threshold(kernel: Float[np.ndarray, "..."], keep: Bool[np.ndarray, "..."]) -> float:
    """The largest magnitude that is removed."""
    return float(np.abs(kernel[~keep].astype(np.float32)).max(initial=0))


def layer(
    path: str, kernel: Float[np.ndarray, "..."], pruned: Pruned, threshold: float
) -> dict[str, Any]:
    """A row of the record.

    Args:
        path: of the kernel.
        kernel: as pruned.
        pruned: how it was.
        threshold: the largest magnitude that was removed.
    """
    row = {
        "name": convert.torch_key(path).removesuffix(".weight"),
        "shape": list(convert.to_torch(path, kernel).shape),
        "weights": kernel.size,
        "zeros": kernel.size - int(np.count_nonzero(kernel)),
        "threshold": threshold,
    }
    if pruned.loss is not None:  # of a solver
        fell_back = not np.isfinite(pruned.loss)
        row |= {
            "loss": None if fell_back else pruned.loss,
            "damping": pruned.damping,
            "output_error": pruned.output_error,
        }
    return row


def sample(weights: Mapping[str, np.ndarray]) -> Shaped[np.ndarray, " n"]:
    """Every k-th weight of every layer, few enough to count."""
    every = -(-sum(w.size for w in weights.values()) // _SAMPLED)
    return np.concatenate([w.reshape(-1)[::every].astype(np.float32) for w in weights.values()])


def histogram(
    before: Shaped[np.ndarray, " n"], after: Shaped[np.ndarray, " n"]
) -> dict[str, list[Any]]:
    edges = np.linspace(-4, 4, _BINS + 1) * float(before.std() or 1)
    return {
        "edges": [float(edge) for edge in edges],
        "dense": np.histogram(before, edges)[0].tolist(),
        "pruned": np.histogram(after[after != 0], edges)[0].tolist(),  # the zeros are a spike
    }


def verify(output: pathlib.Path, name: str, tree: Any, dtype: np.dtype) -> int:
    """Loads a component back and compares it, weight for weight; returns its zeros."""
    stored = convert.flatten(model_directory.load(model_directory.open_model(output), name))
    zeros = 0
    for path, x in convert.flatten(tree).items():
        got = np.asarray(stored[path])
        if not np.array_equal(got, x.astype(dtype)):
            raise UserError(f"{output / name}: {convert.torch_key(path)} is not what was written")
        zeros += got.size - int(np.count_nonzero(got))
    return zeros


def stored_bytes(
    model: model_directory.Model, output: pathlib.Path, pruned: dict[str, Any], variant: str | None
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
