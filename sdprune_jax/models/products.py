"""Dense layers, convolutions and attention, each with a form of its own for XLA on a CPU.

There the plain forms, which GPUs and TPUs get, take up to 10 times as long; what it makes of a
whole training, `tools/bench/training.py` says.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

_FEW_POSITIONS = 16  # up to so many, a product is faster than XLA:CPU's convolution


def dense(features: int, **kwargs: Any) -> nn.Dense:
    """A Linen dense layer."""
    return nn.Dense(features, dot_general=_dot_general, **kwargs)


def conv(features: int, size: int, *, stride: int = 1, padding: Any = None, **kwargs: Any):
    """A Linen convolution padded as in PyTorch: by `size // 2` on every side unless told."""
    padding = [(size // 2, size // 2)] * 2 if padding is None else padding
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding,
        conv_general_dilated=_convolve,
        **kwargs,
    )


def attention(
    q: Float[Array, "b n heads d"], k: Float[Array, "b m heads d"], v: Float[Array, "b m heads d"]
) -> Float[Array, "b n heads d"]:
    """Attention by the softmax of the dot products over the root of `d`."""
    return jax.lax.platform_dependent(
        q, k, v, cpu=attention_by_products, default=jax.nn.dot_product_attention
    )


def attention_by_products(
    q: Float[Array, "b n heads d"], k: Float[Array, "b m heads d"], v: Float[Array, "b m heads d"]
) -> Float[Array, "b n heads d"]:
    """Heads beside examples, and the softmax divided out after the values are summed."""
    b, n, heads, d = q.shape
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(b * heads, x.shape[1], d) for x in (q, k, v))
    by_feature = (((2,), (2,)), ((0,), (0,)))
    # The softmax is in float32, as JAX's.
    logits = jax.lax.dot_general(q * d**-0.5, k, by_feature, preferred_element_type=jnp.float32)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    out = (weights.astype(v.dtype) @ v) * (1 / weights.sum(axis=-1, keepdims=True))
    return out.astype(v.dtype).reshape(b, heads, n, d).transpose(0, 2, 1, 3)


def conv_by_product(
    x: Num[Array, "b h w c_in"],
    kernel: Num[Array, "kh kw c_in c_out"],
    stride: int,
    padding: Sequence[tuple[int, int]],
) -> Num[Array, "b h_out w_out c_out"]:
    """A convolution as one matrix product with the shifted copies of its padded input."""
    size, _, c_in, c_out = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    h, w = ((n - size) // stride + 1 for n in x.shape[1:3])
    shifts = [(i, j) for i in range(size) for j in range(size)]
    shifted = [x[:, i : i + stride * h : stride, j : j + stride * w : stride] for i, j in shifts]
    patches = jnp.concatenate(shifted, axis=-1).reshape(-1, size * size * c_in)
    return (patches @ kernel.reshape(-1, c_out)).reshape(x.shape[0], h, w, c_out)


def _dot_general(x: Array, kernel: Array, axes: Any, **kwargs: Any) -> Array:
    """With one leading axis, for which XLA:CPU finds the faster products of the gradients."""

    def direct(x: Array, kernel: Array) -> Array:
        return jax.lax.dot_general(x, kernel, axes, **kwargs)

    def flat(x: Array, kernel: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        out = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **kwargs)
        return out.reshape(*x.shape[:-1], -1)

    if x.ndim == 2:
        return direct(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=flat, default=direct)


def _convolve(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, **kwargs: Any
) -> Array:
    def direct(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)

    out = jax.eval_shape(direct, x, kernel)
    if kernel.shape[0] == 1 or out.shape[1] * out.shape[2] > _FEW_POSITIONS:
        return direct(x, kernel)
    product = lambda x, kernel: conv_by_product(x, kernel, strides[0], padding)
    return jax.lax.platform_dependent(x, kernel, cpu=product, default=direct)
