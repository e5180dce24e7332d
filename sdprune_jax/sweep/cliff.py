"""Where quality breaks as sparsity grows.

A figure has gone a share of the way from what the dense model gets, 0, to what chance gets, 1. The
model is broken where that share is above a limit, and the cliff is the lowest sparsity at which it
is. Agreement of picture and prompt is one such figure, with the texts of other prompts as chance;
the distance to the dense model's latents under the same noise is another, with the distance of
their mean as chance: the best guess that knows neither prompt nor noise.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sdprune_jax import UserError


class NoBreakError(ValueError):
    """There is no cliff to find."""


class Cliff(NamedTuple):
    """The cliff lies in (whole, broken]."""

    whole: float  # the highest sparsity below the cliff that was tried
    broken: float  # the lowest above it


def way_to_chance(value: float, dense: float, chance: float, *, higher_is_better: bool) -> float:
    """How far a figure has gone from the dense model's to chance's: 0 to 1, or beyond.

    Raises:
        NoBreakError: if the dense model does no better than chance.
        ValueError: if a figure is not finite.
    """
    if not all(map(math.isfinite, (value, dense, chance))):
        raise UserError(f"figures are not finite: {value}, dense {dense}, by chance {chance}")
    if dense == chance or (dense > chance) != higher_is_better:
        raise NoBreakError(
            f"the dense model gets {dense:g} and chance {chance:g}: there is no quality to lose;"
            " give more prompts, or a better model"
        )
    return (value - dense) / (chance - dense)


def bracket(shares: Mapping[float, float], limit: float) -> tuple[float, float | None]:
    """The neighbours among the sparsities tried between which the first break lies.

    Args:
        shares: how much of the way to chance is gone, by sparsity; at least one is whole.
        limit: a share above it is broken.

    Returns:
        The last whole sparsity before the first broken one, and that one; None if all are whole.

    Raises:
        NoBreakError: if the lowest sparsity is broken.
    """
    tried = sorted(shares)
    for i, sparsity in enumerate(tried):
        if shares[sparsity] > limit:
            if i == 0:
                raise NoBreakError(f"the lowest sparsity, {sparsity:g}, is broken: try lower ones")
            return tried[i - 1], sparsity
    return tried[-1], None


def bisect(
    evaluate: Callable[[float], float],
    low: float,
    high: float,
    tolerance: float,
    limit: float = 0.5,
) -> Cliff:
    """Halves a bracket until it is as narrow as asked for.

    Shares need not grow with sparsity: whatever lies between, one end of the result is whole and
    the other broken. If they cross the limit more than once, it is one of the crossings.

    Args:
        evaluate: from a sparsity to its share of the way to chance. Both ends are evaluated.
        low: a sparsity that is whole.
        high: a sparsity that is broken, above `low`.
        tolerance: the widest bracket that may be returned, in sparsity.
        limit: a share above it is broken.

    Raises:
        NoBreakError: if `low` is broken, or `high` is whole.
        ValueError: if a share is no number, or the bracket or the tolerance is none.
    """
    if not low < high:
        raise UserError(f"no bracket: low is {low:g} and high is {high:g}, expected low < high")
    if not tolerance > 0:
        raise UserError(f"tolerance is {tolerance:g}, expected more than 0")

    def is_broken(sparsity: float) -> bool:
        share = evaluate(sparsity)
        if math.isnan(share):
            raise UserError(f"quality at sparsity {sparsity:g} is no number")
        return share > limit

    ends = {low: is_broken(low), high: is_broken(high)}
    if ends[low] or not ends[high]:
        state = "is broken already" if ends[low] else "is whole still"
        raise NoBreakError(
            f"no break between sparsity {low:g} and {high:g}:"
            f" {low if ends[low] else high:g} {state}; give a lower low or a higher high"
        )
    while high - low > tolerance:
        # Short decimals: a sparsity is read as the decimal that it is written as.
        middle = round((low + high) / 2, 6)
        if not low < middle < high:
            break
        low, high = (low, middle) if is_broken(middle) else (middle, high)
    return Cliff(low, high)


def spread(latents: Iterable[Float[np.ndarray, "_ h w c"]]) -> float:
    """The mean squared difference of latents to the mean of all, without bias.

    Args:
        latents: in batches, two or more together.
    """
    num, total, squares = 0, np.zeros(()), np.zeros(())
    for batch in latents:
        x = batch.astype(np.float64)
        num, total, squares = num + len(x), total + x.sum(0), squares + np.square(x).sum(0)
    assert num > 1
    return float(np.mean((squares - total**2 / num) / (num - 1)))
