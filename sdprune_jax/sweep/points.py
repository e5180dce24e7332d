"""Points of a sweep: what they are called, how sparse they are, which differ in sparsity alone."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from sdprune_jax import sites
from sdprune_jax.files import convert
from sdprune_jax.pruning import request
from sdprune_jax.pruning.methods import Magnitude, Method

COMPONENTS = ("text_encoder", "unet")  # that a point may prune; shares are of both together


@dataclasses.dataclass(frozen=True)
class Point:
    """One configuration of a sweep; a component without a method stays dense."""

    text_encoder: Method | None = None
    unet: Method | None = None


class Sparsity(NamedTuple):
    """How sparse the text encoder and the UNet are together, whether or not both are pruned.

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
    method: Method  # its sparsity is replaced by each of `sparsities`
    sparsities: tuple[float, ...]  # ascending

    def point(self, sparsity: float) -> Point:
        return Point(**{self.component: dataclasses.replace(self.method, sparsity=sparsity)})


def methods(point: Point) -> dict[str, Method]:
    """The method of each component that is pruned."""
    return {name: part for name in COMPONENTS if (part := getattr(point, name)) is not None}


def label(method: Method) -> str:
    """A name of all that is not the sparsity, as short as the defaults allow."""
    plain = Magnitude()
    parts = [method.method if method.allocation == "uniform" else f"owl-{method.method}"]
    for name in ("scope", "group", "pattern", "threshold", "owl_multiple", "owl_lambda", "damping"):
        value = getattr(method, name)
        if value != getattr(plain, name):
            is_number = isinstance(value, int | float)
            parts.append(f"{name.removeprefix('owl_')} {value:g}" if is_number else value)
    if method.band:
        parts.append("band {:g} to {:g}".format(*method.band))
    parts += [f"{own.layers} at {own.sparsity:g}" for own in method.overrides or ()]
    return ", ".join(parts)


def expected(point: Point, shapes: Mapping[str, Any]) -> Sparsity:
    """The sparsity of a point before it is pruned; ties and rounding may add to it or take away.

    Args:
        point: configuration that has not been pruned yet.
        shapes: parameters or `jax.ShapeDtypeStruct`s of each component.
    """
    zeros = 0
    for name, method in methods(point).items():
        flat = convert.flatten(shapes[name])
        sizes = {p: flat[p].size for p in sites.prunable(shapes[name], name, method.scope)}
        zeros += request.num_removed(sizes, method)
    return sparsity(point, shapes, zeros)


def sparsity(point: Point, shapes: Mapping[str, Any], zeros: int) -> Sparsity:
    """The sparsity of a point with as many zeros."""
    counts = {name: sum(x.size for x in jax.tree.leaves(shapes[name])) for name in COMPONENTS}
    total = sum(counts.values())
    removed = sum(method.sparsity * counts[name] for name, method in methods(point).items())
    return Sparsity(removed / total, zeros / total, zeros)


def series(points: Iterable[Point]) -> Iterator[Series]:
    """Those among points that can be bisected, in order: a pattern or a band has one sparsity."""
    groups: dict[tuple[str, str], tuple[Method, set[float]]] = {}
    for point in points:
        parts = methods(point)
        if len(parts) > 1:
            continue
        ((name, method),) = parts.items()
        if method.pattern == "unstructured" and not method.band:
            key = repr(dataclasses.replace(method, sparsity=0.5))
            groups.setdefault((name, key), (method, set()))[1].add(method.sparsity)
    for (name, _), (method, sparsities) in groups.items():
        yield Series(name, method, tuple(sorted(sparsities)))
