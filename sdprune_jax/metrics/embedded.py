"""Scores of the embedded CLIP. They carry its name: they are nobody else's scores."""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jaxtyping import Bool, Float, Int, Int32

from sdprune_jax.data import captions, emoji, tokenizer
from sdprune_jax.data.cache import in_batches
from sdprune_jax.files import model_directory
from sdprune_jax.models import clip


def recall_at(
    k: int, similarity: Float[np.ndarray, "n candidates"], correct: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Whether the correct candidate is among the `k` most similar; a tie counts against it."""
    own = similarity[np.arange(len(correct)), correct]
    better = (similarity >= own[:, None]).sum(axis=1) - 1
    return better < k


class Scorer:
    """The embedded CLIP: how well an image goes with the caption of every concept.

    Attributes:
        model: the two towers.
        params: their parameters.
    """

    def __init__(self, config: clip.CLIPConfig, params: Any, words: transformers.CLIPTokenizer):
        self.model, self.params, self._words = clip.CLIP(config), params, words
        self._candidates: dict[int, np.ndarray] = {}  # captions of all concepts, by style
        self._embed_text = jax.jit(functools.partial(self.model.apply, method="embed_text"))
        self._embed_images = jax.jit(functools.partial(self.model.apply, method="embed_images"))

    def embed_images(
        self, images: Float[np.ndarray, "n h w 3"], batch_size: int = 64
    ) -> Float[np.ndarray, "n d"]:
        """Unit vectors of images in [-1, 1], of the tower's own size."""
        return self._in_batches(self._embed_images, images.astype(np.float32), batch_size)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 512) -> Float[np.ndarray, "n d"]:
        """Unit vectors of texts."""
        length = self.model.config.text.max_position_embeddings
        ids = tokenizer.encode(self._words, texts, length)
        return self._in_batches(self._embed_text, ids, batch_size)

    def recall(
        self,
        images: Float[np.ndarray, "n h w 3"],
        concept: Int32[np.ndarray, " n"],
        style: Int32[np.ndarray, " n"],
        ks: Sequence[int] = (1, 10),
    ) -> dict[str, Bool[np.ndarray, " n"]]:
        """Whether each image finds its concept among the captions of all, in its own style."""
        return self.recall_of(self.embed_images(images), concept, style, ks)

    def recall_of(
        self,
        embedded: Float[np.ndarray, "n d"],
        concept: Int32[np.ndarray, " n"],
        style: Int32[np.ndarray, " n"],
        ks: Sequence[int] = (1, 10),
    ) -> dict[str, Bool[np.ndarray, " n"]]:
        """`recall` of images that are embedded already."""
        found = {f"r_at_{k}": np.zeros(len(embedded), bool) for k in ks}
        for one in np.unique(style):
            rows = np.flatnonzero(style == one)
            word = emoji.styles()[one].word
            if one not in self._candidates:
                self._candidates[one] = self.embed_texts(
                    [captions.caption(c, word) for c in emoji.concepts()]
                )
            similarity = embedded[rows] @ self._candidates[one].T
            for k in ks:
                found[f"r_at_{k}"][rows] = recall_at(k, similarity, concept[rows])
        return found

    def _in_batches(self, embed: Any, rows: np.ndarray, batch_size: int) -> np.ndarray:
        with jax.default_matmul_precision("highest"):  # else TPUs and some GPUs round the inputs
            parts = [
                np.asarray(embed({"params": self.params}, jnp.asarray(rows[batch])))
                for batch in in_batches(len(rows), batch_size)
            ]
        return np.concatenate(parts)[: len(rows)]


def load_scorer(directory: pathlib.Path, words: transformers.CLIPTokenizer) -> Scorer:
    """The CLIP in `directory`, a transformers `CLIPModel` with a vision tower for small images."""
    config = clip.CLIPConfig.from_json(json.loads((directory / "config.json").read_text()))
    params = model_directory.load_params(
        directory, clip.clip_param_shapes(config), dtype=np.float32
    )
    return Scorer(config, params, words)
