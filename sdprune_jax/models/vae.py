"""The autoencoder of Stable Diffusion: images to latents (mean and log-variance) and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdprune_jax import UserError
from sdprune_jax.models.layers import Attention, GroupNorm, ResnetBlock, upsample
from sdprune_jax.models.products import conv

_EPSILON = 1e-6  # of every norm; diffusers fixes it


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Architecture of the autoencoder, under the names of diffusers' `config.json`.

    Attributes:
        scaling_factor: what latents are multiplied by before diffusion.
    """

    sample_size: int = 768
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "VAEConfig":
        """Reads the values of a diffusers `vae/config.json`.

        Raises:
            ValueError: naming every value that is not Stable Diffusion's architecture.
        """
        fixed = {
            "act_fn": ("silu", "swish"),
            "use_quant_conv": (True,),
            "use_post_quant_conv": (True,),
            "mid_block_add_attention": (True,),
            "shift_factor": (None,),
            "latents_mean": (None,),
        }
        problems = [
            f"{key} is {values[key]!r}, expected {legal[0]!r}"
            for key, legal in fixed.items()
            if key in values and values[key] not in legal
        ]
        known = {field.name for field in dataclasses.fields(cls)}
        found: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known
        }
        config = cls(**found)
        for key, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            want = [kind] * len(config.block_out_channels)
            if list(values.get(key, want)) != want:
                problems.append(f"{key} is {values[key]}, expected {want}")
        problems += [
            f"{channels} channels do not divide into {config.norm_num_groups} groups"
            for channels in config.block_out_channels
            if channels < 1 or channels % config.norm_num_groups
        ]
        if problems:
            raise UserError(
                "vae/config.json is not a Stable Diffusion autoencoder:\n  " + "\n  ".join(problems)
            )
        return config

    def to_json(self) -> dict[str, Any]:
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        } | dataclasses.asdict(self)

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent position."""
        return 2 ** (len(self.block_out_channels) - 1)


def _resnet(config: VAEConfig, channels: int, dtype: Any, name: str) -> ResnetBlock:
    groups = config.norm_num_groups
    return ResnetBlock(channels, channels, groups, groups, _EPSILON, dtype, name=name)


class MidBlock(nn.Module):
    """ResNet, single-head self-attention over the positions, ResNet."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        x = _resnet(self.config, channels, self.dtype, "resnets.0")(x)
        x += AttentionBlock(self.config, self.dtype, name="attentions.0")(x)
        return _resnet(self.config, channels, self.dtype, "resnets.1")(x)


class AttentionBlock(nn.Module):
    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        h = GroupNorm(self.config.norm_num_groups, _EPSILON, self.dtype, name="group_norm")(x)
        attention = Attention(channels, 1, channels, qkv_bias=True, dtype=self.dtype)
        nn.share_scope(self, attention)  # diffusers keeps the norm among the projections
        return attention(h.reshape(x.shape[0], -1, channels)).reshape(x.shape)


class EncoderBlock(nn.Module):
    config: VAEConfig
    channels: int
    downsample: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b h_out w_out c"]:
        for index in range(self.config.layers_per_block):
            x = _resnet(self.config, self.channels, self.dtype, f"resnets.{index}")(x)
        if self.downsample:  # padded on the far sides only
            name, padding = "downsamplers.0.conv", [(0, 1), (0, 1)]
            x = conv(self.channels, 3, stride=2, padding=padding, dtype=self.dtype, name=name)(x)
        return x


class DecoderBlock(nn.Module):
    config: VAEConfig
    channels: int
    upsample: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b h_out w_out c"]:
        for index in range(self.config.layers_per_block + 1):
            x = _resnet(self.config, self.channels, self.dtype, f"resnets.{index}")(x)
        if self.upsample:
            x = conv(self.channels, 3, dtype=self.dtype, name="upsamplers.0.conv")(upsample(x))
        return x


class Encoder(nn.Module):
    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h_out w_out moments"]:
        config, dtype, widths = self.config, self.dtype, self.config.block_out_channels
        x = conv(widths[0], 3, dtype=dtype, name="conv_in")(x)
        for i, channels in enumerate(widths):
            last = i == len(widths) - 1
            x = EncoderBlock(config, channels, not last, dtype, name=f"down_blocks.{i}")(x)
        x = MidBlock(config, dtype, name="mid_block")(x)
        x = nn.silu(GroupNorm(config.norm_num_groups, _EPSILON, dtype, name="conv_norm_out")(x))
        return conv(2 * config.latent_channels, 3, dtype=dtype, name="conv_out")(x)


class Decoder(nn.Module):
    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out 3"]:
        config, dtype, widths = self.config, self.dtype, self.config.block_out_channels[::-1]
        x = conv(widths[0], 3, dtype=dtype, name="conv_in")(z)
        x = MidBlock(config, dtype, name="mid_block")(x)
        for i, channels in enumerate(widths):
            last = i == len(widths) - 1
            x = DecoderBlock(config, channels, not last, dtype, name=f"up_blocks.{i}")(x)
        x = nn.silu(GroupNorm(config.norm_num_groups, _EPSILON, dtype, name="conv_norm_out")(x))
        return conv(config.out_channels, 3, dtype=dtype, name="conv_out")(x)


class VAE(nn.Module):
    """Encoder and decoder; `apply` takes `method="encode"` or `method="decode"`.

    Attributes:
        config: the architecture.
        dtype: dtype of the computation; parameters are float32, and so are the outputs.
    """

    config: VAEConfig
    dtype: Any = jnp.float32

    def setup(self):
        latents = self.config.latent_channels
        self.encoder = Encoder(self.config, self.dtype)
        self.quant_conv = conv(2 * latents, 1, dtype=self.dtype)
        self.post_quant_conv = conv(latents, 1, dtype=self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def encode(
        self, images: Float[Array, "b height width 3"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Mean and log-variance of the latents of `images` (in [-1, 1]), before scaling."""
        moments = self.quant_conv(self.encoder(images.astype(self.dtype))).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30, 20)

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b height width 3"]:
        """Images, about [-1, 1], of unscaled `latents`."""
        x = self.decoder(self.post_quant_conv(latents.astype(self.dtype)))
        return x.astype(jnp.float32)

    def __call__(
        self, images: Float[Array, "b height width 3"]
    ) -> Float[Array, "b height width 3"]:
        return self.decode(self.encode(images)[0])


def param_shapes(config: VAEConfig) -> Any:
    """The parameters of `VAE(config)` as `jax.ShapeDtypeStruct`s; nothing is computed."""
    images = jnp.zeros((1, config.downscale, config.downscale, config.in_channels))
    return jax.eval_shape(lambda key: VAE(config).init(key, images), jax.random.key(0))["params"]
