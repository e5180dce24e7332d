"""Sums what layers read while a model runs: second moments or Gram matrices of their inputs.

Features of a linear layer are its inputs. Those of a convolution are a patch of its padded input,
in the order of its kernel: `kernel.reshape(-1, c_out)`, so kernel row, kernel column, channel.
"""

import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from sdprune_jax import UserError
from sdprune_jax.files import convert

Statistic = Literal["moments", "gram"]


class LayerStats(NamedTuple):
    """What pruning may know about the inputs x of one layer, in float32.

    Attributes:
        moment: the sum of w x^2 over rows of weight w or, for a Gram matrix, of w x x^T.
        weight: the sum of w. Only ratios matter: scores and losses are per unit of it.
    """

    moment: Float[Array, " n_in"] | Float[Array, "n_in n_in"]
    weight: Float[Array, ""]


Stats = dict[str, LayerStats]  # by path of the kernel
Stat = LayerStats | Float[np.ndarray, "..."]  # the array is the loss's gradient by a kernel


def mean_square(stats: LayerStats) -> Float[Array, " n_in"]:
    """The mean of x^2, from either statistic."""
    moment = stats.moment
    return (moment if moment.ndim == 1 else jnp.diagonal(moment)) / stats.weight


def apply_and_record(
    apply: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    layers: Collection[str],
    statistic: Statistic,
    weight: Float[Array, " b"] | Float[Array, "b n"],
    fraction: float = 1.0,
    key: Key[Array, ""] | None = None,
) -> tuple[Any, Stats]:
    """Runs a model and sums the inputs of some of its layers.

    Args:
        apply: method of a Linen model, which needs no change.
        params: parameters of the model.
        inputs: the model's further arguments.
        layers: dotted paths of kernels.
        statistic: a Gram matrix is `n_in` times as large as second moments.
        weight: how much each sample or each token counts. Not negative; 0 leaves it out.
        fraction: share of the positions of an image that the Gram matrix of a convolution reads,
            in (0, 1]. They are drawn anew for each layer and count for all, so that the sum is
            unbiased.
        key: draws these positions.

    Returns:
        The model's output, and the statistic of each of `layers`.

    Raises:
        ValueError: naming the layers that the model did not call.
    """

    def record(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name == "__call__" and (path := _kernel_path(layer)) in layers:
            x = jnp.asarray(args[0])
            if isinstance(layer, nn.Conv):
                assert weight.ndim == 1, "a convolution has no tokens"
                position_key = key if key is None else jax.random.fold_in(key, _hash(path))
                new = _of_convolution(layer, x, weight, statistic, fraction, position_key)
            else:
                new = of_rows(x, weight, statistic)
            zeros = jax.tree.map(jnp.zeros_like, new)
            add = lambda old, new: jax.tree.map(jnp.add, old, new)
            layer.sow("calibration", "stats", new, init_fn=lambda: zeros, reduce_fn=add)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        out, state = apply({"params": params}, *inputs, mutable="calibration")
    flat = convert.flatten(state.get("calibration", {}))
    stats = {f"{path.removesuffix('.stats')}.kernel": value for path, value in flat.items()}
    missing = sorted(set(layers) - set(stats))
    if missing:
        raise UserError("the model never calls these layers:\n  " + "\n  ".join(missing))
    return out, stats


def of_rows(
    x: Float[Array, "b *middle n_in"],
    weight: Float[Array, " b"] | Float[Array, "b n"],
    statistic: Statistic,
) -> LayerStats:
    """The statistic of the rows of an array, each with the weight of its sample or token."""
    each = weight.reshape(*weight.shape, *[1] * (x.ndim - weight.ndim)).astype(jnp.float32)
    x = x.astype(jnp.float32)
    repeats = np.prod(x.shape[weight.ndim : -1], dtype=np.float32)
    if statistic == "moments":
        moment = jnp.sum(each * x**2, axis=tuple(range(x.ndim - 1)))
    else:
        rows = (jnp.sqrt(each) * x).reshape(-1, x.shape[-1])
        moment = jnp.matmul(rows.T, rows, precision="highest")  # by default TF32 or bfloat16
    return LayerStats(moment, jnp.sum(each) * repeats)


def checked(stats: Stats) -> Stats:
    """The same statistics, if they are usable.

    Raises:
        ValueError: naming layers that read nothing, or a value that is not finite.
    """
    problems = []
    flags = zip(*map(np.asarray, _usable(stats)), strict=True)
    for path, (has_read, is_finite) in zip(sorted(stats), flags, strict=True):
        if not has_read:
            problems.append(f"{path} read nothing")
        elif not is_finite:
            problems.append(f"{path} read values that are not finite")
    if problems:
        raise UserError(
            "calibration failed; give prompts, or compute in float32:\n  " + "\n  ".join(problems)
        )
    return stats


def call_order(apply: Callable[..., Any], params: Any, *inputs: Any) -> list[str]:
    """Paths of the kernels of a model in the order of their use; nothing is computed."""
    order = []

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, nn.Dense | nn.Conv):
            order.append(_kernel_path(context.module))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(apply, {"params": params}, *inputs)
    return order


@jax.jit
def _usable(stats: Stats) -> tuple[Bool[Array, " layers"], Bool[Array, " layers"]]:
    """Whether each layer read something, and whether all that it read is finite; by name."""
    values = [stats[path] for path in sorted(stats)]
    finite = [jnp.isfinite(mean_square(value)).all() for value in values]
    return jnp.stack([value.weight > 0 for value in values]), jnp.stack(finite)


def _of_convolution(
    layer: nn.Conv,
    x: Float[Array, "b h w c"],
    weight: Float[Array, " b"],
    statistic: Statistic,
    fraction: float,
    key: Key[Array, ""] | None,
) -> LayerStats:
    assert layer.feature_group_count == 1, "no model here has groups"
    assert {layer.kernel_dilation, layer.input_dilation} <= {1, None, (1, 1)}, "nor dilation"
    kernel, strides = _pair(layer.kernel_size), _pair(layer.strides or 1)
    pads = _pads(layer.padding, x.shape[1:3], kernel, strides)
    height, width = (
        (n + sum(pad) - size) // stride + 1
        for n, pad, size, stride in zip(x.shape[1:3], pads, kernel, strides, strict=True)
    )
    total = jnp.sum(weight) * (height * width)
    if statistic == "moments":
        # Which positions each tap of the kernel reads, instead of the patches: one product.
        reads = [
            _reads(*sizes)
            for sizes in zip(x.shape[1:3], pads, kernel, strides, (height, width), strict=True)
        ]
        taps = jnp.einsum("b,ih,jw->ijbhw", weight, *reads).reshape(kernel[0] * kernel[1], -1)
        squares = x.astype(jnp.float32).reshape(-1, x.shape[-1]) ** 2
        return LayerStats(jnp.matmul(taps, squares, precision="highest").reshape(-1), total)
    positions = jnp.arange(height * width)
    if fraction < 1:
        assert key is not None, "positions are drawn by a key"
        count = max(round(fraction * len(positions)), 1)
        positions = jax.random.permutation(key, len(positions))[:count]
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    top, left = strides[0] * (positions // width), strides[1] * (positions % width)
    corner = top * x.shape[2] + left
    offset = np.arange(kernel[0])[:, None] * x.shape[2] + np.arange(kernel[1])[None]
    pixels = corner[:, None] + offset.reshape(1, -1)
    patches = x.reshape(x.shape[0], -1, x.shape[-1])[:, pixels]
    rows = patches.reshape(x.shape[0], len(positions), -1)
    return LayerStats(of_rows(rows, weight * (height * width / len(positions)), "gram")[0], total)


def _reads(
    size: int, pad: tuple[int, int], kernel: int, stride: int, num_out: int
) -> Float[np.ndarray, "kernel size"]:
    """1 where a tap of the kernel meets a position of the input, along one axis; else 0."""
    position = np.arange(kernel)[:, None] + stride * np.arange(num_out)[None] - pad[0]
    return (position[:, :, None] == np.arange(size)).any(axis=1).astype(np.float32)


def _pads(
    padding: Any, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Rows and columns that a convolution adds on each side."""
    if isinstance(padding, str):
        return tuple(jax.lax.padtype_to_pads(size, kernel, strides, padding))
    return tuple(_pair(pad) for pad in _pair(padding))


def _pair(x: Any) -> tuple[Any, Any]:
    first, second = (x, x) if isinstance(x, int) else x
    return first, second


def _kernel_path(layer: nn.Module) -> str:
    return ".".join((*layer.path, "kernel"))


def _hash(path: str) -> int:
    return zlib.crc32(path.encode())
