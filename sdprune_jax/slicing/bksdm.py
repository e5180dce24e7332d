"""BK-SDM: which blocks of Stable Diffusion 2 go does not depend on data or weights.

Every down block keeps its first pair of ResNet and transformer, every up block its first and last.
`small` has no middle block either, and `tiny` also lacks the innermost level. What is left is a
plain UNet that diffusers loads.

Source: BK-SDM (https://arxiv.org/abs/2305.15798), section 3.1, and its authors' configs.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from sdprune_jax import UserError, sites
from sdprune_jax.files import convert
from sdprune_jax.models import unet

Size = Literal["base", "small", "tiny"]
SIZES = get_args(Size)


def student(config: unet.UNetConfig, size: str) -> unet.UNetConfig:
    """The architecture of a student, made from that of its teacher.

    Raises:
        ValueError: if the teacher has no such student, with all reasons.
    """
    assert size in SIZES, size
    widths = config.block_out_channels
    problems = []
    if config.kept_units or not config.mid_block_type:
        problems.append("has lost blocks or units already: take the dense one")
    if config.layers_per_block < 2:
        problems.append("has one ResNet in each down block: there is none to remove")
    if size == "tiny" and (len(widths) < 3 or widths[-1] != widths[-2]):
        problems.append(f"has the widths {widths}: without the last, the others would not fit")
    if problems:
        raise UserError(f"this UNet has no bksdm-{size}: it " + "; it ".join(problems))
    smaller = dataclasses.replace(config, layers_per_block=1)
    if size == "base":
        return smaller
    smaller = dataclasses.replace(smaller, mid_block_type=None)
    if size == "small":
        return smaller
    return dataclasses.replace(
        smaller,
        block_out_channels=widths[:-1],
        attention_head_dim=config.attention_head_dim[:-1],
        down_block_types=config.down_block_types[:-1],
        up_block_types=config.up_block_types[1:],
    )


def cut(
    params: Mapping[str, Any], config: unet.UNetConfig, size: str
) -> tuple[dict[str, Any], unet.UNetConfig, dict[str, int]]:
    """Makes the smaller UNet of the blocks that stay.

    Returns:
        Its parameters and config, and the units that each site of the teacher keeps: all or none.

    Raises:
        ValueError: as `student`.
    """
    smaller = student(config, size)
    missing = len(config.block_out_channels) - len(smaller.block_out_channels)
    flat, shapes = convert.flatten(params), unet.param_shapes(smaller)

    def path_in_teacher(path: str) -> str:
        match = re.fullmatch(r"up_blocks\.(\d+)\.(.*)", path)
        if not match:
            return path
        block, rest = int(match[1]) + missing, match[2]
        rest = re.sub(r"^(resnets|attentions)\.1\.", rf"\1.{config.layers_per_block}.", rest)
        return f"up_blocks.{block}.{rest}"

    source = {path: path_in_teacher(path) for path in convert.flatten(shapes)}
    taken = {path: flat[source[path]] for path in source}
    assert all(x.shape == taken[path].shape for path, x in convert.flatten(shapes).items())

    def stays(site: sites.Site) -> bool:
        inside = site.name.removesuffix("depth") if site.kind == "depth" else f"{site.name}."
        return any(path.startswith(inside) for path in source.values())

    kept = {site.name: site.units * stays(site) for site in sites.table(config)}
    return convert.unflatten(taken, shapes), smaller, kept
