"""Between Flax and PyTorch parameters: names and layouts.

Module names in `models/` are the diffusers names, dots included, so a flattened Flax path is
the PyTorch name but for its last word. There is no table of names to keep in step.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from sdprune_jax import UserError

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# Projections of the VAE's attention, as diffusers named them until version 0.14.
_LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY_NAME = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)$")
_CURRENT_NAME = re.compile(r"\.attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)\.\w+$")


def torch_key(path: str) -> str:
    """The PyTorch name of the parameter at a dotted Flax path."""
    module, dot, leaf = path.rpartition(".")
    return module + dot + _LEAVES.get(leaf, leaf)


def torch_axes(path: str, ndim: int) -> tuple[int, ...]:
    """The order in which PyTorch stores the axes of a Flax parameter.

    Kernels are `[(h, w,) in, out]` here and `[out, in(, h, w)]` there; the rest is the same.
    """
    if path.rpartition(".")[2] != "kernel":
        return tuple(range(ndim))
    return {2: (1, 0), 4: (3, 2, 0, 1)}[ndim]


def to_torch(path: str, x: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """A view of the Flax parameter in PyTorch's layout."""
    return x.transpose(torch_axes(path, x.ndim))


def from_torch(path: str, x: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """The inverse of `to_torch`."""
    return x.transpose(np.argsort(torch_axes(path, x.ndim)))


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of nested parameters, by dotted path."""
    flat = {}
    for name, child in params.items():
        if isinstance(child, Mapping):
            flat |= {f"{name}.{path}": leaf for path, leaf in flatten(child).items()}
        else:
            flat[name] = child
    return flat


def unflatten(flat: Mapping[str, Any], like: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `flatten`; names hold dots, so the nesting is taken from `like`."""
    return {
        name: unflatten(flat, child, f"{prefix}{name}.")
        if isinstance(child, Mapping)
        else flat[prefix + name]
        for name, child in like.items()
    }


def match_names(names: Iterable[str], expected: Collection[str]) -> dict[str, str]:
    """Finds the PyTorch name that each name of a file stands for.

    Text encoders are stored with and without the prefix `text_model.`, and with the constant
    `position_ids`, which is left out; old VAEs say `query` where `to_q` is meant. A name that
    stands for nothing expected is returned as it is.

    Args:
        names: all the names of a file.
        expected: the names that the model has.

    Returns:
        Name in the file by name in the model.

    Raises:
        ValueError: if old and new names of the VAE are mixed, or two names mean the same.
    """
    names = sorted(names)
    legacy = [name for name in names if _LEGACY_NAME.search(name)]
    current = [name for name in names if _CURRENT_NAME.search(name)]
    if legacy and current:
        raise UserError(
            f"old and new names of attention are mixed ({legacy[0]}, {current[0]}): "
            "two files were merged; use one of them"
        )
    found = defaultdict(list)
    for name in names:
        if name.endswith("embeddings.position_ids"):
            continue
        current_name = _LEGACY_NAME.sub(lambda m: m[1] + _LEGACY[m[2]] + m[3], name)
        candidates = (name, f"text_model.{name}", current_name)
        found[next((c for c in candidates if c in expected), name)].append(name)
    problems = [f"{' and '.join(n)} are both {key}" for key, n in found.items() if len(n) > 1]
    if problems:
        raise UserError("tensors are stored twice:\n  " + "\n  ".join(problems))
    return {key: n[0] for key, n in found.items()}


def was_convolution(key: str) -> bool:
    """Whether the first VAEs stored this linear layer as a 1x1 convolution, `[out, in, 1, 1]`."""
    return key.endswith(".weight") and bool(_CURRENT_NAME.search(key))
