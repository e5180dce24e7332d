"""Layers that two models share. Their submodules carry the diffusers names."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sdprune_jax.models.products import attention, conv, dense

# Site name -> [b, units]: 1 keeps a unit, 0 removes it, values between scale it.
Gates = Mapping[str, Float[Array, "b units"]]

# Where the width gates multiply. "post_norm": what a site hands on, so that a gate of 0 equals its
# removal and one between scales it. "pre_norm": what enters it, as in the released code of APTP:
# a ResNet's channels before its second norm (which undoes any gate above 0.02, and lets its bias
# through one of 0), queries, keys and values (so that logits have the square of the gate), and both
# halves of GEGLU.
GATE_POSITIONS = ("post_norm", "pre_norm")


def site_name(module: nn.Module) -> str:
    """The dotted path of a bound module, which names the prunable site that it holds."""
    return ".".join(module.path)


def gated(
    x: Float[Array, "b *middle c"], gate: Float[Array, "b units"] | None
) -> Float[Array, "b *middle c"]:
    """Scales each run of `c / units` consecutive channels by the gate of its unit."""
    if gate is None:
        return x
    channels = jnp.repeat(gate, x.shape[-1] // gate.shape[-1], axis=-1).astype(x.dtype)
    return x * channels.reshape(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])


def depth_gated(
    identity: Float[Array, "b *middle c"],
    x: Float[Array, "b *middle c"],
    gate: Float[Array, "b 1"] | None,
) -> Float[Array, "b *middle c"]:
    """`x` where the gate is 1, `identity` where it is 0, and a blend between.

    Source: APTP's depth gates (https://arxiv.org/abs/2406.12042).
    """
    if gate is None:
        return x
    gate = gate.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return (1 - gate) * identity + gate * x


class GroupNorm(nn.Module):
    """Linen's, but sums over positions first and then over the channels of a group.

    XLA on a CPU does that 3 times faster, forward and backward. Statistics are float32.
    """

    groups: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))

        def mean(y: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
            groups = y.mean(axis=(1, 2)).reshape(x.shape[0], self.groups, -1).mean(axis=-1)
            return jnp.repeat(groups, x.shape[-1] // self.groups, axis=-1)[:, None, None]

        x = x.astype(jnp.float32)
        centred = x - mean(x)
        scale, bias = scale[None, None, None], bias[None, None, None]
        factor = jax.lax.rsqrt(mean(centred**2) + self.epsilon) * scale
        return (centred * factor + bias).astype(self.dtype)


def layer_norm(epsilon: float, dtype: Any, name: str) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, loses digits that PyTorch keeps.
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact GELU, as PyTorch's default; by `erf`, which costs a CPU half of JAX's `erfc`."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x * sigmoid(1.702 x)`, of OpenAI's CLIP."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {"gelu": gelu, "quick_gelu": quick_gelu}


def timestep_embedding(
    timestep: Int[Array, " b"], dim: int, flip_sin_to_cos: bool = True, freq_shift: int = 0
) -> Float[Array, "b dim"]:
    """Sines and cosines of `timestep` (0 to 999) at `dim / 2` frequencies from 1 to 1e-4."""
    half = dim // 2
    exponent = -math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angle = timestep.astype(jnp.float32)[:, None] * jnp.exp(exponent)[None]
    parts = (
        (jnp.cos(angle), jnp.sin(angle)) if flip_sin_to_cos else (jnp.sin(angle), jnp.cos(angle))
    )
    return jnp.concatenate(parts, axis=-1)


class Attention(nn.Module):
    """Multi-head attention of `x` to `context`, or to itself.

    Attributes:
        features: channels of the output.
        heads: heads that are left, at most `features / head_dim`.
        head_dim: channels of one head.
        qkv_bias: whether `to_q`, `to_k` and `to_v` have biases.
        upcast: compute the logits and the softmax from float32 queries and keys.
        dtype: dtype of the computation; parameters are float32.
        gate_position: one of `GATE_POSITIONS`.
    """

    features: int
    heads: int
    head_dim: int
    qkv_bias: bool = False
    upcast: bool = False
    dtype: Any = jnp.float32
    gate_position: str = "post_norm"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        context: Float[Array, "b m c_context"] | None = None,
        gate: Float[Array, "b units"] | None = None,
    ) -> Float[Array, "b n c_out"]:
        context = x if context is None else context
        inner = self.heads * self.head_dim
        before, after = (None, gate) if self.gate_position == "post_norm" else (gate, None)

        def project(name: str, y: Array) -> Array:
            y = dense(inner, use_bias=self.qkv_bias, dtype=self.dtype, name=name)(y)
            y = gated(y, before)
            y = y.reshape(*y.shape[:2], self.heads, self.head_dim)
            return y.astype(jnp.float32) if self.upcast else y

        q, k, v = project("to_q", x), project("to_k", context), project("to_v", context)
        out = attention(q, k, v).reshape(*x.shape[:2], inner)
        out = gated(out.astype(self.dtype), after)
        return dense(self.features, dtype=self.dtype, name="to_out.0")(out)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a skip connection.

    Attributes:
        out_channels: channels of the output, which is the residual stream: never pruned.
        hidden_channels: channels between the convolutions: fewer than `out_channels` once pruned.
        groups: groups of the first norm.
        hidden_groups: groups of the second norm, which are the units of the site.
        epsilon: added to the variance in both norms.
        dtype: dtype of the computation; parameters are float32.
        gate_position: one of `GATE_POSITIONS`.
    """

    out_channels: int
    hidden_channels: int
    groups: int
    hidden_groups: int
    epsilon: float
    dtype: Any = jnp.float32
    gate_position: str = "post_norm"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c_in"],
        temb: Float[Array, "b t"] | None = None,
        gate: Float[Array, "b units"] | None = None,
    ) -> Float[Array, "b h w c_out"]:
        h = nn.silu(GroupNorm(self.groups, self.epsilon, self.dtype, name="norm1")(x))
        h = conv(self.hidden_channels, 3, dtype=self.dtype, name="conv1")(h)
        if temb is not None:
            project = dense(self.hidden_channels, dtype=self.dtype, name="time_emb_proj")
            h += project(nn.silu(temb))[:, None, None]
        before, after = (None, gate) if self.gate_position == "post_norm" else (gate, None)
        h = gated(h, before)
        h = nn.silu(GroupNorm(self.hidden_groups, self.epsilon, self.dtype, name="norm2")(h))
        h = gated(h, after)
        h = conv(self.out_channels, 3, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.out_channels:
            x = conv(self.out_channels, 1, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Repeats every position twice along both axes (nearest neighbour)."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)
