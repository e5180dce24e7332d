"""What layers read: which of them share an input, and packages of them that fit in memory."""

import math
import re
from collections.abc import Iterable, Sequence
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
    """The layers that read each input, by `input_of`, in the order given."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(input_of(path), []).append(path)
    return found


@partial(jax.jit, static_argnames=("config", "num"))
def of_time(
    config: unet.UNetConfig, params: Any, num: int
) -> dict[str, Float[Array, "timesteps _"]]:
    """What the layers of the time embedding read at timesteps 0 to `num - 1`, by `input_of`."""
    width, found = config.block_out_channels[0], {}
    apply: Any = nn.Dense(4 * width).apply
    x = layers.timestep_embedding(
        jnp.arange(num), width, config.flip_sin_to_cos, config.freq_shift
    )  # fmt: skip
    for path in TIME[:-1]:
        found[path] = x
        x = nn.silu(apply({"params": params[path.removesuffix(".kernel")]}, x))
    return found | {_TIME: x}


def packages(
    config: unet.UNetConfig | clip.TextConfig,
    paths: Sequence[str],
    statistic: str,
    max_bytes: int | None = None,
) -> list[list[str]]:
    """Splits layers, in the order of their use, into packages whose statistics fit in memory.

    A package is calibrated on the network that the packages before it have left, at the price of
    a run of all prompts.

    Args:
        config: of the component.
        paths: kernels to calibrate.
        statistic: "moments" or "gram".
        max_bytes: of the statistics of one package, over all devices; None makes one package.
            Layers that read the same input are together, and their statistic counts once.

    Raises:
        ValueError: naming the layers whose statistic alone exceeds the limit.

    Source: OBS-Diff, module packages (https://arxiv.org/abs/2510.06751).
    """
    shapes, order = _in_order(config)
    unknown = sorted(set(paths) - set(order))
    if unknown:
        raise UserError("the model has no layers with these kernels:\n  " + "\n  ".join(unknown))
    wanted = set(paths)
    found: list[list[str]] = [[]]
    used, problems = 0, []
    for group in groups(path for path in order if path in wanted).values():
        size = num_bytes(shapes[group[0]], statistic)
        if max_bytes is not None and size > max_bytes:
            problems.append(f"{group[0]}: {size:,} bytes")
        if max_bytes is not None and found[-1] and used + size > max_bytes:
            found.append([])
            used = 0
        found[-1] += group
        used += size
    if problems:
        raise UserError(
            f"the statistic ({statistic}) of a layer exceeds the limit of {max_bytes:,} bytes:"
            " raise calibration.max_gigabytes, or leave these layers out:\n  "
            + "\n  ".join(problems)
        )
    return found


def num_bytes(kernel_shape: Sequence[int], statistic: str) -> int:
    """Memory of the statistic of a layer."""
    n_in = math.prod(kernel_shape[:-1])
    return 4 * (n_in if statistic == "moments" else n_in**2)


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
