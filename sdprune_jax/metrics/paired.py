"""Distances between an image and its own reference: same prompt, same noise."""

import numpy as np
from jaxtyping import Float


def psnr(
    got: Float[np.ndarray, "b h w 3"], want: Float[np.ndarray, "b h w 3"]
) -> Float[np.ndarray, " b"]:
    """Peak signal-to-noise ratio of each image, in dB, for images in [-1, 1]."""
    error = np.mean((np.clip(got, -1, 1) - want) ** 2, axis=(1, 2, 3), dtype=np.float64)
    return 10 * np.log10(4 / np.maximum(error, 1e-12))
