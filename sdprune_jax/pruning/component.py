"""Prunes one component in memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sdprune_jax import UserError, sharding, sites
from sdprune_jax.files import convert
from sdprune_jax.pruning import record, request, selection
from sdprune_jax.pruning.methods import STATISTIC, Method
from sdprune_jax.scoring import masks
from sdprune_jax.scoring.recorder import Stat

Parts = Iterable[tuple[Sequence[str], Mapping[str, Stat]]]
Calibrate = Callable[[Mapping[str, Any], list[str], str], Parts]


def prune_component(
    params: Mapping[str, Any],
    component: str,
    method: Method,
    calibrate: Calibrate | None = None,
    *,
    seed: int = 0,
    in_place: bool = False,
) -> tuple[dict[str, Any], record.ComponentRecord]:
    """Prunes a component in memory.

    Args:
        params: nested parameters of the component.
        component: "text_encoder" or "unet".
        method: which layers lose how many weights, and by what rule.
        calibrate: `Calibration.parts`, or what does the same; needed where the method has a
            `STATISTIC`. Each part is taken once those before it are pruned.
        seed: draws random scores.
        in_place: overwrite the kernels of `params`, which are numpy arrays, so that no second copy
            of them is held. Otherwise `params` stay as they are.

    Returns:
        The pruned parameters, whose pruned kernels are numpy arrays, and what was done.

    Raises:
        ValueError: if the method cannot be applied to these layers, or lacks its calibration.
    """
    flat, layers = convert.flatten(params), sites.prunable(params, component, method.scope)
    request.check({path: flat[path] for path in layers}, method)
    statistic = STATISTIC[method.method]
    if component != "unet" and statistic in ("weighted_gram", "gradient"):
        raise UserError(f"{method.method} reads what the UNet alone has: calls, and a loss")
    if statistic and calibrate is None:
        raise UserError(f"{method.method} reads the inputs of layers: give prompts to calibrate on")
    if not in_place:
        flat |= {path: np.array(sharding.to_host(flat[path])) for path in layers}
    kernels = {path: flat[path] for path in layers}
    before, zeros_before = record.sample(kernels), sum(map(record.num_zeros, kernels.values()))
    sizes = {path: kernel.size for path, kernel in kernels.items()}
    parts = calibrate(flat, layers, statistic) if statistic and calibrate else [(layers, {})]
    rows: dict[str, record.LayerRecord] = {}
    for names, stats in parts:
        part = {path: kernels[path] for path in names}
        removed = selection.removed_of_each(part, method, stats, sizes)
        for path, pruned in selection.prune(part, method, removed, stats, jax.random.key(seed)):
            threshold = record.threshold(kernels[path], pruned.keep)
            if pruned.kernel is not None:
                np.copyto(kernels[path], pruned.kernel, casting="same_kind")
            masks.zero(kernels[path], pruned.keep)
            rows[path] = record.layer(path, kernels[path], pruned, threshold)
        del stats  # before those of the next part are computed
    histogram = record.histogram(before, record.sample(kernels))
    num_parameters, in_order = sum(x.size for x in flat.values()), [rows[path] for path in layers]
    done = record.component(method, in_order, zeros_before, num_parameters, histogram)
    return convert.unflatten(flat, params), done
