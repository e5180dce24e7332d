"""The Inception v3 whose features FID and KID compare.

It is the network that TensorFlow published on 2015-12-05. Modules have the names of torchvision,
under which its weights went over to PyTorch (`pt_inception-2015-12-05`), but it is not
torchvision's network: average pools leave the padding out, and the last block takes a maximum.

Source: Szegedy et al. 2015 (https://arxiv.org/abs/1512.00567); Heusel et al. 2017, who compare
these features (https://arxiv.org/abs/1706.08500).
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SIZE = 299  # pixels of the height and of the width, in every protocol

# From bytes, as floats in [0, 255], to the input of the network.
NORMALISE: Mapping[str, Callable[[Any], Any]] = {
    # pytorch-fid, and `legacy_pytorch` of clean-fid: 0 becomes -1, and 255 becomes 1.
    "pytorch_fid": lambda x: x / 127.5 - 1,
    # TensorFlow, torch-fidelity, torchmetrics, `clean` of clean-fid: 0 becomes -1, and 128 0.
    "tensorflow": lambda x: (x - 128) / 128,
}

_EPSILON = 1e-3  # of the batch norms


class InceptionV3(nn.Module):
    """Images to the features of the last pool ("pool3"), in float32: float16 overflows.

    Nothing but the last mean depends on the size of the images, which is `SIZE` in every protocol
    and at least 75.
    """

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        x = BasicConv2d(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(images)
        x = BasicConv2d(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = BasicConv2d(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _halved(x)
        x = BasicConv2d(80, name="Conv2d_3b_1x1")(x)
        x = BasicConv2d(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = _halved(x)
        x = InceptionA(32, name="Mixed_5b")(x)
        x = InceptionA(64, name="Mixed_5c")(x)
        x = InceptionA(64, name="Mixed_5d")(x)
        x = InceptionB(name="Mixed_6a")(x)
        x = InceptionC(128, name="Mixed_6b")(x)
        x = InceptionC(160, name="Mixed_6c")(x)
        x = InceptionC(160, name="Mixed_6d")(x)
        x = InceptionC(192, name="Mixed_6e")(x)
        x = InceptionD(name="Mixed_7a")(x)
        x = InceptionE(_average, name="Mixed_7b")(x)
        x = InceptionE(_maximum, name="Mixed_7c")(x)
        return x.mean(axis=(1, 2))


class BasicConv2d(nn.Module):
    """A convolution, a batch norm and a ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c_out"]:
        # Without "highest" a TPU rounds the inputs to bfloat16, and some GPUs to 10 bits.
        precision, strides = jax.lax.Precision.HIGHEST, (self.stride, self.stride)
        x = nn.Conv(
            self.features,
            self.kernel,
            strides,
            self.padding,
            use_bias=False,
            precision=precision,
            kernel_init=nn.initializers.zeros,
            name="conv",
        )(x)
        return nn.relu(StoredBatchNorm(name="bn")(x))


class StoredBatchNorm(nn.Module):
    """A batch norm in inference; its statistics are parameters like any other."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, x.shape[-1:]
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean = self.param("running_mean", zeros, shape)
        variance = self.param("running_var", ones, shape)
        factor = scale * jax.lax.rsqrt(variance + _EPSILON)
        # One product and one sum a value, fused with the ReLU.
        return x * factor[None, None, None] + (bias - mean * factor)[None, None, None]


class InceptionA(nn.Module):
    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c_out"]:
        branches = (
            _convolved(x, ("branch1x1", 64)),
            _convolved(x, ("branch5x5_1", 48), ("branch5x5_2", 64, (5, 5))),
            _convolved(
                x,
                ("branch3x3dbl_1", 64),
                ("branch3x3dbl_2", 96, (3, 3)),
                ("branch3x3dbl_3", 96, (3, 3)),
            ),
            _convolved(_average(x), ("branch_pool", self.pool_features)),
        )
        return jnp.concatenate(branches, axis=-1)


class InceptionB(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c_out"]:
        branches = (
            _convolved(x, ("branch3x3", 384, (3, 3), 2, "VALID")),
            _convolved(
                x,
                ("branch3x3dbl_1", 64),
                ("branch3x3dbl_2", 96, (3, 3)),
                ("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
            ),
            _halved(x),
        )
        return jnp.concatenate(branches, axis=-1)


class InceptionC(nn.Module):
    hidden: int  # channels between the long convolutions

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c_out"]:
        n = self.hidden
        branches = (
            _convolved(x, ("branch1x1", 192)),
            _convolved(
                x,
                ("branch7x7_1", n),
                ("branch7x7_2", n, (1, 7)),
                ("branch7x7_3", 192, (7, 1)),
            ),
            _convolved(
                x,
                ("branch7x7dbl_1", n),
                ("branch7x7dbl_2", n, (7, 1)),
                ("branch7x7dbl_3", n, (1, 7)),
                ("branch7x7dbl_4", n, (7, 1)),
                ("branch7x7dbl_5", 192, (1, 7)),
            ),
            _convolved(_average(x), ("branch_pool", 192)),
        )
        return jnp.concatenate(branches, axis=-1)


class InceptionD(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c_out"]:
        branches = (
            _convolved(x, ("branch3x3_1", 192), ("branch3x3_2", 320, (3, 3), 2, "VALID")),
            _convolved(
                x,
                ("branch7x7x3_1", 192),
                ("branch7x7x3_2", 192, (1, 7)),
                ("branch7x7x3_3", 192, (7, 1)),
                ("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
            ),
            _halved(x),
        )
        return jnp.concatenate(branches, axis=-1)


class InceptionE(nn.Module):
    pool: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c_out"]:
        single = _convolved(x, ("branch3x3_1", 384))
        double = _convolved(x, ("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, (3, 3)))
        branches = (
            _convolved(x, ("branch1x1", 320)),
            _convolved(single, ("branch3x3_2a", 384, (1, 3))),
            _convolved(single, ("branch3x3_2b", 384, (3, 1))),
            _convolved(double, ("branch3x3dbl_3a", 384, (1, 3))),
            _convolved(double, ("branch3x3dbl_3b", 384, (3, 1))),
            _convolved(self.pool(x), ("branch_pool", 192)),
        )
        return jnp.concatenate(branches, axis=-1)


def param_shapes() -> Any:
    """The parameters of `InceptionV3` as `jax.ShapeDtypeStruct`s; nothing is computed."""
    images = jnp.zeros((1, 75, 75, 3))
    init = lambda key: InceptionV3().init(key, images)
    return jax.eval_shape(init, jax.random.key(0))["params"]


def _convolved(x: Float[Array, "b h w c"], *steps: Any) -> Float[Array, "b h_out w_out c_out"]:
    """One branch: the name of each convolution and the attributes of its `BasicConv2d`."""
    for name, *attributes in steps:
        x = BasicConv2d(*attributes, name=name)(x)
    return x


def _halved(x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c"]:
    return nn.max_pool(x, (3, 3), (2, 2))


def _average(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The mean of the positions around each that are in the image, as TensorFlow takes it."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _maximum(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return nn.max_pool(x, (3, 3), padding="SAME")
