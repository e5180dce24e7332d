"""The Fréchet distance between Gaussians fitted to features, in float64 on the host."""

import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float

from sdprune_jax import UserError

_BLOCK = 512  # images summed at once; fixed, so that sums do not depend on how they arrive
_MANY = 2048  # images below which published distances are not comparable


class Moments(NamedTuple):
    """What a covariance needs of the images seen so far, about their own mean.

    Sums of products about zero would lose the digits that the mean shares with every feature.
    """

    num: int  # images
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]  # sum over images of (x - mean) (x - mean)^T


class Gaussian(NamedTuple):
    """A normal distribution over features."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


def moments(batches: Iterable[Float[np.ndarray, "_ d"]]) -> Moments:
    """The moments of features that arrive in any batches, as by `features.stream`.

    They have the same bits however the rows are cut into batches.

    Raises:
        ValueError: if there is no image.
    """
    total = None
    for block in _blocks(batches):
        x = block.astype(np.float64)
        mean = x.mean(axis=0)
        x -= mean[None]
        part = Moments(len(x), mean, x.T @ x)
        total = part if total is None else merge(total, part)
    if total is None:
        raise UserError("there is no image to take moments of: give 2 or more")
    return total


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together.

    Source: Chan, Golub and LeVeque 1979, Updating Formulae and a Pairwise Algorithm for Computing
        Sample Variances, equation 2.1.
    """
    num = a.num + b.num
    delta = b.mean - a.mean
    between = np.outer(delta, delta * (a.num * b.num / num))
    return Moments(num, a.mean + delta * (b.num / num), a.scatter + b.scatter + between)


def gaussian(found: Moments) -> Gaussian:
    """The Gaussian with the mean and the unbiased covariance of a set of images.

    Warns below 2,048 images, the number of features of the usual network.

    Raises:
        ValueError: if there are fewer than 2 images, or a moment is not finite.
    """
    size = len(found.mean)
    if found.num < 2:
        raise UserError(f"{found.num} images have no covariance: give 2 or more")
    if not (np.isfinite(found.mean).all() and np.isfinite(found.scatter).all()):
        raise UserError(f"the moments of {found.num} images are not finite: check their features")
    if found.num < _MANY:
        singular = f"; their covariance of {size} features has not full rank"
        logging.warning(
            "%d images bias a Fréchet distance upwards%s: use %d or more, and compare only with"
            " distances from as many",
            found.num,
            singular if found.num <= size else "",
            _MANY,
        )
    return Gaussian(found.mean, found.scatter / (found.num - 1))


def read_gaussian(path: str | os.PathLike[str], num_features: int) -> Gaussian:
    """Reference statistics from a `.npz` with `mu` and `sigma`, as pytorch-fid and clean-fid write.

    Args:
        path: a `.npz` file.
        num_features: that it must be of.

    Raises:
        ValueError: naming everything that is wrong with the file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no reference statistics at {path}: give a .npz with mu and sigma")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("mu", "sigma") if name in arrays}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no .npz of plain arrays mu and sigma: {error}") from error
    problems, shapes = [], {"mu": (num_features,), "sigma": (num_features, num_features)}
    for name, shape in shapes.items():
        if name not in found:
            problems.append(f"{name} is missing")
        elif found[name].dtype.kind != "f":
            problems.append(f"{name} is {found[name].dtype}, expected floats")
        elif found[name].shape != shape:
            problems.append(f"{name} has shape {found[name].shape}, expected {shape}")
        elif not np.isfinite(found[name]).all():
            problems.append(f"{name} is not finite")
        elif name == "sigma" and not np.allclose(
            found[name], found[name].T, rtol=0, atol=1e-6 * np.abs(found[name]).max()
        ):
            problems.append("sigma is not symmetric")
    if problems:
        raise UserError(f"{path} holds no statistics of features: " + "; ".join(problems))
    mean, covariance = (found[name].astype(np.float64) for name in ("mu", "sigma"))
    return Gaussian(mean, (covariance + covariance.T) / 2)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """`|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`; tiny negatives are 0.

    The last trace is the sum of the singular values of `S_a^(1/2) S_b^(1/2)`. The square root of a
    product, or eigenvalues of it, would turn the rounding of zero eigenvalues into its square root.

    Raises:
        ValueError: if the numbers of features differ.

    Source: Dowson and Landau 1982; FID in Heusel et al. 2017 (https://arxiv.org/abs/1706.08500).
    """
    if len(a.mean) != len(b.mean):
        raise UserError(
            f"cannot compare {len(a.mean)} features with {len(b.mean)}: they are of two networks"
        )
    shared = np.linalg.svd(factor(a) @ factor(b).T, compute_uv=False).sum()
    apart = np.sum((a.mean - b.mean) ** 2)
    return max(float(apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared), 0.0)


def factor(fitted: Gaussian) -> Float[np.ndarray, "r d"]:
    """`F` with `F^T F` the covariance, and as many rows as that has rank."""
    values, vectors = np.linalg.eigh(fitted.covariance)
    noise = max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    kept = values > noise
    return np.sqrt(values[kept])[:, None] * vectors[:, kept].T


def _blocks(
    batches: Iterable[Float[np.ndarray, "_ d"]],
) -> Iterator[Float[np.ndarray, "_ d"]]:
    """The same rows in blocks of one size, but for the last."""
    held, num_held = [], 0
    for batch in batches:
        start = 0
        while start < len(batch):
            part = batch[start : start + _BLOCK - num_held]
            held.append(part)
            num_held += len(part)
            start += len(part)
            if num_held == _BLOCK:
                yield np.concatenate(held)
                held, num_held = [], 0
    if held:
        yield np.concatenate(held)
