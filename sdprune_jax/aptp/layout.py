"""Where the gates of a UNet's sites lie in one architecture vector, and the way there and back."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sdprune_jax import sites
from sdprune_jax.models.layers import Gates


@dataclasses.dataclass(frozen=True)
class Layout:
    """The order of an architecture vector: the gates of all width sites, then the depth gates."""

    width: tuple[str, ...]  # the width sites
    units: tuple[int, ...]  # how many gates each has
    depth: tuple[str, ...]  # the depth sites, one gate each
    # For each width site the index in `depth` of the block it is in, or -1.
    depth_of: tuple[int, ...]
    # Indices in `depth`, from the block that stays longest to the one that goes first.
    depth_order: tuple[int, ...]

    @property
    def num_width(self) -> int:
        """Number of width gates, which the depth gates follow."""
        return sum(self.units)

    @property
    def size(self) -> int:
        return self.num_width + len(self.depth)

    @property
    def starts(self) -> np.ndarray:
        """Index of the first gate of each width site."""
        return np.cumsum((0, *self.units[:-1]))


def layout_of(table: tuple[sites.Site, ...]) -> Layout:
    """Lays out the gates of `sites.table(config)`: 1606 + 14 for Stable Diffusion 2.

    Blocks stay the longer the nearer they are to the image, in pairs of levels: first those of the
    last up block from its end, then those of the first down block from its start, and so on inward.

    Source: APTP's code (https://arxiv.org/abs/2406.12042), for Stable Diffusion 2; the same rule
        elsewhere.
    """
    width = [site for site in table if site.kind != "depth"]
    depth = [site.name for site in table if site.kind == "depth"]
    blocks = [name.removesuffix("depth") for name in depth]
    depth_of = []
    for site in width:
        owners = [i for i, block in enumerate(blocks) if f"{site.name}.".startswith(block)]
        depth_of.append(owners[0] if owners else -1)

    down = [i for i, name in enumerate(depth) if name.startswith("down_blocks.")]
    up = [i for i in reversed(range(len(depth))) if i not in down]
    level = lambda i: depth[i].split(".")[1]
    order: list[int] = []
    while up or down:
        for side in (up, down):
            outermost = [i for i in side if level(i) == level(side[0])]
            order += outermost
            del side[: len(outermost)]
    return Layout(
        tuple(site.name for site in width),
        tuple(site.units for site in width),
        tuple(depth),
        tuple(depth_of),
        tuple(order),
    )


def to_gates(vector: Float[Array, "b d"], layout: Layout) -> Gates:
    """Splits vectors into the gates that the UNet takes."""
    ends = [*layout.starts[1:], *range(layout.num_width, layout.size)]
    parts = jnp.split(vector, [int(end) for end in ends], axis=-1)
    return dict(zip((*layout.width, *layout.depth), parts, strict=True))


def to_architecture(keep: Bool[np.ndarray, " d"], layout: Layout) -> sites.Architecture:
    """Splits one hard vector into what `sites.slice_params` takes."""
    ends = [*layout.starts[1:], *range(layout.num_width, layout.size)]
    return dict(zip((*layout.width, *layout.depth), np.split(keep, ends), strict=True))
