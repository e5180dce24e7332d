"""Scores of the units of a UNet's sites, and which of them a budget of MACs lets stay."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64

from sdprune_jax import UserError, sites
from sdprune_jax.files import convert
from sdprune_jax.models import unet
from sdprune_jax.sites import macs

# By site, the score of each unit: the higher, the longer it stays.
Scores = Mapping[str, Float64[np.ndarray, " _units"]]

WIDTH = ("heads", "ff", "channels")


def uniform(config: unet.UNetConfig, seed: int, kinds: Collection[str] = WIDTH) -> Scores:
    """Scores by which every site of some kinds loses the same share of its units, at random."""
    rng = np.random.default_rng(seed)
    return {
        site.name: (rng.permutation(site.units) + 0.5) / site.units
        for site in _sites(config, kinds)
    }


def random(config: unet.UNetConfig, seed: int) -> Scores:
    """Scores drawn for every unit alone: sites lose unlike shares."""
    rng = np.random.default_rng(seed)
    return {site.name: rng.random(site.units) for site in _sites(config, WIDTH)}


def norm(params: Mapping[str, Any], config: unet.UNetConfig) -> Scores:
    """Sum of squares of the kernels of a unit, in units of the mean of its site.

    Source: group norm of DepGraph (https://arxiv.org/abs/2301.12900) as its library has it by
        default, which APTP's baseline ranks globally.
    """
    flat, scores = convert.flatten(params), {}
    for site in _sites(config, WIDTH):
        kernels = [(path, axis) for path, axis in site.members if path.endswith(".kernel")]
        total = sum(
            _per_unit(np.square(flat[p], dtype=np.float64), axis, site) for p, axis in kernels
        )
        scores[site.name] = total / (np.mean(total) or 1)
    return scores


def taylor(
    params: Mapping[str, Any],
    grads: Mapping[str, Any],
    config: unet.UNetConfig,
    signs_cancel: bool = True,
) -> Scores:
    """Change of the loss when all parameters of a unit go, to first order, without its sign.

    `grads` are summed over timesteps. Within a unit, the changes of single weights are summed with
    their signs or, unless `signs_cancel`, without.

    Source: Molchanov et al. 2019 (https://arxiv.org/abs/1906.10771), and Diff-Pruning, equation 8
        (https://arxiv.org/abs/2305.10924), without cancellation.
    """
    flat, slopes, scores = convert.flatten(params), convert.flatten(grads), {}
    for site in _sites(config, WIDTH):
        changes = [
            (np.multiply(flat[p], slopes[p], dtype=np.float64), axis) for p, axis in site.members
        ]
        if not signs_cancel:
            changes = [(np.abs(change), axis) for change, axis in changes]
        scores[site.name] = np.abs(sum(_per_unit(change, axis, site) for change, axis in changes))
    return scores


def within_budget(
    scores: Scores, costs: macs.SiteMacs, macs_budget: float, keep_one: bool = True
) -> sites.Architecture:
    """Removes units, those of the lowest scores first, until the budget is kept.

    Equal scores go by the order of sites and units.

    Args:
        scores: one a unit, for the sites that may lose any.
        costs: MACs of all sites.
        macs_budget: share of all MACs to keep; what is kept is less by under one unit.
        keep_one: leave every site at least one unit.

    Raises:
        ValueError: if the budget cannot be kept so.
    """
    names = [name for name, units in scores.items() for _ in units]
    index = [i for units in scores.values() for i in range(len(units))]
    values = np.concatenate([np.asarray(units) for units in scores.values()])
    keep = {name: np.ones(len(units), bool) for name, units in scores.items()}
    kept, target = float(costs.total), macs_budget * costs.total
    for row in np.argsort(values, kind="stable"):
        if kept <= target * (1 + 1e-12):
            break
        name = names[row]
        if keep_one and keep[name].sum() == 1:
            continue
        keep[name][index[row]] = False
        kept -= costs.sites[name] / len(keep[name])
    if kept > target * (1 + 1e-12):
        left = " but one unit of every site" if keep_one else ""
        raise UserError(
            f"macs_budget is {macs_budget}, the share of all MACs to keep: expected"
            f" from {kept / costs.total:.4f}, all{left} gone that this criterion may remove, to 1"
        )
    return keep


def _sites(config: unet.UNetConfig, kinds: Collection[str]) -> list[sites.Site]:
    return [site for site in sites.table(config) if site.kind in kinds]


def _per_unit(
    x: Float64[np.ndarray, "..."], axis: int, site: sites.Site
) -> Float64[np.ndarray, " units"]:
    """Sums over all that a unit has of an array, in every run of its axis."""
    runs = np.moveaxis(x, axis, 0).reshape(-1, site.units, site.unit_size, x.size // x.shape[axis])
    return runs.sum(axis=(0, 2, 3))
