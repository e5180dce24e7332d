"""What a measurement needs, told before anything is drawn; and which files its figures are of."""

import hashlib
import pathlib

from sdprune_jax import UserError, config
from sdprune_jax.evaluate import networks
from sdprune_jax.evaluate.protocols import PROTOCOLS, Protocol
from sdprune_jax.files import tensors

_WITH_PICTURES = ("kid", "cmmd")  # kinds that no statistics of the reference pictures replace


def check(section: config.Evaluate, edge: int | None = None) -> None:
    """Checks the section `evaluate` of a run.

    Args:
        section: what is asked for.
        edge: height and width of the model's images, in pixels; None if not known yet.

    Raises:
        ValueError: naming all of `problems`.
    """
    if found := problems(section, PROTOCOLS[section.protocol], edge, "config.evaluate"):
        raise UserError("config.evaluate is not possible:\n  " + tensors.listing(found))


def problems(section: config.Evaluate, protocol: Protocol, edge: int | None, key: str) -> list[str]:
    """What of a measurement is missing, or cannot be.

    Args:
        section: what is asked for.
        edge: see `check`.
        key: what messages call the section.
    """
    found, name = [], protocol.name
    if (section.num_images or protocol.num_images) < 2:
        found.append(f"{key}.num_images is 1: one image has no distribution; give 2")
    if protocol.data != "embedded" and not section.data:
        found.append(
            f"the protocol {name} draws from {protocol.data}: set {key}.data to a directory that"
            " sdprune prepare-data wrote"
        )
    if protocol.data == "bksdm" and not section.references:
        found.append(
            f"the protocol {name} has no reference pictures: set {key}.references to their"
            " statistics, a .npz with mu and sigma"
        )
    if section.references and not pathlib.Path(section.references).is_file():
        found.append(f"{key}.references is {section.references}, which is no file")
    for network in network_names(protocol):
        try:
            networks.path(section.networks, network)
        except ValueError as error:
            found.append(f"{error}, and set {key}.networks")
    sizes = {metric.size for metric in protocol.metrics if metric.network == "embedded"}
    if edge is not None and sizes - {edge}:
        found.append(
            f"the protocol {name} measures images of {max(sizes)} pixels, and this model makes"
            f" {edge}: choose another {key}.protocol"
        )
    return found


def has_pictures(section: config.Evaluate, protocol: Protocol) -> bool:
    """Whether reference pictures are read, not their captions alone."""
    return not section.references or any(m.kind in _WITH_PICTURES for m in protocol.metrics)


def reads_pictures(section: config.Evaluate, kind: str) -> bool:
    """Whether a metric of that kind is a distance to reference pictures, not to `references`."""
    return kind in _WITH_PICTURES or (kind == "fid" and not section.references)


def states(section: config.Evaluate, protocol: Protocol) -> list[str]:
    """Hashes of the networks and of the reference statistics."""
    found = [networks.state(name, section.networks) for name in network_names(protocol)]
    if section.references:
        data = pathlib.Path(section.references).read_bytes()
        found.append(hashlib.sha256(data).hexdigest())
    return found


def network_names(protocol: Protocol) -> list[str]:
    """The networks of a protocol's metrics."""
    return sorted({metric.network for metric in protocol.metrics})
