"""What layers read: which of them share an input, and packages of them that fit in memory."""

import math
import re
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdprune_jax import UserError
from sdprune_jax.files import convert
from sdprune_jax.models import clip, layers, unet
from sdprune_jax.scoring import recorder

TEXT = "text states"
_TIME = "time embedding"
TIME = ("time_embedding.linear_1.kernel", "time_embedding.linear_2.kernel", _TIME)


def input_of(path: str) -> str:
    """Names what the layer of a kernel reads: layers that read the same share a statistic."""
    if path.endswith(".time_emb_proj.kernel"):
        return _TIME
    if re.search(r"\.attn2\.to_[kv]\.kernel$", path):
        return TEXT
    path = re.sub(r"\.to_[kv]\.kernel$", ".to_q.kernel", path)
    return re.sub(r"\.[kv]_proj\.kernel$", ".q_proj.kernel", path)


def groups(paths: Iterable[str]) -> dict[str, list[str]]:
    """Groups layers by the input that they read, named by `input_of`, in the order given."""
    paths_of: dict[str, list[str]] = {}
    for path in paths:
        paths_of.setdefault(input_of(path), []).append(path)
    return paths_of


@partial(jax.jit, static_argnames=("config", "num"))
def of_time(
    config: unet.UNetConfig, params: Any, num: int
) -> dict[str, Float[Array, "timesteps _"]]:
    """What the layers of the time embedding read at timesteps 0 to `num - 1`, by `input_of`."""
    width, read = config.block_out_channels[0], {}
    apply: Any = nn.Dense(4 * width).apply
    steps = jnp.arange(num)
    x = layers.timestep_embedding(steps, width, config.flip_sin_to_cos, config.freq_shift)
    for path in TIME[:-1]:
        read[path] = x
        x = nn.silu(apply({"params": params[path.removesuffix(".kernel")]}, x))
    return read | {_TIME: x}


def packages(
    config: unet.UNetConfig | clip.TextConfig,
    paths: Collection[str],
    statistic: str,
    max_bytes: int | float = math.inf,
) -> list[list[str]]:
    """Splits layers, in the order of their use, into packages whose statistics fit in memory.

    A package is calibrated on the network that the packages before it have left, at the price of
    a run of all prompts.

    Args:
        config: architecture of the component.
        paths: kernels to calibrate.
        statistic: "moments", or "gram" or "weighted_gram".
        max_bytes: the most that the statistics of a package may take, over all devices. Layers
            that read the same input are together, and their statistic counts once.

    Raises:
        ValueError: naming the layers whose statistic alone exceeds the limit.

    Source: OBS-Diff, module packages (https://arxiv.org/abs/2510.06751).
    """
    shapes, order = _in_order(config)
    unknown = sorted(set(paths) - set(order))
    if unknown:
        raise UserError("the model has no layers with these kernels:\n  " + "\n  ".join(unknown))
    wanted = set(paths)
    parts: list[list[str]] = [[]]
    used, problems = 0, []
    for group in groups(path for path in order if path in wanted).values():
        n_in = math.prod(shapes[group[0]][:-1])
        size = 4 * (n_in if statistic == "moments" else n_in**2)
        if size > max_bytes:
            problems.append(f"{group[0]}: {size:,} bytes")
        if parts[-1] and used + size > max_bytes:
            parts.append([])
            used = 0
        parts[-1] += group
        used += size
    if problems:
        raise UserError(
            f"the statistic ({statistic}) of a layer exceeds the limit of {max_bytes:,} bytes:"
            " raise calibration.max_gigabytes, or leave these layers out:\n  "
            + "\n  ".join(problems)
        )
    return parts


def _in_order(
    config: unet.UNetConfig | clip.TextConfig,
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of all kernels, and the order in which the model uses them."""
    model: Any
    args: tuple[Any, ...]
    if isinstance(config, clip.TextConfig):
        shapes, model = clip.text_param_shapes(config), clip.TextTower(config)
        args = (jnp.zeros((1, 1), jnp.int32),)
    else:
        shapes, model = unet.param_shapes(config), unet.UNet(config)
        size = 2 ** (len(config.block_out_channels) - 1)
        text = jnp.zeros((1, 1, config.cross_attention_dim))
        latents = jnp.zeros((1, size, size, config.in_channels))
        args = (latents, jnp.zeros(1, jnp.int32), text)
    flat = {path: leaf.shape for path, leaf in convert.flatten(shapes).items()}
    return flat, recorder.call_order(model.apply, shapes, *args)
