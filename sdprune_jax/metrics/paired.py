"""Distances between an image and its own reference: same prompt, same noise."""

import numpy as np
from jaxtyping import Float

from sdprune_jax import UserError

_WINDOW = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)  # 11 wide, of standard deviation 1.5
_WINDOW /= _WINDOW.sum()


def psnr(
    got: Float[np.ndarray, "b h w 3"], want: Float[np.ndarray, "b h w 3"]
) -> Float[np.ndarray, " b"]:
    """Peak signal-to-noise ratio of each image, in dB, for images in [-1, 1]."""
    error = np.mean((np.clip(got, -1, 1) - want) ** 2, axis=(1, 2, 3), dtype=np.float64)
    return 10 * np.log10(4 / np.maximum(error, 1e-12))


def ssim(
    got: Float[np.ndarray, "b h w 3"], want: Float[np.ndarray, "b h w 3"]
) -> Float[np.ndarray, " b"]:
    """Structural similarity of each image, at most 1, for images in [-1, 1].

    It is not the same for shifted values: as usual, it is that of the images scaled to [0, 1]. The
    mean is over the channels and over every window that lies within the image.

    Raises:
        ValueError: if an image is smaller than the window.

    Source: Wang et al. 2004, Image Quality Assessment, section III (K1 = 0.01, K2 = 0.03).
    """
    if min(got.shape[1:3]) < len(_WINDOW):
        raise UserError(
            f"SSIM needs images of {len(_WINDOW)} x {len(_WINDOW)} or more, got"
            f" {got.shape[1]} x {got.shape[2]}"
        )
    scaled = zip(*((np.clip(part, -1, 1) + np.float64(1)) / 2 for part in (got, want)), strict=True)
    return np.array([_ssim(x, y) for x, y in scaled])


def mse(
    got: Float[np.ndarray, "b h w c"], want: Float[np.ndarray, "b h w c"]
) -> Float[np.ndarray, " b"]:
    """Mean squared difference of each latent, or of anything else."""
    error = (got.astype(np.float64) - want).reshape(len(got), -1)
    return np.mean(error**2, axis=1)


def _ssim(x: Float[np.ndarray, "h w 3"], y: Float[np.ndarray, "h w 3"]) -> float:
    mean_x, mean_y = _blur(x), _blur(y)
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance, variances = _blur(x * y) - product, _blur(x**2 + y**2) - squares
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return similarity.mean()


def _blur(x: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h_out w_out 3"]:
    for axis in (0, 1):
        length = x.shape[axis] - len(_WINDOW) + 1
        shifted = (np.take(x, range(i, i + length), axis) for i in range(len(_WINDOW)))
        weighted = (weight * part for weight, part in zip(_WINDOW, shifted, strict=True))
        x = sum(weighted, np.zeros(()))
    return x
