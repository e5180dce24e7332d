"""From kernels (and statistics of their inputs) to scores: higher means more worth keeping."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def magnitude(kernel: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Absolute value, in float32: half-precision kernels rank exactly as stored."""
    return jnp.abs(kernel.astype(jnp.float32))
