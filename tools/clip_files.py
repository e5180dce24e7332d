"""CLIP with a vision transformer, in the form of OpenAI's and of open_clip's files.

Source: https://github.com/openai/CLIP and https://github.com/mlfoundations/open_clip; names follow
from the order of the modules there, and head sizes from the configs of the models.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from sdprune_jax import UserError
from sdprune_jax.commands import single_file
from sdprune_jax.models import clip

TRANSPOSED = ("visual.proj", "text_projection")
ONLY_OPENAI = ("input_resolution", "context_length", "vocab_size")  # numbers beside the weights

# Where OpenAI and open_clip keep what is not in a layer of a tower.
_ENDS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
}
_HEAD_SIZE = 64  # but for the vision towers of ViT-H, ViT-g and ViT-bigG, by width and layers:
_VISION_HEADS = {(1280, 32): 16, (1408, 40): 16, (1664, 48): 16}
# Their shapes say the architecture.
_TELLING = (
    "visual.conv1.weight",
    "visual.positional_embedding",
    "visual.proj",
    "visual.transformer.resblocks.0.mlp.c_fc.weight",
    "token_embedding.weight",
    "positional_embedding",
    "text_projection",
    "transformer.resblocks.0.mlp.c_fc.weight",
)


def clip_config(shapes: Mapping[str, tuple[int, ...]], activation: str) -> clip.CLIPConfig:
    """The architecture of a CLIP of OpenAI or open_clip, from the shapes of its tensors.

    Raises:
        ValueError: naming what is missing, or of an architecture that is not known.
    """
    missing = [name for name in _TELLING if name not in shapes]
    if missing:
        raise UserError(f"this is no CLIP with a vision transformer: missing {', '.join(missing)}")
    width, _, patch, _ = shapes["visual.conv1.weight"]
    num_patches = shapes["visual.positional_embedding"][0] - 1
    side = math.isqrt(num_patches)
    layers = _num_layers(shapes, "visual.transformer")
    is_listed = (width, layers) in _VISION_HEADS
    heads = _VISION_HEADS[width, layers] if is_listed else width // _HEAD_SIZE
    vocab_size, text_width = shapes["token_embedding.weight"]
    problems = []
    if side**2 != num_patches:
        problems.append(f"{num_patches} patches are no square")
    if not is_listed and (width % _HEAD_SIZE or width > 1024):
        problems.append(f"the heads of a vision tower {width} wide, {layers} deep, are not known")
    if text_width % _HEAD_SIZE:
        problems.append(f"the heads of a text tower {text_width} wide are not known")
    if problems:
        raise UserError("this CLIP cannot be converted: " + "; ".join(problems))
    hidden = lambda tower: shapes[f"{tower}.resblocks.0.mlp.c_fc.weight"][0]
    vision = clip.VisionConfig(
        hidden_size=width,
        intermediate_size=hidden("visual.transformer"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side * patch,
        patch_size=patch,
        hidden_act=activation,
        projection_dim=shapes["visual.proj"][1],
    )
    text = clip.TextConfig(
        vocab_size=vocab_size,
        hidden_size=text_width,
        intermediate_size=hidden("transformer"),
        num_hidden_layers=_num_layers(shapes, "transformer"),
        num_attention_heads=text_width // _HEAD_SIZE,
        max_position_embeddings=shapes["positional_embedding"][0],
        hidden_act=activation,
        projection_dim=shapes["text_projection"][1],
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=0,
    )
    return clip.CLIPConfig(text, vision, projection_dim=text.projection_dim)


def clip_name(key: str) -> tuple[str, int | None]:
    """The tensor of OpenAI and open_clip that holds a parameter, and which third of its rows."""
    tower, _, rest = key.partition(".")
    if key in _ENDS:
        return _ENDS[key], None
    if tower == "vision_model":
        name, third = single_file.text_name(f"text_model.{rest}")  # layers are the same
        return f"visual.{name}", third
    return single_file.text_name(key)


def _num_layers(names: Mapping[str, Any], tower: str) -> int:
    pattern = re.compile(rf"{re.escape(tower)}\.resblocks\.(\d+)\.")
    return len({found[1] for name in names if (found := pattern.match(name))})
