"""CLIP: the text tower that conditions the UNet, and the vision tower that scores images."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sdprune_jax import UserError
from sdprune_jax.models.layers import ACTIVATIONS, layer_norm
from sdprune_jax.models.products import dense

# Of red, green and blue, over the images that OpenAI trained on.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Architecture of the text tower, under the names of transformers' `config.json`."""

    vocab_size: int = 49408
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    max_position_embeddings: int = 77
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    bos_token_id: int = 0
    eos_token_id: int = 2
    pad_token_id: int = 1

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TextConfig":
        """Reads a `text_encoder/config.json`, or the `text_config` of a whole CLIP.

        Raises:
            ValueError: naming every value that is not a CLIP text tower.
        """
        return _read(cls, values, "CLIP text tower")

    def to_json(self) -> dict[str, Any]:
        kind = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
        return kind | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Architecture of the vision tower, under the names of transformers' `config.json`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "VisionConfig":
        """Reads the `vision_config` of a whole CLIP.

        Raises:
            ValueError: naming every value that is not a CLIP vision tower.
        """
        return _read(cls, values, "CLIP vision tower")

    def to_json(self) -> dict[str, Any]:
        return {"model_type": "clip_vision_model"} | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers, under the names of transformers' `config.json` of a `CLIPModel`."""

    text: TextConfig
    vision: VisionConfig
    projection_dim: int = 512

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CLIPConfig":
        """Reads the `config.json` of a `CLIPModel`."""
        text = TextConfig.from_json(values.get("text_config", {}))
        vision = VisionConfig.from_json(values.get("vision_config", {}))
        return cls(text, vision, values.get("projection_dim", 512))

    def to_json(self) -> dict[str, Any]:
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": self.projection_dim,
            "text_config": self.text.to_json(),
            "vision_config": self.vision.to_json(),
        }


def _read(cls: Any, values: Mapping[str, Any], kind: str) -> Any:
    known = {field.name for field in dataclasses.fields(cls)}
    config = cls(**{key: value for key, value in values.items() if key in known})
    problems = []
    if config.hidden_act not in ACTIVATIONS:
        problems.append(f"hidden_act is {config.hidden_act!r}, expected one of {list(ACTIVATIONS)}")
    if config.hidden_size < 1 or config.hidden_size % config.num_attention_heads:
        problems.append(
            f"hidden_size {config.hidden_size} does not divide into"
            f" {config.num_attention_heads} heads"
        )
    if problems:
        raise UserError(f"not a {kind} that can be read:\n  " + "\n  ".join(problems))
    return config


class SelfAttention(nn.Module):
    heads: int
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        features = x.shape[-1]

        def project(name: str) -> Array:
            y = dense(features, dtype=self.dtype, name=name)(x)
            return y.reshape(*x.shape[:2], self.heads, features // self.heads)

        q, k, v = (project(name) for name in ("q_proj", "k_proj", "v_proj"))
        out = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal).reshape(x.shape)
        return dense(features, dtype=self.dtype, name="out_proj")(out)


class EncoderLayer(nn.Module):
    """Pre-norm attention and multilayer perceptron of either tower."""

    config: TextConfig | VisionConfig
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        config, dtype = self.config, self.dtype
        h = layer_norm(config.layer_norm_eps, dtype, "layer_norm1")(x)
        heads = config.num_attention_heads
        x += SelfAttention(heads, self.causal, dtype, name="self_attn")(h)
        h = layer_norm(config.layer_norm_eps, dtype, "layer_norm2")(x)
        h = dense(config.intermediate_size, dtype=dtype, name="mlp.fc1")(h)
        h = ACTIVATIONS[config.hidden_act](h)
        return x + dense(config.hidden_size, dtype=dtype, name="mlp.fc2")(h)


class TextTransformer(nn.Module):
    config: TextConfig
    dtype: Any

    @nn.compact
    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n c"]:
        config, dtype, width = self.config, self.dtype, self.config.hidden_size
        token = nn.Embed(config.vocab_size, width, dtype=dtype, name="embeddings.token_embedding")
        positions, name = config.max_position_embeddings, "embeddings.position_embedding"
        position = nn.Embed(positions, width, dtype=dtype, name=name)
        x = token(ids) + position(jnp.arange(ids.shape[1]))[None]
        for i in range(config.num_hidden_layers):
            x = EncoderLayer(config, True, dtype, name=f"encoder.layers.{i}")(x)
        return layer_norm(config.layer_norm_eps, dtype, "final_layer_norm")(x)


class TextTower(nn.Module):
    """Token ids to hidden states, as `CLIPTextModel`.

    Stable Diffusion 2 conditions on the penultimate layer of its CLIP: its text encoder is the
    tower without the last layer, and the final norm is applied to what is left.

    Attributes:
        config: the architecture.
        dtype: dtype of the computation; parameters are float32, and so is the output.
    """

    config: TextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n c"]:
        x = TextTransformer(self.config, self.dtype, name="text_model")(ids)
        return x.astype(jnp.float32)


class VisionTransformer(nn.Module):
    config: VisionConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], kept: Int[Array, "b k"] | None = None
    ) -> Float[Array, "b c"]:
        config, dtype, width = self.config, self.dtype, self.config.hidden_size
        size, name = (config.patch_size,) * 2, "embeddings.patch_embedding"
        patches = nn.Conv(
            width, size, size, padding="VALID", use_bias=False, dtype=dtype, name=name
        )(images.astype(dtype))
        b = patches.shape[0]
        token = VisionToken(width, name="embeddings")(b).astype(dtype)
        x = jnp.concatenate([token, patches.reshape(b, -1, width)], axis=1)
        name = "embeddings.position_embedding"
        x += nn.Embed(x.shape[1], width, dtype=dtype, name=name)(jnp.arange(x.shape[1]))[None]
        if kept is not None:
            x = jnp.concatenate([x[:, :1], x[jnp.arange(b)[:, None], 1 + kept]], axis=1)
        x = layer_norm(config.layer_norm_eps, dtype, "pre_layrnorm")(x)
        for i in range(config.num_hidden_layers):
            x = EncoderLayer(config, False, dtype, name=f"encoder.layers.{i}")(x)
        return layer_norm(config.layer_norm_eps, dtype, "post_layernorm")(x[:, 0])


class VisionToken(nn.Module):
    """The learned token whose last state stands for the image."""

    features: int

    @nn.compact
    def __call__(self, batch: int) -> Float[Array, "b 1 c"]:
        init = nn.initializers.normal(self.features**-0.5)
        token = self.param("class_embedding", init, (self.features,))
        return jnp.broadcast_to(token, (batch, 1, self.features))


class CLIP(nn.Module):
    """Both towers and their projections into one space, as `CLIPModel`.

    Attributes:
        config: the architecture.
        dtype: dtype of the computation; parameters are float32, and so are the embeddings.
    """

    config: CLIPConfig
    dtype: Any = jnp.float32

    def setup(self):
        width = self.config.projection_dim
        self.text_model = TextTransformer(self.config.text, self.dtype)
        self.vision_model = VisionTransformer(self.config.vision, self.dtype)
        self.text_projection = nn.Dense(width, use_bias=False)
        self.visual_projection = nn.Dense(width, use_bias=False)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def embed_text(self, ids: Int[Array, "b n"]) -> Float[Array, "b d"]:
        """Unit vectors of texts, read at their end-of-text token."""
        states = self.text_model(ids)
        pooled = states[jnp.arange(ids.shape[0]), end_of_text(ids, self.config.text)]
        return _unit(self.text_projection(pooled.astype(jnp.float32)))

    def embed_images(
        self, images: Float[Array, "b h w 3"], kept: Int[Array, "b k"] | None = None
    ) -> Float[Array, "b d"]:
        """Unit vectors of images, normalised as in the training of the CLIP.

        With `kept`, from those patches alone, counted from the top left: a training by patch
        dropout reads a part of each image (FLIP, https://arxiv.org/abs/2212.00794).
        """
        return _unit(self.visual_projection(self.vision_model(images, kept).astype(jnp.float32)))

    def __call__(
        self,
        ids: Int[Array, "b n"],
        images: Float[Array, "b h w 3"],
        kept: Int[Array, "b k"] | None = None,
    ) -> tuple[Float[Array, "b d"], Float[Array, "b d"], Float[Array, ""]]:
        """Embeddings of texts and of images, and the factor of their dot products."""
        return self.embed_text(ids), self.embed_images(images, kept), jnp.exp(self.logit_scale)


def preprocess(images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Images in [0, 255] to the input of the towers that OpenAI, LAION and their kin published."""
    mean, std = jnp.asarray(_MEAN), jnp.asarray(_STD)
    return (images / 255 - mean[None, None, None]) / std[None, None, None]


def end_of_text(ids: Int[Array, "b n"], config: TextConfig) -> Int[Array, " b"]:
    """Position of the end-of-text token, where a text is pooled.

    Files that still say `eos_token_id: 2` never had that token: there it is the largest id.
    """
    if config.eos_token_id == 2:
        return ids.argmax(axis=-1)
    return (ids == config.eos_token_id).argmax(axis=-1)


def _unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def text_param_shapes(config: TextConfig) -> Any:
    """The parameters of `TextTower(config)` as `jax.ShapeDtypeStruct`s; nothing is computed."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda key: TextTower(config).init(key, ids), jax.random.key(0))["params"]


def clip_param_shapes(config: CLIPConfig) -> Any:
    """The parameters of `CLIP(config)` as `jax.ShapeDtypeStruct`s; nothing is computed."""
    size = config.vision.image_size
    ids, images = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, size, size, 3))
    init = lambda key: CLIP(config).init(key, ids, images)
    return jax.eval_shape(init, jax.random.key(0))["params"]
