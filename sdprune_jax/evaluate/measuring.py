"""The figures of a protocol, of pictures on disk."""

import functools
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Num, UInt8

from sdprune_jax.data.images import RESIZE
from sdprune_jax.evaluate import images, needs, networks, scores, task
from sdprune_jax.evaluate.measurement import Measurement
from sdprune_jax.evaluate.protocols import Metric, Protocol
from sdprune_jax.files import model_directory
from sdprune_jax.metrics import features

# From an index to the picture as the protocol's files hold it.
_Read = Callable[[int], UInt8[np.ndarray, "h w 3"]]


def load_networks(
    measurement: Measurement, protocol: Protocol, dense: model_directory.ModelConfig
) -> dict[str, networks.Network]:
    """All that a protocol's metrics need, by name."""
    names = needs.network_names(protocol)
    return {name: networks.load(name, measurement.networks, dense) for name in names}


def measure(
    measurement: Measurement,
    mesh: Mesh,
    protocol: Protocol,
    loaded: Mapping[str, networks.Network],
    folders: Mapping[str, pathlib.Path],
    asked: task.Task,
    cached: pathlib.Path,
) -> dict[str, scores.Figures]:
    """The figures of every model, of the images in its folder.

    Args:
        measurement: where reference statistics are, and the number of resamples.
        protocol: what to measure.
        loaded: networks by name, from `load_networks`.
        folders: where each model's images are; features are kept in `cache` beside each.
        asked: prompts and reference pictures.
        cached: where the features of the reference pictures are kept.
    """
    num_images = len(asked.prompts)
    figures: dict[str, scores.Figures] = {name: {} for name in folders}
    for metric in protocol.metrics:
        network = loaded[metric.network]
        extract = functools.partial(_features, network, metric, protocol, mesh)
        wanted = {}
        for name, folder in folders.items():
            read = functools.partial(_generated, folder, None if metric.is_fresh else protocol)
            state = f"{folder.name}:{num_images}"
            wanted[name] = extract(folder.parent / "cache", read, num_images, state)
        reference = None
        if asked.reference and needs.reads_pictures(measurement, metric.kind):
            read = functools.partial(_real, asked.reference, protocol)
            reference = extract(cached, read, asked.num_references, f"real:{asked.state}")
        measured = scores.of_metric(
            metric,
            wanted,
            reference,
            network,
            asked,
            mesh,
            references=measurement.references,
            num_resamples=measurement.num_resamples,
        )
        for name in folders:
            figures[name] |= measured[name]
    return figures


def _features(
    network: networks.Network,
    metric: Metric,
    protocol: Protocol,
    mesh: Mesh,
    directory: pathlib.Path,
    read: _Read,
    num_images: int,
    state: str,
) -> Float[np.ndarray, "n d"]:
    def load(index: Num[np.ndarray, " b"]) -> Num[np.ndarray, "b h w 3"]:
        return np.stack([_resized(read(int(i)), metric.resize, metric.size) for i in index])

    how = {
        "resize": metric.resize,
        "size": metric.size,
        "is_fresh": metric.is_fresh,
        "files": [protocol.file_size, protocol.file_resize, protocol.jpeg_quality],
    }
    compute = lambda: features.extract(network.embed, network.params, load, num_images, mesh)
    return features.cached(directory, network.weights, how, state, compute)


def _generated(
    folder: pathlib.Path, protocol: Protocol | None, index: int
) -> UInt8[np.ndarray, "h w 3"]:
    image = images.picture(folder, index)
    if protocol is None:
        return image
    if protocol.jpeg_quality:
        image = images.through_jpeg(image, protocol.jpeg_quality)
    return _filed(image, protocol, protocol.file_resize[0])


def _real(read: _Read, protocol: Protocol, index: int) -> UInt8[np.ndarray, "h w 3"]:
    return _filed(read(index), protocol, protocol.file_resize[1])


def _filed(
    image: UInt8[np.ndarray, "h w 3"], protocol: Protocol, rule: str
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """As the protocol's files hold it."""
    if protocol.file_size:
        image = np.round(_resized(image, rule, protocol.file_size)).astype(np.uint8)
    if protocol.jpeg_quality:
        image = images.through_jpeg(image, protocol.jpeg_quality)
    return image


def _resized(image: UInt8[np.ndarray, "h w 3"], rule: str, size: int) -> Num[np.ndarray, "h2 w2 3"]:
    return image if rule == "none" else RESIZE[rule](image, size)
