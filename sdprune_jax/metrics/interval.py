"""Bootstrap intervals: where a figure would fall, had other images been drawn."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sdprune_jax import UserError
from sdprune_jax.metrics import frechet


class Interval(NamedTuple):
    low: float
    high: float


def of_mean(
    values: Float[np.ndarray, " n"],
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The percentile interval of the mean of one value an image.

    For a difference of two models give the differences image by image: prompts are the same, so
    most of what varies cancels.

    Args:
        values: one value an image.
        num_resamples: sets of n images drawn from the n with replacement.
        level: chance to hold the true mean.
        seed: draws the resamples.

    Raises:
        ValueError: if there are fewer than 2 values, one is not finite, or `level` no chance.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    _check(values, num_resamples, level)
    counts = _counts(len(values), num_resamples, seed)
    means = np.array([count @ values.astype(np.float64) for count in counts]) / len(values)
    low, high = np.quantile(means, _tails(level))
    return Interval(float(low), float(high))


def of_frechet_distance(
    features: Float[np.ndarray, "n d"],
    reference: frechet.Gaussian,
    *,
    num_resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The interval of the distance that sets of n images have on average to a fixed reference.

    The distance of a sample is above that of its distribution by about a constant over n (Chong and
    Forsyth 2020, https://arxiv.org/abs/1911.07023), and resamples add the like once more: their
    percentiles lie too high, and may leave out the distance itself. So the interval takes the
    distance of `features` and the spread of the resamples about their own mean. On normal features
    it holds the average as often as it should from n of 15 d on, and too often below: resamples
    spread more. It says nothing of what n itself adds: compare distances from equal n only.

    Args:
        features: one row an image.
        reference: as `frechet.frechet_distance` takes it.
        num_resamples: sets of n images drawn from the n with replacement; each costs a Gram matrix
            and its eigenvalues.
        level: chance to hold the average distance.
        seed: draws the resamples.

    Raises:
        ValueError: as `of_mean`.

    Source: the basic interval of Davison and Hinkley 1997, Bootstrap Methods and their Application,
        section 5.2, with the resamples shifted to have no bias.
    """
    _check(features, num_resamples, level)
    num, root = len(features), frechet.factor(reference)
    x = features.astype(np.float64) - reference.mean[None]
    middle = x.mean(axis=0)
    projected, lengths = (x - middle[None]) @ root.T, np.sum((x - middle[None]) ** 2, axis=1)

    def distance(count: Int[np.ndarray, " n"]) -> float:
        offset = count @ (x - middle[None]) / num  # of the resample's mean
        spread = (count @ lengths - num * offset @ offset) / (num - 1)  # trace of its covariance
        mean = root @ offset
        gram = (projected * count[:, None]).T @ projected - num * np.outer(mean, mean)
        shared = np.sqrt(np.linalg.eigvalsh(gram / (num - 1)).clip(0)).sum()
        return np.sum((middle + offset) ** 2) + spread + np.trace(reference.covariance) - 2 * shared

    own = distance(np.ones(num, np.int64))
    drawn = np.array([distance(count) for count in _counts(num, num_resamples, seed)])
    high, low = own - (np.quantile(drawn, _tails(level)) - drawn.mean())
    return Interval(max(float(low), 0.0), float(high))


def _check(values: Float[np.ndarray, "n ..."], num_resamples: int, level: float) -> None:
    problems = []
    if len(values) < 2:
        problems.append(f"{len(values)} images, expected 2 or more")
    if not np.isfinite(values).all():
        problems.append("a value that is not finite")
    if num_resamples < 1:
        problems.append(f"num_resamples={num_resamples}, expected 1 or more")
    if not 0 < level < 1:
        problems.append(f"level={level}, expected a chance in (0, 1)")
    if problems:
        raise UserError("cannot bootstrap: " + "; ".join(problems))


def _tails(level: float) -> list[float]:
    return [(1 - level) / 2, (1 + level) / 2]


def _counts(num: int, num_resamples: int, seed: int) -> Iterator[Int[np.ndarray, " n"]]:
    """How often each of `num` images is drawn, for one resample after another."""
    rng = np.random.default_rng(seed)
    for _ in range(num_resamples):
        yield np.bincount(rng.integers(num, size=num), minlength=num)
