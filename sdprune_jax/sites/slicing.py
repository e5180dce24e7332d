"""Slices the parameters of a UNet: the units that an architecture removes are cut out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sdprune_jax import UserError
from sdprune_jax.files import convert
from sdprune_jax.models import unet
from sdprune_jax.sites import site_table


def slice_params(
    params: Mapping[str, Any], config: unet.UNetConfig, architecture: site_table.Architecture
) -> tuple[dict[str, Any], unet.UNetConfig]:
    """Removes the units that `architecture` marks False.

    Args:
        params: nested parameters of `unet.UNet(config)`.
        config: dense, or sliced before.
        architecture: which units stay, by name of a site of `table` or `operators`. Where it
            removes a whole block, the sites inside are ignored.

    Returns:
        Parameters and config of the smaller UNet; arrays that lose nothing are not copied.

    Raises:
        ValueError: naming every unknown site, every wrong length, and every site but those of depth
            that would lose all of its units.
    """
    sites = {site.name: site for site in (*site_table.table(config), *site_table.operators(config))}
    removed = tuple(
        name.removesuffix("depth")
        for name, keep in architecture.items()
        if name.endswith(".depth") and not keep.any()
    )
    is_removed = lambda path: f"{path}.".startswith(removed)  # a block, or something in it
    problems = []
    for name, keep in architecture.items():
        if name not in sites:
            problems.append(f"{name} is not one of the {len(sites)} sites of this UNet")
        elif len(keep) != sites[name].units:
            problems.append(f"{name} has {sites[name].units} units, got {len(keep)}")
        elif not keep.any() and not is_removed(name):
            problems.append(f"{name} would lose all of its {len(keep)} units, keep at least one")
    if problems:
        raise UserError("this UNet cannot be sliced so:\n  " + "\n  ".join(problems))

    flat = convert.flatten(params)
    kept = {name: units for name, units in config.kept_units if not is_removed(name)}
    kept |= {f"{block}depth": 0 for block in removed}
    for name, keep in architecture.items():
        if keep.all() or is_removed(name):
            continue
        kept[name] = int(keep.sum())
        channels = np.repeat(keep, sites[name].unit_size)
        for path, axis in sites[name].members:
            runs = flat[path].shape[axis] // len(channels)
            flat[path] = flat[path].take(np.flatnonzero(np.tile(channels, runs)), axis)
    config = dataclasses.replace(config, kept_units=tuple(sorted(kept.items())))
    like = unet.param_shapes(config)
    sliced = convert.unflatten(flat, like)
    assert jax.tree.all(jax.tree.map(lambda x, want: x.shape == want.shape, sliced, like))
    return sliced, config
