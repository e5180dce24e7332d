"""What can be removed from a model: the sites of a UNet, and the kernels of any component."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from sdprune_jax import UserError
from sdprune_jax.files import convert
from sdprune_jax.models import unet

# Site name -> which of its units stay. Sites left out are kept whole.
Architecture = Mapping[str, Bool[np.ndarray, " _units"]]

SCOPES = ("linear", "linear+conv", "obsdiff", "all")
# Linear layers outside attention and feed-forward: of a transformer's ends and of the timestep.
_NOT_OBSDIFF = ("proj_in", "proj_out", "time_emb_proj", "linear_1", "linear_2")


@dataclasses.dataclass(frozen=True)
class Site:
    """Structures under one gate, each of which can be removed alone.

    Attributes:
        name: where the gate is read: the dotted path of a module, or that and `.depth`.
        kind: what a unit is: a head, a run of feed-forward neurons, the channels of one group of
            a ResNet's second norm, or (depth) a whole ResNet or transformer.
        units: how many there are.
        unit_size: consecutive channels of one unit.
        members: `(parameter path, axis)` of every array that is sliced. The axis holds the channels
            of all units in order, once, or several times in a row: GEGLU's `net.0.proj` is
            [value | gate], and each half loses the same neurons. A depth site has none: everything
            under its block goes.
    """

    name: str
    kind: Literal["heads", "ff", "channels", "depth"]
    units: int
    unit_size: int
    members: tuple[tuple[str, int], ...]


def table(config: unet.UNetConfig) -> tuple[Site, ...]:
    """All sites of a UNet, in the order of APTP's architecture vector: width sites, then depth.

    Blocks come down, middle, up; in each the ResNets first, then the transformers; in these attn1,
    attn2, ff. Depth sites are the last ResNet and the last transformer of every down and up block.
    A config that was sliced has the sites and units that are left.

    Source: APTP (https://arxiv.org/abs/2406.12042) and its authors' code.
    """
    blocks = list(_blocks(config))
    width = [site for block in blocks for site in _width_sites(config, block.path, block.level)]
    return (*width, *(_depth_site(config, block) for block in blocks if block.is_last))


def operators(config: unet.UNetConfig) -> tuple[Site, ...]:
    """Depth sites of all ResNets and transformers whose input can stand in for them.

    34 in Stable Diffusion 2, those of `table` among them: all but the four ResNets that change the
    width.
    """
    return tuple(_depth_site(config, block) for block in _blocks(config) if block.keeps_width)


def prunable(shapes: Mapping[str, Any], component: str, scope: str) -> list[str]:
    """Paths of the kernels that post-training pruning sets zeros in.

    Scopes, with their numbers of layers in the UNet of Stable Diffusion 2:

    - `linear`, what Ramesh and Zhao prune: the 216 linear layers, those of the timestep included.
      In the text encoder it is the 138 inside its layers, and so is every other scope.
    - `linear+conv`: also the 64 convolutions but for `conv_in` and `conv_out`; all that enters or
      leaves goes through these two, and they hold 4 of 100,000 weights.
    - `obsdiff`, what OBS-Diff prunes: the 160 linear layers of attention and feed-forward.
    - `all`: every linear layer and all 66 convolutions.

    Biases, norms and embeddings are never pruned.

    Args:
        shapes: nested parameters or `jax.ShapeDtypeStruct`s.
        component: "text_encoder", "unet" or "vae".
        scope: one of `SCOPES`.

    Raises:
        ValueError: if the scope is unknown, or holds no layer.

    Source: Ramesh and Zhao 2024 (https://arxiv.org/abs/2411.15113) and their code; OBS-Diff
        (https://arxiv.org/abs/2510.06751).
    """
    if scope not in SCOPES:
        raise UserError(f"scope is {scope!r}, expected one of {SCOPES}")
    part = "text_model.encoder.layers." if component == "text_encoder" else ""
    num_axes = (2,) if scope in ("linear", "obsdiff") else (2, 4)
    excluded = {"obsdiff": _NOT_OBSDIFF, "all": ()}.get(scope, ("conv_in", "conv_out"))
    paths = [
        path
        for path, leaf in convert.flatten(shapes).items()
        if path.startswith(part)
        and path.endswith(".kernel")
        and len(leaf.shape) in num_axes
        and path.split(".")[-2] not in excluded
    ]
    if not paths:
        raise UserError(f"no layer of the {component} is in scope {scope!r}: choose another")
    return paths


class _Block(NamedTuple):
    """A ResNet or transformer that a UNet has.

    Attributes:
        path: dotted path of its module.
        level: level of the UNet whose width and heads it has.
        keeps_width: its input can stand in for it.
        is_last: the last of its kind in a down or up block, and keeps the width: APTP's depth
            sites.
    """

    path: str
    level: int
    keeps_width: bool
    is_last: bool


def _blocks(config: unet.UNetConfig) -> Iterator[_Block]:
    widths, count = config.block_out_channels, config.layers_per_block
    last = len(widths) - 1
    stages = [  # name, level, the level before it, ResNets, type
        (f"down_blocks.{i}", i, max(i - 1, 0), count, kind)
        for i, kind in enumerate(config.down_block_types)
    ]
    if config.mid_block_type:
        stages += [("mid_block", last, last, 2, "")]
    stages += [
        (f"up_blocks.{i}", last - i, min(last - i + 1, last), count + 1, kind)
        for i, kind in enumerate(config.up_block_types)
    ]
    for stage, level, before, num_resnets, kind in stages:
        num_transformers = 1 if stage == "mid_block" else num_resnets * ("CrossAttn" in kind)
        for name, num in (("resnets", num_resnets), ("attentions", num_transformers)):
            for i in range(num):
                path = f"{stage}.{name}.{i}"
                widens = name == "resnets" and i == 0 and widths[before] != widths[level]
                is_last = stage != "mid_block" and i == num - 1 and not widens
                if config.units(unet.depth_site(path), 1):
                    yield _Block(path, level, not widens, is_last)


def _depth_site(config: unet.UNetConfig, block: _Block) -> Site:
    channels = config.block_out_channels[block.level]
    return Site(unet.depth_site(block.path), "depth", 1, channels, ())


def _width_sites(config: unet.UNetConfig, path: str, level: int) -> Iterator[Site]:
    features, heads = config.block_out_channels[level], config.attention_head_dim[level]

    def site(name: str, kind: Any, dense: int, channels: int, axes: dict[str, int]) -> Site:
        members = tuple((f"{name}.{leaf}", axis) for leaf, axis in axes.items())
        return Site(name, kind, config.units(name, dense), channels // dense, members)

    if ".resnets." in path:
        axes = {
            "conv1.kernel": 3,
            "conv1.bias": 0,
            "time_emb_proj.kernel": 1,
            "time_emb_proj.bias": 0,
        }
        axes |= {"norm2.scale": 0, "norm2.bias": 0, "conv2.kernel": 2}
        yield site(path, "channels", config.norm_num_groups, features, axes)
        return
    block = f"{path}.transformer_blocks.0"
    axes = {"to_q.kernel": 1, "to_k.kernel": 1, "to_v.kernel": 1, "to_out.0.kernel": 0}
    for name in ("attn1", "attn2"):
        yield site(f"{block}.{name}", "heads", heads, features, axes)
    axes = {"net.0.proj.kernel": 1, "net.0.proj.bias": 0, "net.2.kernel": 0}
    yield site(f"{block}.ff", "ff", unet.FF_UNITS, 4 * features, axes)
