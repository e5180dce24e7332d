"""Points of a sweep: what they are called, how sparse they are, which differ in sparsity alone."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from sdprune_jax import config, sites
from sdprune_jax.files import convert
from sdprune_jax.pruning import request

COMPONENTS = ("text_encoder", "unet")  # that a point may prune; shares are of both together


class Sparsity(NamedTuple):
    """Of the text encoder and the UNet together, whether or not both are pruned.

    Attributes:
        nominal: the sparsities asked for, weighed by all parameters of their components, as Ramesh
            and Zhao (https://arxiv.org/abs/2411.15113) weigh them.
        true: share of all parameters that is zero.
        zeros: their number.
    """

    nominal: float
    true: float
    zeros: int


class Series(NamedTuple):
    """Points of one component that differ in its sparsity alone."""

    component: str
    section: config.PruneComponent  # its sparsity is of no point
    sparsities: tuple[float, ...]  # ascending

    def point(self, sparsity: float) -> config.SweepPoint:
        section = dataclasses.replace(self.section, sparsity=sparsity)
        return config.SweepPoint(**{self.component: section})


def sections(point: config.SweepPoint) -> dict[str, config.PruneComponent]:
    """By component, those that there are."""
    return {name: part for name in COMPONENTS if (part := getattr(point, name)) is not None}


def method(section: config.PruneComponent) -> str:
    """A name of all that is not the sparsity, as short as the defaults allow."""
    plain = config.PruneComponent()
    words = [section.method if section.allocation == "uniform" else f"owl-{section.method}"]
    for name in ("scope", "group", "pattern", "threshold", "owl_multiple", "owl_lambda", "damping"):
        value = getattr(section, name)
        if value != getattr(plain, name):
            is_number = isinstance(value, int | float)
            words.append(f"{name.removeprefix('owl_')} {value:g}" if is_number else value)
    if section.band:
        words.append("band {:g} to {:g}".format(*section.band))
    words += [f"{own.layers} at {own.sparsity:g}" for own in section.overrides or ()]
    return ", ".join(words)


def expected(point: config.SweepPoint, shapes: Mapping[str, Any]) -> Sparsity:
    """The sparsity of a point before it is pruned; ties and rounding may add to it or take away.

    Args:
        point: to be.
        shapes: parameters or `jax.ShapeDtypeStruct`s of each component.
    """
    zeros = 0
    for name, section in sections(point).items():
        flat = convert.flatten(shapes[name])
        sizes = {p: flat[p].size for p in sites.prunable(shapes[name], name, section.scope)}
        zeros += request.num_removed(sizes, section)
    return sparsity(point, shapes, zeros)


def sparsity(point: config.SweepPoint, shapes: Mapping[str, Any], zeros: int) -> Sparsity:
    """The sparsity of a point with as many zeros."""
    counts = {name: sum(x.size for x in jax.tree.leaves(shapes[name])) for name in COMPONENTS}
    total = sum(counts.values())
    asked = sum(section.sparsity * counts[name] for name, section in sections(point).items())
    return Sparsity(asked / total, zeros / total, zeros)


def series(points: Iterable[config.SweepPoint]) -> Iterator[Series]:
    """Those among points that can be bisected, in order: a pattern or a band has one sparsity."""
    found: dict[tuple[str, str], tuple[config.PruneComponent, set[float]]] = {}
    for point in points:
        parts = sections(point)
        if len(parts) > 1:
            continue
        ((name, section),) = parts.items()
        if section.pattern == "unstructured" and not section.band:
            key = repr(dataclasses.replace(section, sparsity=0.5))
            found.setdefault((name, key), (section, set()))[1].add(section.sparsity)
    for (name, _), (section, sparsities) in found.items():
        yield Series(name, section, tuple(sorted(sparsities)))
