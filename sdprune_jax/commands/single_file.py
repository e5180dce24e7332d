"""The single-file form of Stable Diffusion 2: names of latent-diffusion and of open_clip.

Source: https://github.com/Stability-AI/stablediffusion (ldm/modules) and
https://github.com/mlfoundations/open_clip; the names follow from the order of the modules there.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sdprune_jax import UserError
from sdprune_jax.files import convert, json_files, model_directory, tensors
from sdprune_jax.models import unet

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."
EXTRA_FILE = "single_file_extra.safetensors"

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_WORDS = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}
_TEXT_WORDS = {
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


class Place(NamedTuple):
    """The tensor that holds a parameter.

    Attributes:
        name: what the file calls the tensor.
        third: which third of its rows the parameter is; None is all of it.
        is_convolution: whether a linear layer is stored as a 1x1 convolution.
    """

    name: str
    third: int | None = None
    is_convolution: bool = False


def unet_name(key: str, config: unet.UNetConfig) -> str:
    """The name of a UNet's parameter, less its prefix.

    Blocks are numbered through. On the way down the ResNets of a level and its downsampler each
    have a number; on the way up the upsampler shares that of the last ResNet.
    """
    module, leaf = key.rsplit(".", 1)
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    side, *rest = module.split(".")
    if side == "mid_block":
        kind, i, *inner = rest
        place = f"middle_block.{2 * int(i) if kind == 'resnets' else 1}"
    else:
        level, kind, i, *inner = rest
        num_each = config.layers_per_block + 1
        first = int(level) * num_each
        if kind == "downsamplers":
            return f"input_blocks.{first + num_each}.0.op.{leaf}"
        if kind == "upsamplers":
            slot = 1 + config.up_block_types[int(level)].startswith("CrossAttn")
            return f"output_blocks.{first + num_each - 1}.{slot}.conv.{leaf}"
        number = first + int(i)
        block = f"input_blocks.{1 + number}" if side == "down_blocks" else f"output_blocks.{number}"
        place = f"{block}.{int(kind == 'attentions')}"
    if kind == "resnets":
        inner = [_RESNET[inner[0]]]
    return ".".join([place, *inner, leaf])


def vae_name(key: str, num_levels: int) -> str:
    """The name of a VAE's parameter, less its prefix; the way up is numbered backwards there."""
    if found := re.fullmatch(r"(.+\.)(down|up)_blocks\.(\d+)\.(.+)", key):
        module, side, level, inner = found.groups()
        level = num_levels - 1 - int(level) if side == "up" else level
        key = f"{module}{side}.{level}.{_replace_words(inner, {'resnets': 'block'})}"
    return _replace_words(key, _VAE_WORDS)


def text_name(key: str) -> tuple[str, int | None]:
    """The name of a text encoder's parameter, less its prefix, and which third of it is meant.

    Query, key and value are the rows of one tensor, in this order.
    """
    if found := re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", key):
        layer = _replace_words(found[1], _TEXT_WORDS)
        return f"{layer}.attn.in_proj_{found[3]}", "qkv".index(found[2])
    return _replace_words(key, _TEXT_WORDS), None


def places(model: model_directory.ModelConfig, component: str) -> dict[str, Place]:
    """Where in the file each parameter is, by its path."""
    found = {}
    for path in convert.flatten(model_directory.param_shapes(model, component)):
        key = convert.torch_key(path)
        if component == "text_encoder":
            name, third = text_name(key)
            found[path] = Place(TEXT + name, third)
        elif component == "vae":
            name = VAE + vae_name(key, len(model.vae.block_out_channels))
            found[path] = Place(name, is_convolution=convert.was_convolution(key))
        else:
            found[path] = Place(UNET + unet_name(key, model.unet))
    return found


def read(
    path: pathlib.Path, model: model_directory.ModelConfig
) -> tuple[dict[str, Any], dict[str, tensors.StoredTensor]]:
    """Reads the parameters of every component, and returns the tensors that are none of them.

    Raises:
        ValueError: naming all tensors that are missing or have another shape.
    """
    stored = tensors.open_file(path)
    params, used, problems = {}, set(), []
    for component in model_directory.COMPONENTS:
        shapes, flat = model_directory.param_shapes(model, component), {}
        expected = convert.flatten(shapes)
        for leaf, place in places(model, component).items():
            used.add(place.name)
            if place.name not in stored:
                problems.append(f"missing {place.name}")
                continue
            if stored[place.name].dtype not in tensors.FLOATS:
                problems.append(f"{place.name}: dtype {stored[place.name].dtype}")
                continue
            x = stored[place.name].read()
            if place.third is not None:
                rows = len(x) // 3
                x = x[place.third * rows : (place.third + 1) * rows]
            want = _torch_shape(leaf, expected[leaf].shape)
            if x.shape not in (want, (*want, 1, 1) if place.is_convolution else want):
                problems.append(f"{place.name}: shape {x.shape}, expected {want}")
                continue
            flat[leaf] = convert.from_torch(leaf, x.reshape(want))
        if not problems:
            params[component] = convert.unflatten(flat, shapes)
    if problems:
        raise UserError(f"{path} does not fit the configs:\n  {json_files.listing(problems)}")
    return params, {name: stored[name] for name in sorted(stored.keys() - used)}


def write(
    path: pathlib.Path,
    model: model_directory.ModelConfig,
    params: Mapping[str, Any],
    dtype: Any,
    extra: Mapping[str, tensors.StoredTensor],
) -> None:
    """Writes one file; `extra` is written as it is."""
    parts: dict[str, list[tuple[Place, str, Any]]] = {}
    for component in model_directory.COMPONENTS:
        flat = convert.flatten(params[component])
        for leaf, place in places(model, component).items():
            parts.setdefault(place.name, []).append((place, leaf, flat[leaf]))
    specs, sources = {}, {}
    for name, pieces in parts.items():
        pieces.sort(key=lambda piece: piece[0].third or 0)
        place, leaf, first = pieces[0]
        rows, *rest = _torch_shape(leaf, first.shape)
        shape = (rows * len(pieces), *rest, *([1, 1] if place.is_convolution else []))
        specs[name] = jax.ShapeDtypeStruct(shape, np.dtype(dtype or first.dtype))
        sources[name] = [(leaf, x) for _, leaf, x in pieces]
    for name in extra:
        specs[name] = jax.ShapeDtypeStruct(extra[name].shape, extra[name].read().dtype)

    def load(name: str) -> np.ndarray:
        if name in extra:
            return extra[name].read()
        x = np.concatenate([convert.to_torch(leaf, np.asarray(x)) for leaf, x in sources[name]])
        return x.astype(specs[name].dtype, copy=False).reshape(specs[name].shape)

    sums = tensors.write_file(path, specs, load)
    tensors.check_file(path, specs, sums)


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in convert.torch_axes(path, len(shape)))


def _replace_words(key: str, words: Mapping[str, str]) -> str:
    """Replaces whole words of a dotted name."""
    for old, new in words.items():
        key = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, key)
    return key
