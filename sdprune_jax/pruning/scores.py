"""From kernels (and what calibration saw) to scores: higher means more worth keeping.

Scores are float32 and not negative, and that of a weight which is zero already is zero: whatever
the criterion, pruning what is pruned starts from the zeros that are there. Host arrays are scored
on the host, device arrays where they are.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key


def random(
    key: Key[Array, ""], name: str, kernel: Float[Array | np.ndarray, "*shape"]
) -> Float[Array, "*shape"]:
    """Independent and uniform in (0, 1] for each layer, the same on any number of devices."""
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))  # the same in every process
    drawn = 1 - jax.random.uniform(key, kernel.shape)
    return jnp.where(jnp.asarray(kernel) == 0, 0, drawn)


def magnitude(
    kernel: Float[Array | np.ndarray, "*shape"],
) -> Float[Array | np.ndarray, "*shape"]:
    """Absolute value, in float32: half-precision kernels rank exactly as stored."""
    return abs(kernel.astype(np.float32))


def normalised(kernel: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Magnitude in units of the layer's Euclidean norm, to compare layers of unlike scale.

    The norm is summed in float64 on the host, so that it does not depend on the devices.

    Source: the default of JaxPruner's global magnitude pruning (https://arxiv.org/abs/2304.14082).
    """
    score = np.asarray(magnitude(kernel))
    norm = np.sqrt(np.sum(np.square(score), dtype=np.float64))
    return score / np.float32(norm or 1)  # an all-zero layer scores zero


def wanda(
    kernel: Float[Array | np.ndarray, "*ins n_out"],
    second_moment: Float[Array | np.ndarray, " n_in"],
) -> Float[Array | np.ndarray, "*ins n_out"]:
    """Magnitude times the root of the second moment of the weight's input.

    Args:
        kernel: in Flax's layout, `[in, out]` or `[kh, kw, in, out]`.
        second_moment: mean square of every input, finite; those of a convolution in the order
            (kh, kw, in). A common factor changes no mask within a layer, but does where layers
            are compared: the published one is the number of samples, not of tokens.

    Source: Wanda (https://arxiv.org/abs/2306.11695), equation 1.
    """
    xp = kernel.__array_namespace__()  # numpy or jax.numpy
    norm = xp.sqrt(xp.asarray(second_moment).astype(np.float32))
    return magnitude(kernel) * norm.reshape(*kernel.shape[:-1], 1)


def taylor(
    kernel: Float[Array | np.ndarray, "*shape"], gradient: Float[Array | np.ndarray, "*shape"]
) -> Float[Array | np.ndarray, "*shape"]:
    """First-order change of the loss when the weight is removed, without its sign.

    The gradient is summed over timesteps before, with its sign.

    Source: Diff-Pruning (https://arxiv.org/abs/2305.10924), a weight at a time.
    """
    return abs(kernel.astype(np.float32) * gradient.astype(np.float32))
