"""Figures from features, each with its interval and the number of images that it is of."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Num, UInt8

from sdprune_jax import UserError
from sdprune_jax.evaluate import images
from sdprune_jax.evaluate.networks import Network
from sdprune_jax.evaluate.protocols import Metric
from sdprune_jax.evaluate.task import Task
from sdprune_jax.metrics import clip_score, frechet, interval, kernel, paired
from sdprune_jax.metrics.features import cached, extract

_AT_ONCE = 64  # images in memory

Figures = dict[str, dict[str, Any]]  # name -> value, low, high, num, chance; of_each of a mean


def of_metric(
    metric: Metric,
    features: Mapping[str, Float[np.ndarray, "n d"]],
    reference: Float[np.ndarray, "m d"] | None,
    network: Network,
    task: Task,
    mesh: Mesh,
    *,
    references: str,
    num_resamples: int,
) -> dict[str, Figures]:
    """The figures of one metric for every model.

    Args:
        features: features of the generated images, by model.
        reference: features of the reference pictures.
        network: whose features they are.
        task: what was asked.
        references: path of reference statistics to use instead of `reference`.
        num_resamples: resamples of the bootstrap; 0 gives no intervals.

    Raises:
        ValueError: if a distance has nothing to compare with.
    """
    if metric.kind == "fid":
        num_features = next(iter(features.values())).shape[1]
        if references:
            target = frechet.read_gaussian(references, num_features)
        else:
            target = frechet.gaussian(frechet.moments([_needed(reference, metric)]))
        return {
            name: {metric.name: _frechet(x, target, metric.scale, num_resamples)}
            for name, x in features.items()
        }
    if metric.kind in ("kid", "cmmd"):
        real = _needed(reference, metric)
        return {name: {metric.name: _kernel(x, real, metric, mesh)} for name, x in features.items()}
    if metric.kind == "clip_score":
        assert network.embed_texts is not None
        texts = network.embed_texts(task.prompts)
        return {
            name: {
                metric.name: _mean(clip_score.cosines(x, texts) * metric.scale, num_resamples)
                | {"chance": clip_score.mismatched(x, texts) * metric.scale}
            }
            for name, x in features.items()
        }
    assert metric.kind == "recall"
    assert network.scorer is not None
    assert task.concept is not None
    assert task.style is not None
    return {
        name: {
            f"{metric.name}_{key}": _mean(hits.astype(np.float64), num_resamples)
            for key, hits in network.scorer.recall_of(x, task.concept, task.style).items()
        }
        for name, x in features.items()
    }


def to_dense(
    directory: pathlib.Path, dense: pathlib.Path, num_images: int, num_resamples: int
) -> Figures:
    """Distances of each image to the one that the dense model makes of the same noise.

    Args:
        directory: holds the images of a model.
        dense: holds those of the dense model.
        num_images: to compare, from the first on.
        num_resamples: resamples of the bootstrap; 0 gives no intervals.
    """
    parts: dict[str, list[Float[np.ndarray, " n"]]] = {}
    for first in range(0, num_images, _AT_ONCE):
        index = range(first, min(first + _AT_ONCE, num_images))
        got, want = (
            images.pictures(path, index) / np.float32(127.5) - 1 for path in (directory, dense)
        )
        latents = [images.latents(path, index) for path in (directory, dense)]
        values = {
            "latent_mse_to_dense": paired.mse(*latents),
            "psnr_to_dense": paired.psnr(got, want),
            "ssim_to_dense": paired.ssim(got, want),
        }
        for name, x in values.items():
            parts.setdefault(name, []).append(x)
    return {name: _mean(np.concatenate(x), num_resamples) for name, x in parts.items()}


def take_values(figures: Figures) -> dict[str, Float[np.ndarray, " n"]]:
    """Takes out of the figures that are means what they are the means of, image by image."""
    return {name: one.pop("of_each") for name, one in figures.items() if "of_each" in one}


def lpips_to_dense(
    directory: pathlib.Path,
    dense: pathlib.Path,
    num_images: int,
    network: Network,
    mesh: Mesh,
    *,
    num_resamples: int,
) -> Figures:
    """How different each image looks from the dense model's of the same noise: 0 is the same.

    Args:
        directory: holds the images of a model; distances are kept in `cache` beside it.
        dense: holds those of the dense model.
        num_images: to compare, from the first on, as generated.
        network: "lpips".
        num_resamples: resamples of the bootstrap; 0 gives no intervals.
    """

    def load(index: Num[np.ndarray, " b"]) -> UInt8[np.ndarray, "b 2 h w 3"]:
        of_each = (images.pictures(path, index.tolist()) for path in (directory, dense))
        return np.stack(list(of_each), axis=1)

    compute = lambda: extract(network.embed, network.params, load, num_images, mesh)
    how, pairs = {"figure": "lpips"}, f"{directory.name}:{dense.name}:{num_images}"
    distances = cached(directory.parent / "cache", network.weights, how, pairs, compute)[:, 0]
    return {"lpips_to_dense": _mean(distances.astype(np.float64), num_resamples)}


def _frechet(
    x: Float[np.ndarray, "n d"], target: frechet.Gaussian, scale: float, num_resamples: int
) -> dict[str, Any]:
    value = frechet.frechet_distance(frechet.gaussian(frechet.moments([x])), target)
    figure: dict[str, Any] = {"value": scale * value, "num": len(x)}
    if num_resamples:
        ends = interval.of_frechet_distance(x, target, num_resamples=num_resamples)
        figure |= {"low": scale * ends.low, "high": scale * ends.high}
    return figure


def _kernel(
    x: Float[np.ndarray, "n d"], real: Float[np.ndarray, "m d"], metric: Metric, mesh: Mesh
) -> dict[str, Any]:
    if metric.kind == "cmmd":
        return {"value": kernel.cmmd(x, real, mesh, scale=metric.scale), "num": len(x)}
    size = min(1000, len(x), len(real))
    mean, deviation = kernel.kid(x, real, subset_size=size)
    return {
        "value": metric.scale * mean,
        "num": len(x),
        "subset_size": size,
        "deviation": metric.scale * deviation,
    }


def _mean(values: Float[np.ndarray, " n"], num_resamples: int) -> dict[str, Any]:
    figure: dict[str, Any] = {"value": float(values.mean()), "num": len(values), "of_each": values}
    if num_resamples:
        ends = interval.of_mean(values, num_resamples=num_resamples)
        figure |= {"low": ends.low, "high": ends.high}
    return figure


def _needed(x: Any, metric: Metric) -> Any:
    if x is None:
        raise UserError(
            f"{metric.name} needs reference pictures: set config.evaluate.data, or for FID"
            " config.evaluate.references to their statistics"
        )
    return x
