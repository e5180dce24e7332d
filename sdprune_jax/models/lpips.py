"""LPIPS: how different two images look, by features of AlexNet that people's judgements weigh.

Modules have the names of torchvision's AlexNet and of the linear layers of the `lpips` package.

Source: Zhang et al. 2018 (https://arxiv.org/abs/1801.03924), version 0.1, network "alex".
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdprune_jax import UserError

MIN_SIZE = 31  # pixels of the height and of the width: with fewer the second pool has no window

# Mean and standard deviation of the photographs of ImageNet, scaled from [0, 1] to [-1, 1].
_MEAN, _DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10  # added to the length of a feature, which may be 0
# Place in AlexNet, channels, edge of the kernel, stride and padding of each convolution.
_CONVOLUTIONS = (
    (0, 64, 11, 4, 2),
    (3, 192, 5, 1, 2),
    (6, 384, 3, 1, 1),
    (8, 256, 3, 1, 1),
    (10, 256, 3, 1, 1),
)
_POOLED = (3, 6)  # a maximum goes before these


class LPIPS(nn.Module):
    """The distance of each image to its reference; 0 is the same image."""

    @nn.compact
    def __call__(
        self, got: Float[Array, "b h w 3"], want: Float[Array, "b h w 3"]
    ) -> Float[Array, " b"]:
        """Compares images in [-1, 1], in float32.

        Raises:
            ValueError: if an image is smaller than `MIN_SIZE`.
        """
        height, width = got.shape[1:3]
        if min(height, width) < MIN_SIZE:
            raise UserError(
                f"LPIPS needs images of {MIN_SIZE} x {MIN_SIZE} or more, got {height} x {width}:"
                " generate larger ones, or leave LPIPS out"
            )
        # Without "highest" a TPU rounds the inputs to bfloat16, and some GPUs to 10 bits.
        precision, distance = jax.lax.Precision.HIGHEST, jnp.zeros(len(got))
        mean, deviation = (jnp.array(x)[None, None, None] for x in (_MEAN, _DEVIATION))
        x = (jnp.concatenate([got, want]) - mean) / deviation
        for i, (place, channels, edge, stride, padding) in enumerate(_CONVOLUTIONS):
            convolved = nn.Conv(
                channels,
                (edge, edge),
                (stride, stride),
                padding,
                precision=precision,
                kernel_init=nn.initializers.zeros,
                name=f"features.{place}",
            )
            weighted = nn.Conv(
                1,
                (1, 1),
                use_bias=False,
                precision=precision,
                kernel_init=nn.initializers.zeros,
                name=f"lin{i}.model.1",
            )
            if place in _POOLED:
                x = nn.max_pool(x, (3, 3), (2, 2))
            x = nn.relu(convolved(x))
            unit = x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + _EPSILON)
            apart = unit[: len(got)] - unit[len(got) :]
            # The mean over the image goes first, which is the same, and cheaper.
            distance += weighted((apart**2).mean(axis=(1, 2), keepdims=True))[:, 0, 0, 0]
        return distance


def param_shapes() -> Any:
    """The parameters of `LPIPS` as `jax.ShapeDtypeStruct`s; nothing is computed."""
    images = jnp.zeros((1, MIN_SIZE, MIN_SIZE, 3))
    init = lambda key: LPIPS().init(key, images, images)
    return jax.eval_shape(init, jax.random.key(0))["params"]
