"""An expert of the dense shape: what slicing removes is zero, or passes its input on."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdprune_jax import sites
from sdprune_jax.files import convert
from sdprune_jax.models import unet


def zero_params(
    params: Mapping[str, Any], config: unet.UNetConfig, architecture: sites.Architecture
) -> dict[str, Any]:
    """Parameters of the same UNet that give what the sliced ones of `sites.slice_params` give.

    Any reader of a dense UNet can run it, at the dense cost.

    Args:
        params: nested parameters of `unet.UNet(config)`.
        config: dense, or sliced before.
        architecture: False removes. Where it removes a whole block, the sites inside are ignored.

    Returns:
        Parameters of the same shapes; arrays that lose nothing are not copied.

    Raises:
        ValueError: as `sites.slice_params`.
    """
    sites.slice_params(params, config, architecture)  # for its errors
    flat, table = convert.flatten(params), {site.name: site for site in sites.table(config)}
    removed = tuple(
        name.removesuffix("depth")
        for name, keep in architecture.items()
        if name.endswith(".depth") and not keep.any()
    )
    for name, keep in architecture.items():
        if keep.all() or f"{name}.".startswith(removed):
            continue
        channels = np.repeat(keep, table[name].unit_size)
        for path, axis in table[name].members:
            x = flat[path]
            runs = x.shape[axis] // len(channels)
            shape = [-1 if i == axis else 1 for i in range(x.ndim)]
            flat[path] = x * np.tile(channels, runs).reshape(shape).astype(x.dtype)

    for block in removed:
        for last in ("conv2", "proj_out"):  # what adds to the residual stream
            for leaf in ("kernel", "bias"):
                path = f"{block}{last}.{leaf}"
                if path in flat:
                    flat[path] = jnp.zeros_like(flat[path])
        path = f"{block}conv_shortcut.kernel"
        if path in flat:  # of a block that also reads a skip connection, which goes with it
            x = flat[path]
            flat[path] = jnp.eye(*x.shape[2:], dtype=x.dtype)[None, None]
            flat[f"{block}conv_shortcut.bias"] = jnp.zeros_like(flat[f"{block}conv_shortcut.bias"])
    return convert.unflatten(flat, params)
