"""How many weights each layer gives up, from the sparsity asked of all."""

from collections.abc import Mapping

from sdprune_jax.pruning.masks import num_removed


def uniform(sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """The same sparsity in every layer, and the floor of `sparsity` over all of them together.

    Rounded cumulatively: each layer is within one weight of its share, and no layer's rounding
    adds up. Ramesh and Zhao round every layer down, which `each_floored` does.
    """
    removed, before, done = {}, 0, 0
    for name, size in sizes.items():
        before += size
        removed[name] = num_removed(before, sparsity) - done
        done += removed[name]
    return removed


def each_floored(sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """The floor of the same sparsity in every layer.

    Source: the authors' code of Ramesh and Zhao 2024 (https://arxiv.org/abs/2411.15113).
    """
    return {name: num_removed(size, sparsity) for name, size in sizes.items()}
