"""Sentence encoders that feed the router: MPNet and BERT (MiniLM), as sentence-transformers."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sdprune_jax import UserError
from sdprune_jax.models.layers import ACTIVATIONS, layer_norm

_BUCKETS, _MAX_DISTANCE = 32, 128  # of MPNet's relative positions
_NO_POSITION = 1  # the token that MPNet does not count
# What transformers assumes where a file leaves a key out and that is not our default.
_ABSENT: dict[str, dict[str, Any]] = {
    "mpnet": {"layer_norm_eps": 1e-12, "max_position_embeddings": 512},
    "bert": {
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "vocab_size": 30522,
    },
}
# Names of an attention layer's projections of queries, keys, values and output, and of its norm.
_ATTENTION = {
    "mpnet": (*[f"attention.attn.{name}" for name in "qkvo"], "attention.LayerNorm"),
    "bert": (
        *[f"attention.self.{name}" for name in ("query", "key", "value")],
        "attention.output.dense",
        "attention.output.LayerNorm",
    ),
}


@dataclasses.dataclass(frozen=True)
class SentenceConfig:
    """A sentence encoder, under the names of transformers' `config.json`.

    The defaults are those of `all-mpnet-base-v2`.

    Attributes:
        model_type: "mpnet" or "bert".
        max_position_embeddings: rows of the table; MPNet leaves its first two unused.
        pad_token_id: what texts are padded with.
    """

    model_type: str = "mpnet"
    vocab_size: int = 30527
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 514
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 1

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SentenceConfig":
        """Reads the `config.json` of a sentence-transformers directory.

        Raises:
            ValueError: naming every value that is not an MPNet or BERT encoder.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        kind = str(values.get("model_type"))
        found: dict[str, Any] = {"model_type": kind} | _ABSENT.get(kind, {})
        config = cls(**found | {key: value for key, value in values.items() if key in known})
        fixed = {
            "relative_attention_num_buckets": _BUCKETS,
            "position_embedding_type": "absolute",
            "is_decoder": False,
        }
        problems = [
            f"{key} is {values[key]!r}, expected {want!r}"
            for key, want in fixed.items()
            if values.get(key, want) != want
        ]
        for key, legal in (("model_type", list(_ATTENTION)), ("hidden_act", list(ACTIVATIONS))):
            if getattr(config, key) not in legal:
                problems.append(f"{key} is {getattr(config, key)!r}, expected one of {legal}")
        if config.hidden_size < 1 or config.hidden_size % config.num_attention_heads:
            problems.append(
                f"hidden_size {config.hidden_size} does not divide into"
                f" {config.num_attention_heads} heads"
            )
        if problems:
            raise UserError(
                "config.json is not a sentence encoder that can be read:\n  "
                + "\n  ".join(problems)
            )
        return config

    @property
    def max_tokens(self) -> int:
        """The longest text that has positions."""
        return self.max_position_embeddings - 2 * (self.model_type == "mpnet")


class EncoderLayer(nn.Module):
    """Attention and multilayer perceptron, each followed by its norm."""

    config: SentenceConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        mask: Bool[Array, "b n"],
        bias: Float[Array, "1 heads n n"] | None,
    ) -> Float[Array, "b n c"]:
        config, dtype = self.config, self.dtype
        *projections, output, norm = _ATTENTION[config.model_type]
        dense = lambda features, name: nn.Dense(features, dtype=dtype, name=name)
        split = (*x.shape[:2], config.num_attention_heads, -1)
        q, k, v = (dense(config.hidden_size, name)(x).reshape(split) for name in projections)
        h = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask[:, None, None])
        h = dense(config.hidden_size, output)(h.reshape(x.shape))
        x = layer_norm(config.layer_norm_eps, dtype, norm)(x + h)
        h = dense(config.intermediate_size, "intermediate.dense")(x)
        h = dense(config.hidden_size, "output.dense")(ACTIVATIONS[config.hidden_act](h))
        return layer_norm(config.layer_norm_eps, dtype, "output.LayerNorm")(x + h)


class SentenceEncoder(nn.Module):
    """Token ids to hidden states, as `MPNetModel` and `BertModel`.

    Attributes:
        config: the architecture.
        dtype: dtype of the computation; parameters are float32, and so is the output.
    """

    config: SentenceConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n c"]:
        """Runs the encoder.

        Args:
            ids: token ids, padded at the end.
            mask: True where there is a token.
        """
        config, dtype, width = self.config, self.dtype, self.config.hidden_size
        embed = lambda rows, name: nn.Embed(rows, width, dtype=dtype, name=f"embeddings.{name}")
        x = embed(config.vocab_size, "word_embeddings")(ids)
        is_mpnet = config.model_type == "mpnet"
        positions = jnp.arange(ids.shape[1])[None]
        if is_mpnet:  # padding has none, the others count from 2
            is_token = (ids != _NO_POSITION).astype(ids.dtype)
            positions = jnp.cumsum(is_token, axis=1) * is_token + 1
        x += embed(config.max_position_embeddings, "position_embeddings")(positions)
        if not is_mpnet:  # a single text is of the first type
            kind = embed(config.type_vocab_size, "token_type_embeddings")
            x += kind(jnp.zeros((1, 1), ids.dtype))
        x = layer_norm(config.layer_norm_eps, dtype, "embeddings.LayerNorm")(x)
        bias = None
        if is_mpnet:
            heads, name = config.num_attention_heads, "encoder.relative_attention_bias"
            table = nn.Embed(_BUCKETS, heads, dtype=dtype, name=name)
            bias = table(relative_buckets(ids.shape[1])).transpose(2, 0, 1)[None]
        for i in range(config.num_hidden_layers):
            x = EncoderLayer(config, dtype, name=f"encoder.layer.{i}")(x, mask, bias)
        nn.Dense(width, name="pooler.dense")(x[:, 0])  # in every file, but no embedding uses it
        return x.astype(jnp.float32)


def relative_buckets(length: int) -> Int[np.ndarray, "n n"]:
    """Which of MPNet's buckets the distance from each query (row) to each key falls into.

    Half are for keys ahead; of each half, the first are for single distances, and the others grow
    with the distance, up to 128.

    Source: T5, JMLR 2020, section 2.1 (https://arxiv.org/abs/1910.10683).
    """
    half, single = _BUCKETS // 2, _BUCKETS // 4
    ahead = np.arange(length)[None] - np.arange(length)[:, None]
    distance = np.abs(ahead)
    # In float32, as in PyTorch, whose roundings decide at distances of 16, 32 and 64.
    scale = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(single))
    scale = scale / np.float32(math.log(_MAX_DISTANCE / single)) * np.float32(half - single)
    far = np.minimum(single + scale.astype(np.int32), half - 1)
    return half * (ahead > 0) + np.where(distance < single, distance, far)


def pool(
    states: Float[Array, "b n c"], mask: Bool[Array, "b n"], normalize: bool = False
) -> Float[Array, "b c"]:
    """Embeddings of texts: means of the states of their tokens.

    sentence-transformers divides by the norm; APTP does not.
    """
    weight = mask.astype(states.dtype)[..., None]
    mean = (states * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1e-9)
    if not normalize:
        return mean
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def param_shapes(config: SentenceConfig) -> Any:
    """The parameters of `SentenceEncoder(config)` as `jax.ShapeDtypeStruct`s."""
    ids, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    init = lambda key: SentenceEncoder(config).init(key, ids, mask)
    return jax.eval_shape(init, jax.random.key(0))["params"]
