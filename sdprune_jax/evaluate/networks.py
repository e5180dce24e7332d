"""Networks whose features are compared: pictures in bytes go in, vectors come out."""

import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, UInt8

from sdprune_jax import UserError
from sdprune_jax.data import tokenizer
from sdprune_jax.files import json_files, model_directory, tensors
from sdprune_jax.metrics import embedded, features
from sdprune_jax.models import clip, inception, lpips


class Network(NamedTuple):
    """A network, ready to embed."""

    embed: features.Embed  # (params, images of 0 to 255, or pairs of them) -> features
    params: Any
    embed_texts: Callable[[Sequence[str]], Float[np.ndarray, "n d"]] | None
    weights: str  # their SHA-256
    scorer: embedded.Scorer | None  # set for the embedded CLIP only


def load(name: str, directory: str, model: model_directory.ModelConfig) -> Network:
    """Loads a network by its name in a protocol.

    Args:
        name: "embedded", "inception", "lpips" (of pairs of images), or that of a CLIP.
        directory: holds a directory of each name, as tools/convert_metric_weights.py writes them.
        model: the dense one. Its tokenizer is used for a CLIP that has none of its own: those of
            OpenAI and of OpenCLIP read the same, but that Stable Diffusion 2's takes "!" for
            padding; and no token after the end of a text counts.

    Raises:
        ValueError: if the network is not there, or not what its name says, or if its tokenizer is
            another's.
    """
    here, weights = path(directory, name), state(name, directory)
    if name == "embedded":
        scorer = embedded.load_scorer(here, tokenizer.load(here.parent / "tokenizer"))
        embed = functools.partial(_embed_small, scorer.model)
        return Network(embed, scorer.params, scorer.embed_texts, weights, scorer)
    if name == "inception":
        params = model_directory.load_params(here, inception.param_shapes(), dtype=np.float32)
        return Network(_embed_inception, params, None, weights, None)
    if name == "lpips":
        params = model_directory.load_params(here, lpips.param_shapes(), dtype=np.float32)
        return Network(_embed_pairs, params, None, weights, None)
    settings = clip.CLIPConfig.from_json(json_files.read_json(here / "config.json"))
    params = model_directory.load_params(here, clip.clip_param_shapes(settings), dtype=np.float32)
    own = any((here / file).is_file() for file in ("vocab.json", "tokenizer.json"))
    folder = here if own else model.directory / "tokenizer"
    text_tokenizer = tokenizer.load(folder)
    if len(text_tokenizer) != settings.text.vocab_size:
        raise UserError(
            f"{name} knows {settings.text.vocab_size} tokens, and the tokenizer in {folder} has"
            f" {len(text_tokenizer)}: copy that of any CLIP of OpenAI's or of OpenCLIP's to {here}"
        )
    scorer = embedded.Scorer(settings, params, text_tokenizer)
    embed = functools.partial(_embed_clip, scorer.model)
    return Network(embed, params, scorer.embed_texts, weights, None)


def load_lpips(
    directory: str, model: model_directory.ModelConfig, size: tuple[int, int]
) -> Network | None:
    """Loads "lpips" if `directory` has it: no protocol needs it.

    Args:
        directory: see `load`.
        model: the dense one.
        size: height and width of the images, in pixels. Smaller than LPIPS takes: a warning.

    Raises:
        ValueError: if the weights that are there are not its.
    """
    if not directory or not (pathlib.Path(directory) / "lpips").is_dir():
        return None
    if min(size) < lpips.MIN_SIZE:
        logging.warning(
            "evaluate: no lpips_to_dense, for it needs images of %d pixels or more, got %d x %d",
            lpips.MIN_SIZE,
            *size,
        )
        return None
    return load("lpips", directory, model)


def path(directory: str, name: str) -> pathlib.Path:
    """Where a network lies.

    Raises:
        ValueError: if it does not.
    """
    if name == "embedded":
        return model_directory.directory_of("embedded") / "clip"
    here = pathlib.Path(directory) / name
    if not directory or not here.is_dir():
        raise UserError(
            f"the protocol needs the network {name}, and {here} is no directory: convert its"
            " weights with tools/convert_metric_weights.py"
        )
    return here


def state(name: str, directory: str) -> str:
    """The SHA-256 of a network's weights."""
    return hashlib.sha256(tensors.find_weights(path(directory, name)).read_bytes()).hexdigest()


def _embed_small(
    model: clip.CLIP, params: Any, images: UInt8[Array, "b h w 3"]
) -> Float[Array, "b d"]:
    scaled = images.astype(jnp.float32) / 127.5 - 1
    return model.apply({"params": params}, scaled, method="embed_images")  # pyrefly: ignore


def _embed_clip(model: clip.CLIP, params: Any, images: Array) -> Float[Array, "b d"]:
    scaled = clip.preprocess(images.astype(jnp.float32))
    return model.apply({"params": params}, scaled, method="embed_images")  # pyrefly: ignore


def _embed_inception(params: Any, images: Array) -> Float[Array, "b d"]:
    scaled = inception.NORMALISE["pytorch_fid"](images.astype(jnp.float32))  # as all protocols do
    return inception.InceptionV3().apply({"params": params}, scaled)  # pyrefly: ignore


def _embed_pairs(params: Any, images: UInt8[Array, "b 2 h w 3"]) -> Float[Array, "b 1"]:
    got, want = jnp.moveaxis(images.astype(jnp.float32) / 127.5 - 1, 1, 0)
    return lpips.LPIPS().apply({"params": params}, got, want)[:, None]  # pyrefly: ignore
