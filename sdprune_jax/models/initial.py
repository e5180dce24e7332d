"""Where trainings from nothing start."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def init_params(shapes: Any, seed: int, zero: Callable[[str], bool] = lambda _: False) -> Any:
    """Random parameters: kernels normal with variance 1 / fan-in, scales 1, biases 0.

    Drawn by numpy: compiling hundreds of random operations takes longer than a small training.

    Args:
        shapes: a tree of `jax.ShapeDtypeStruct`s.
        seed: seed of every draw.
        zero: says of a dotted path whether its kernel starts at 0.
    """
    rng = np.random.default_rng(seed)

    def init(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = ".".join(key.key for key in path)
        if name.endswith("scale") and leaf.ndim == 1:
            return np.ones(leaf.shape, np.float32)
        if name.endswith("bias") or zero(name):
            return np.zeros(leaf.shape, np.float32)
        fan_in = leaf.shape[-1] if name.endswith("embedding") else math.prod(leaf.shape[:-1])
        return rng.normal(size=leaf.shape, scale=fan_in**-0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(init, shapes)


def ends_a_block(path: str) -> bool:
    """Whether a kernel is the last to write into a residual stream: it starts at 0, as in DDPM."""
    return path.endswith(("conv2.kernel", "proj_out.kernel"))
