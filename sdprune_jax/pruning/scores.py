"""From kernels (and statistics of their inputs) to scores: higher means more worth keeping."""

import numpy as np
from jaxtyping import Array, Float


def magnitude(
    kernel: Float[Array | np.ndarray, "*shape"],
) -> Float[Array | np.ndarray, "*shape"]:
    """Absolute value, in float32: half-precision kernels rank exactly as stored."""
    return abs(kernel.astype(np.float32))
