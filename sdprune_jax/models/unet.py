"""The UNet of Stable Diffusion 2, with optional gates on every prunable site."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sdprune_jax.models.layers import (
    GATE_POSITIONS,
    Attention,
    Gates,
    GroupNorm,
    ResnetBlock,
    depth_gated,
    gated,
    gelu,
    layer_norm,
    site_name,
    timestep_embedding,
    upsample,
)
from sdprune_jax.models.products import conv, dense
from sdprune_jax.models.unet_config import FF_UNITS, UNetConfig


def depth_site(block: str) -> str:
    """The site of the depth gate on the whole of `block`."""
    return f"{block}.depth"


class FeedForward(nn.Module):
    """GEGLU feed-forward network; its units are runs of neurons."""

    features: int
    neurons: int
    dtype: Any
    gate_position: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], gate: Float[Array, "b units"] | None = None
    ) -> Float[Array, "b n c"]:
        both = dense(2 * self.neurons, dtype=self.dtype, name="net.0.proj")(x)
        value, scale = jnp.split(both, 2, axis=-1)
        if self.gate_position == "pre_norm":
            value, scale, gate = gated(value, gate), gated(scale, gate), None
        h = gated(value * gelu(scale), gate)
        return dense(self.features, dtype=self.dtype, name="net.2")(h)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each a site."""

    config: UNetConfig
    features: int
    heads: int
    dtype: Any
    gate_position: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], text: Float[Array, "b m d"], gates: Gates
    ) -> Float[Array, "b n c"]:
        path = site_name(self)

        def attention(name: str) -> Attention:
            heads = self.config.units(f"{path}.{name}", self.heads)
            head_dim = self.features // self.heads
            upcast = self.config.upcast_attention
            return Attention(
                self.features,
                heads,
                head_dim,
                False,
                upcast,
                self.dtype,
                self.gate_position,
                name=name,
            )

        def norm(name: str, x: Array) -> Array:
            return layer_norm(1e-5, self.dtype, name)(x)

        units = self.config.units(f"{path}.ff", FF_UNITS)
        neurons = units * 4 * self.features // FF_UNITS
        x += attention("attn1")(norm("norm1", x), None, gates.get(f"{path}.attn1"))
        x += attention("attn2")(norm("norm2", x), text, gates.get(f"{path}.attn2"))
        ff = FeedForward(self.features, neurons, self.dtype, self.gate_position, name="ff")
        return x + ff(norm("norm3", x), gates.get(f"{path}.ff"))


class Transformer(nn.Module):
    """One transformer block over the positions of an image."""

    config: UNetConfig
    features: int
    heads: int
    dtype: Any
    gate_position: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], text: Float[Array, "b m d"], gates: Gates
    ) -> Float[Array, "b h w c"]:
        site = depth_site(site_name(self))
        if self.config.units(site, 1) == 0:
            return x
        h = GroupNorm(self.config.norm_num_groups, 1e-6, self.dtype, name="norm")(x)
        h = h.reshape(x.shape[0], -1, self.features)
        h = dense(self.features, dtype=self.dtype, name="proj_in")(h)
        block = TransformerBlock(
            self.config,
            self.features,
            self.heads,
            self.dtype,
            self.gate_position,
            name="transformer_blocks.0",
        )
        h = block(h, text, gates)
        h = dense(self.features, dtype=self.dtype, name="proj_out")(h).reshape(x.shape)
        return depth_gated(x, x + h, gates.get(site))


class Resnet(nn.Module):
    """A residual block as a site, of width and of depth.

    Attributes:
        identity_channels: leading channels of the input that stand in for a removed block.
    """

    config: UNetConfig
    features: int
    identity_channels: int
    dtype: Any
    gate_position: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c_in"], temb: Float[Array, "b t"], gates: Gates
    ) -> Float[Array, "b h w c"]:
        path, config = site_name(self), self.config
        identity = x[..., : self.identity_channels]
        if config.units(depth_site(path), 1) == 0:
            return identity
        units = config.units(path, config.norm_num_groups)
        block = ResnetBlock(
            out_channels=self.features,
            hidden_channels=units * (self.features // config.norm_num_groups),
            groups=config.norm_num_groups,
            hidden_groups=units,
            epsilon=config.norm_eps,
            dtype=self.dtype,
            gate_position=self.gate_position,
        )
        nn.share_scope(self, block)  # its parameters are named as if they were this module's
        h = block(x, temb, gates.get(path))
        gate = gates.get(depth_site(path))
        return h if gate is None else depth_gated(identity, h, gate)


@dataclasses.dataclass(frozen=True)
class Compute:
    """How all blocks compute; see `UNet` for the fields."""

    dtype: Any
    remat: bool
    gate_position: str


class Stage(nn.Module):
    """ResNets of one resolution, each followed by a transformer where the level has them.

    The down, middle and up blocks of diffusers differ only in what their ResNets are fed.
    """

    config: UNetConfig
    level: int
    has_attention: bool
    num_resnets: int
    compute: Compute

    def layers(self, index: int, identity_channels: int) -> tuple[nn.Module, nn.Module | None]:
        features = self.config.block_out_channels[self.level]
        heads = self.config.attention_head_dim[self.level]
        dtype, remat, gate_position = dataclasses.astuple(self.compute)
        resnet_cls = nn.remat(Resnet) if remat else Resnet
        transformer_cls = nn.remat(Transformer) if remat else Transformer
        own = (self.config, features, identity_channels, dtype, gate_position)
        resnet = resnet_cls(*own, name=f"resnets.{index}")
        if not self.has_attention:
            return resnet, None
        own = (self.config, features, heads, dtype, gate_position)
        return resnet, transformer_cls(*own, name=f"attentions.{index}")


class DownBlock(Stage):
    """Returns its output and every intermediate one, for the skip connections."""

    downsample: bool = True

    @nn.compact
    def __call__(
        self, x: Array, temb: Array, text: Array, gates: Gates
    ) -> tuple[Array, list[Array]]:
        skips = []
        for index in range(self.num_resnets):
            resnet, transformer = self.layers(index, x.shape[-1])
            x = resnet(x, temb, gates)
            x = transformer(x, text, gates) if transformer else x
            skips.append(x)
        if self.downsample:
            x = conv(
                x.shape[-1], 3, stride=2, dtype=self.compute.dtype, name="downsamplers.0.conv"
            )(x)
            skips.append(x)
        return x, skips


class MidBlock(Stage):
    @nn.compact
    def __call__(self, x: Array, temb: Array, text: Array, gates: Gates) -> Array:
        resnet, transformer = self.layers(0, x.shape[-1])
        last, _ = self.layers(1, x.shape[-1])
        x = resnet(x, temb, gates)
        assert transformer is not None
        return last(transformer(x, text, gates), temb, gates)


class UpBlock(Stage):
    """Takes one skip connection a ResNet, the latest first."""

    upsample: bool = True

    @nn.compact
    def __call__(
        self, x: Array, skips: list[Array], temb: Array, text: Array, gates: Gates
    ) -> Array:
        for index in range(self.num_resnets):
            skip = skips.pop()
            x = x[:, : skip.shape[1], : skip.shape[2]]  # upsampling an odd size gives one too many
            resnet, transformer = self.layers(index, x.shape[-1])
            x = resnet(jnp.concatenate([x, skip], axis=-1), temb, gates)
            x = transformer(x, text, gates) if transformer else x
        if self.upsample:
            h, w = skips[-1].shape[1:3]
            x = upsample(x)[:, :h, :w]
            x = conv(x.shape[-1], 3, dtype=self.compute.dtype, name="upsamplers.0.conv")(x)
        return x


class UNet(nn.Module):
    """Predicts the noise (or the velocity) in latents, from their timestep and a prompt.

    Attributes:
        config: the architecture, dense or sliced.
        dtype: dtype of the computation; parameters are float32, and so are norms' statistics,
            softmax and the output.
        remat: recompute ResNets and transformers in the backward pass, to save memory.
        gate_position: one of `layers.GATE_POSITIONS`.
    """

    config: UNetConfig
    dtype: Any = jnp.float32
    remat: bool = False
    gate_position: str = "post_norm"

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        timestep: Int[Array, " b"],
        text: Float[Array, "b n d"],
        gates: Gates | None = None,
        return_blocks: bool = False,
    ) -> Float[Array, "b h w c_out"] | tuple[Float[Array, "b h w c_out"], list[Array]]:
        """Runs the UNet.

        Args:
            latents: noisy latents; `h` and `w` may be odd.
            timestep: 0 to 999.
            text: last hidden states of the text encoder.
            gates: multipliers of the units of some sites; sites left out are open.
            return_blocks: also return the output of every down block (resampled), of the middle
                and of every up block (resampled), which distillation compares. They keep their
                shapes when sites are sliced.
        """
        assert self.gate_position in GATE_POSITIONS, self.gate_position
        config, dtype, gates = self.config, self.dtype, gates or {}
        channels, levels = config.block_out_channels, len(config.block_out_channels)
        text = text.astype(dtype)

        temb = timestep_embedding(timestep, channels[0], config.flip_sin_to_cos, config.freq_shift)
        temb = dense(4 * channels[0], dtype=dtype, name="time_embedding.linear_1")(temb)
        temb = dense(4 * channels[0], dtype=dtype, name="time_embedding.linear_2")(nn.silu(temb))

        x = conv(channels[0], 3, dtype=dtype, name="conv_in")(latents.astype(dtype))
        skips, blocks = [x], []
        compute = Compute(dtype, self.remat, self.gate_position)
        num_resnets = config.layers_per_block
        for i, kind in enumerate(config.down_block_types):
            own = (config, i, "CrossAttn" in kind, num_resnets, compute)
            block = DownBlock(*own, downsample=i < levels - 1, name=f"down_blocks.{i}")
            x, more = block(x, temb, text, gates)
            skips += more
            blocks.append(x)
        if config.mid_block_type:
            middle = MidBlock(config, levels - 1, True, 2, compute, name="mid_block")
            x = middle(x, temb, text, gates)
            blocks.append(x)
        for i, kind in enumerate(config.up_block_types):
            own = (config, levels - 1 - i, "CrossAttn" in kind, num_resnets + 1, compute)
            block = UpBlock(*own, upsample=i < levels - 1, name=f"up_blocks.{i}")
            x = block(x, skips, temb, text, gates)
            blocks.append(x)
        x = nn.silu(
            GroupNorm(config.norm_num_groups, config.norm_eps, dtype, name="conv_norm_out")(x)
        )
        x = conv(config.out_channels, 3, dtype=dtype, name="conv_out")(x).astype(jnp.float32)
        return (x, blocks) if return_blocks else x


def param_shapes(config: UNetConfig) -> Any:
    """The parameters of `UNet(config)` as `jax.ShapeDtypeStruct`s; nothing is computed."""
    size = 2 ** (len(config.block_out_channels) - 1)
    latents = jnp.zeros((1, size, size, config.in_channels))
    text = jnp.zeros((1, 1, config.cross_attention_dim))
    init = lambda key: UNet(config).init(key, latents, jnp.zeros(1, jnp.int32), text)
    return jax.eval_shape(init, jax.random.key(0))["params"]
