"""What the stage `prune` puts on record, and a check of what was written."""

import dataclasses
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from sdprune_jax import UserError
from sdprune_jax.files import convert, model_directory, tensors
from sdprune_jax.pruning.methods import Method, Override
from sdprune_jax.pruning.selection import Pruned

_BINS = 64  # in a histogram, over 4 standard deviations to either side
_SAMPLED = 4 * 2**20  # weights in a histogram, at most
_COMPRESSED = 4 * 2**20  # bytes of a tensor, at most, that are compressed to estimate a size


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """What became of one layer.

    Attributes:
        name: the layer's PyTorch name, without `.weight`.
        shape: axes of its weight in PyTorch.
        weights: how many there are.
        zeros: how many are 0 now.
        threshold: the largest magnitude that was removed.
        loss: growth of the squared error of the outputs; None of methods that do not compensate,
            and where a solver fell back to magnitude.
        damping: what a solver added to the Gram matrix, as a fraction of its mean diagonal.
        output_error: squared change of a solver's outputs over their own squares.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    threshold: float
    loss: float | None = None
    damping: float | None = None
    output_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts of a sample of the weights in scope, between `edges`; zeros of `pruned` left out."""

    edges: list[float]
    dense: list[int]
    pruned: list[int]


@dataclasses.dataclass(frozen=True)
class ComponentRecord:
    """What became of one component.

    Attributes:
        requested: the sparsity of the weights in scope that the method was to reach.
        prunable: weights in scope.
        zeros: how many of these are 0 now.
        zeros_before: how many were 0 before.
        of_prunable: `zeros` as a share of the weights in scope.
        parameters: all parameters of the component.
        of_component: `zeros` as a share of these.
        of_pipeline: `zeros` as a share of the parameters of all components.
        underflow_zeros: further zeros that come of rounding to the dtype that is written.
    """

    requested: float
    method: str
    pattern: str
    allocation: str
    scope: str
    threshold: str
    prunable: int
    zeros: int
    zeros_before: int
    of_prunable: float
    parameters: int
    of_component: float
    layers: list[LayerRecord]
    histogram: Histogram
    group: str | None = None
    overrides: tuple[Override, ...] | None = None
    band: tuple[float, float] | None = None
    of_pipeline: float | None = None
    underflow_zeros: int | None = None


@dataclasses.dataclass(frozen=True)
class PruneRecord:
    """The content of prune.json.

    Attributes:
        model: the dense model, as the config names it.
        directory: name of the pruned model's directory, beside this record.
        save_dtype: dtype of the weights that were written.
        seconds: duration of each phase that took any.
        pipeline_parameters: parameters of all components.
        of_pipeline: share of these that was pruned, or was 0 before.
        bytes: sizes of the pruned components' weights, `dense` and `pruned`, and with `_gzip`.
        components: by name, those that were pruned.
    """

    model: str
    directory: str
    save_dtype: str
    seconds: dict[str, float]
    pipeline_parameters: int
    of_pipeline: float
    bytes: dict[str, int]
    components: dict[str, ComponentRecord]


def component(
    method: Method,
    layers: Sequence[LayerRecord],
    zeros_before: int,
    parameters: int,
    histogram: Histogram,
) -> ComponentRecord:
    """The record of a component whose layers in scope are `layers`; all but what the stage adds."""
    prunable, zeros = (sum(getattr(row, key) for row in layers) for key in ("weights", "zeros"))
    names = {field.name for field in dataclasses.fields(ComponentRecord)}
    settings = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    return ComponentRecord(
        requested=method.sparsity,
        prunable=prunable,
        zeros=zeros,
        zeros_before=zeros_before,
        of_prunable=zeros / prunable,
        parameters=parameters,
        of_component=zeros / parameters,
        layers=list(layers),
        histogram=histogram,
        **{name: value for name, value in settings.items() if name in names},
    )


def threshold(kernel: Float[np.ndarray, "..."], keep: Bool[np.ndarray, "..."]) -> float:
    """The largest magnitude that is removed."""
    return float(np.abs(kernel[~keep].astype(np.float32)).max(initial=0))


def num_zeros(x: Shaped[np.ndarray, "..."]) -> int:
    return x.size - int(np.count_nonzero(x))


def layer(
    path: str, kernel: Float[np.ndarray, "..."], pruned: Pruned, threshold: float
) -> LayerRecord:
    """The record of a layer, with `kernel` as it is after pruning."""
    is_finite = pruned.loss is not None and np.isfinite(pruned.loss)
    return LayerRecord(
        convert.torch_key(path).removesuffix(".weight"),
        convert.to_torch(path, kernel).shape,
        kernel.size,
        num_zeros(kernel),
        threshold,
        pruned.loss if is_finite else None,
        pruned.damping,
        pruned.output_error,
    )


def sample(weights: Mapping[str, np.ndarray]) -> Shaped[np.ndarray, " n"]:
    """Every k-th weight of every layer, few enough to count."""
    every = -(-sum(w.size for w in weights.values()) // _SAMPLED)
    return np.concatenate([w.reshape(-1)[::every].astype(np.float32) for w in weights.values()])


def histogram(before: Shaped[np.ndarray, " n"], after: Shaped[np.ndarray, " n"]) -> Histogram:
    edges = np.linspace(-4, 4, _BINS + 1) * float(before.std() or 1)
    counts = (np.histogram(x, edges)[0].tolist() for x in (before, after[after != 0]))
    return Histogram(edges.tolist(), *counts)  # the zeros would be a spike


def verify(output: pathlib.Path, name: str, tree: Any, dtype: np.dtype) -> int:
    """Loads a component back and compares it with `tree`; returns the zeros that rounding made."""
    stored = convert.flatten(model_directory.load(model_directory.open_model(output), name))
    zeros = 0
    for path, x in convert.flatten(tree).items():
        got = np.asarray(stored[path])
        if not np.array_equal(got, x.astype(dtype)):
            raise UserError(f"{output / name}: {convert.torch_key(path)} is not what was written")
        zeros += num_zeros(got) - num_zeros(x)
    return zeros


def stored_bytes(
    model: model_directory.ModelConfig,
    output: pathlib.Path,
    pruned: dict[str, Any],
    variant: str | None,
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
