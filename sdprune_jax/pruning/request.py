"""What a method asks of the layers in scope: refused before any work if it cannot be."""

import math
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from sdprune_jax import UserError
from sdprune_jax.files import convert
from sdprune_jax.pruning import allocate, patterns
from sdprune_jax.pruning.methods import LEGAL, SOLVERS, Method
from sdprune_jax.scoring import masks


def check(kernels: Mapping[str, Any], method: Method) -> None:
    """Refuses what cannot be done, before any work.

    Args:
        kernels: arrays or `jax.ShapeDtypeStruct`s of the layers in scope.
        method: how they are to be pruned.

    Raises:
        ValueError: naming the fields that clash, the overrides that match no layer, or the layers
            that do not fit the pattern.
    """
    problems = [
        f"{field} is {value!r}, expected one of {legal}"
        for field, legal in LEGAL.items()
        if (value := getattr(method, field)) not in legal
    ]
    if not problems:
        problems = [*_clashes(method), *(_band_problems(method) if method.band else ())]
    own: Mapping[str, float] = {}
    sizes = {path: math.prod(kernel.shape) for path, kernel in kernels.items()}
    try:
        own = own_sparsities(kernels, method)
        if method.pattern == "unstructured":
            allocate.remaining(sizes, method.sparsity, own)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise UserError("pruning is not possible so: " + "; ".join(problems))
    if method.pattern != "unstructured":
        shapes = {convert.torch_key(p): x.shape for p, x in kernels.items() if p not in own}
        patterns.refuse_indivisible(shapes, *n_and_m(method.pattern))


def _clashes(method: Method) -> Iterator[str]:
    """Says which fields do not go together."""
    group, pattern = method.group or "layer", method.pattern
    if method.method in SOLVERS and group != "layer":
        yield f"group={group} has no meaning for {method.method}, which has its own blocks"
    if method.method == "taylor" and group == "normalised":
        yield "group=normalised has no meaning for taylor, whose scores are of one scale"
    rule = (method.method, group, pattern, method.allocation)
    is_plain = rule == ("magnitude", "layer", "unstructured", "uniform")
    if method.threshold == "rz" and not (is_plain and not (method.overrides or method.band)):
        yield "threshold=rz is a rule of uniform layer-wise magnitude only"
    if group not in ("layer", "output") and method.allocation == "owl":
        yield f"allocation=owl gives every layer its own sparsity; group={group} none"
    if group not in ("layer", "output") and method.overrides:
        yield f"overrides give layers their own sparsity; group={group} none"
    if pattern != "unstructured":
        n, m = n_and_m(pattern)
        if method.sparsity != n / m:
            yield f"pattern={pattern} removes {n / m:g}; set sparsity to that"
        if method.allocation != "uniform" or group != "layer":
            yield f"pattern={pattern} leaves nothing to allocate or to compare"


def n_and_m(pattern: str) -> tuple[int, int]:
    n, m = pattern.split(":")
    return int(n), int(m)


def own_sparsities(paths: Iterable[str], method: Method) -> dict[str, float]:
    """The sparsity of each kernel in scope that `method.overrides` single out, by path.

    Raises:
        ValueError: naming the overrides that no layer is left for.
    """
    paths_of = {convert.torch_key(path).removesuffix(".weight"): path for path in paths}
    rules = [(override.layers, override.sparsity) for override in method.overrides or ()]
    return {paths_of[name]: s for name, s in allocate.matched(rules, paths_of).items()}


def num_removed(sizes: Mapping[str, int], method: Method) -> int:
    """How many weights a component is to lose, from the sizes of its layers in scope.

    Ties of `rz` and the rounding of bands may differ, and groups of one output, as Wanda's, lose
    less: every row is rounded down, as by its authors' code, by up to one weight.
    """
    if method.threshold == "rz":
        return sum(allocate.each_floored(sizes, method.sparsity).values())
    if method.pattern == "unstructured" or not method.overrides:
        return masks.num_removed(sum(sizes.values()), method.sparsity)
    own = own_sparsities(sizes, method)
    others = {path: size for path, size in sizes.items() if path not in own}
    alone = sum(masks.num_removed(sizes[path], sparsity) for path, sparsity in own.items())
    return alone + sum(allocate.uniform(others, method.sparsity).values())


def _band_problems(method: Method) -> Iterator[str]:
    """Says what a band clashes with."""
    band = tuple(method.band or ())
    if len(band) != 2 or not 0 <= band[0] < band[1] <= 1 or band[1] - band[0] == 1:
        yield f"band={band} is no (low, high) with 0 <= low < high <= 1, less than all"
    else:
        width = Fraction(str(band[1])) - Fraction(str(band[0]))
        if width != Fraction(str(method.sparsity)):
            yield f"band={band} removes {float(width):g}; set sparsity to that"
    if method.method in SOLVERS:
        yield f"band={band} has no meaning for {method.method}, which has no scores"
    if (method.group or "layer") not in ("layer", "output"):
        yield f"band={band} is of every layer; group={method.group} compares layers"
    if method.pattern != "unstructured" or method.allocation != "uniform" or method.overrides:
        yield f"band={band} is the same in every layer: no pattern, allocation or overrides"
