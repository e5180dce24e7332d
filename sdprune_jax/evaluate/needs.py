"""What a measurement needs, told before anything is drawn; and which files its figures are of."""

import hashlib
import pathlib

from sdprune_jax import UserError
from sdprune_jax.evaluate import networks
from sdprune_jax.evaluate.measurement import Measurement
from sdprune_jax.evaluate.protocols import PROTOCOLS, Protocol
from sdprune_jax.files import json_files

_WITH_PICTURES = ("kid", "cmmd")  # kinds that no statistics of the reference pictures replace


def check(measurement: Measurement, edge: int | None = None) -> None:
    """Checks what the section `evaluate` of a run asks for.

    Args:
        measurement: the settings to check.
        edge: height and width of the model's images, in pixels; None if not known yet.

    Raises:
        ValueError: naming all of `problems`.
    """
    if lacking := problems(measurement, PROTOCOLS[measurement.protocol], edge, "config.evaluate"):
        raise UserError("config.evaluate is not possible:\n  " + json_files.listing(lacking))


def problems(measurement: Measurement, protocol: Protocol, edge: int | None, key: str) -> list[str]:
    """What of a measurement is missing, or cannot be.

    Args:
        measurement: the settings to check.
        edge: see `check`.
        key: what messages call the measurement.
    """
    lacking, name = [], protocol.name
    if (measurement.num_images or protocol.num_images) < 2:
        lacking.append(f"{key}.num_images is 1: one image has no distribution; give 2")
    if protocol.data != "embedded" and not measurement.data:
        lacking.append(
            f"the protocol {name} draws from {protocol.data}: set {key}.data to a directory that"
            " sdprune prepare-data wrote"
        )
    if protocol.data == "bksdm" and not measurement.references:
        lacking.append(
            f"the protocol {name} has no reference pictures: set {key}.references to their"
            " statistics, a .npz with mu and sigma"
        )
    if measurement.references and not pathlib.Path(measurement.references).is_file():
        lacking.append(f"{key}.references is {measurement.references}, which is no file")
    for network in network_names(protocol):
        try:
            networks.path(measurement.networks, network)
        except ValueError as error:
            lacking.append(f"{error}, and set {key}.networks")
    sizes = {metric.size for metric in protocol.metrics if metric.network == "embedded"}
    if edge is not None and sizes - {edge}:
        lacking.append(
            f"the protocol {name} measures images of {max(sizes)} pixels, and this model makes"
            f" {edge}: choose another {key}.protocol"
        )
    return lacking


def has_pictures(measurement: Measurement, protocol: Protocol) -> bool:
    """Whether reference pictures are read, not their captions alone."""
    return not measurement.references or any(m.kind in _WITH_PICTURES for m in protocol.metrics)


def reads_pictures(measurement: Measurement, kind: str) -> bool:
    """Whether a metric of that kind is a distance to reference pictures, not to `references`."""
    return kind in _WITH_PICTURES or (kind == "fid" and not measurement.references)


def states(measurement: Measurement, protocol: Protocol) -> list[str]:
    """Hashes of the networks and of the reference statistics."""
    hashes = [networks.state(name, measurement.networks) for name in network_names(protocol)]
    if measurement.references:
        data = pathlib.Path(measurement.references).read_bytes()
        hashes.append(hashlib.sha256(data).hexdigest())
    return hashes


def network_names(protocol: Protocol) -> list[str]:
    """The networks of a protocol's metrics."""
    return sorted({metric.network for metric in protocol.metrics})
