"""Prunes one component in memory."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sdprune_jax import config
from sdprune_jax.pruning import methods, record
from sdprune_jax.scoring import masks


def prune_component(
    flat: dict[str, np.ndarray],
    layers: Sequence[str],
    section: config.PruneComponent,
    parts: Iterable[tuple[Sequence[str], Mapping[str, methods.Stat]]],
    seed: int,
) -> dict[str, Any]:
    """Prunes a component in memory.

    Args:
        flat: arrays of the component by path; those of `layers` are changed in place.
        layers: paths of the kernels in scope.
        section: what to do.
        parts: layers that are pruned together and what they read, of `Calibration.parts`; each is
            taken once those before it are pruned.
        seed: of random scores.

    Returns:
        What was done, as in `prune.json`.
    """
    kernels = {path: flat[path] for path in layers}
    before = record.sample(kernels)
    zeros_before = sum(kernel.size - int(np.count_nonzero(kernel)) for kernel in kernels.values())
    sizes = {path: kernel.size for path, kernel in kernels.items()}
    rows: dict[str, dict[str, Any]] = {}
    for names, stats in parts:
        part = {path: kernels[path] for path in names}
        removed = methods.removed_of_each(part, section, stats, sizes)
        for path, found in methods.prune(part, section, removed, stats, jax.random.key(seed)):
            kernel = flat[path]
            threshold = record.threshold(kernel, found.keep)
            if found.kernel is not None:
                np.copyto(kernel, found.kernel, casting="same_kind")
            masks.zero(kernel, found.keep)
            rows[path] = record.layer(path, kernel, found, threshold)
        del stats  # before those of the next part are computed
    prunable = sum(sizes.values())
    zeros = sum(row["zeros"] for row in rows.values())
    said = dataclasses.asdict(section)
    names = (
        "method", "group", "pattern", "allocation", "scope", "threshold", "overrides", "band",
    )  # fmt: skip
    return {
        "requested": section.sparsity,
        **{name: said[name] for name in names if said[name] is not None},
        "prunable": prunable,
        "zeros": zeros,
        "zeros_before": zeros_before,
        "of_prunable": zeros / prunable,
        "all_zeros": sum(x.size - int(np.count_nonzero(x)) for x in flat.values()),
        "layers": [rows[path] for path in layers],
        "histogram": record.histogram(before, record.sample(kernels)),
    }
