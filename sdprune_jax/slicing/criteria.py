"""One smaller UNet for all prompts, by one criterion, at one budget of MACs."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from sdprune_jax import UserError, sharding, sites
from sdprune_jax.files import convert
from sdprune_jax.files.model_directory import ModelConfig
from sdprune_jax.models import unet
from sdprune_jax.scoring import obs
from sdprune_jax.scoring.calibration import Calibration
from sdprune_jax.sites import macs
from sdprune_jax.slicing import bksdm, operators, structured, units

Name = Literal[
    "norm",
    "uniform",
    "random",
    "taylor",
    "diff-pruning",
    "obs",
    "operators",
    "bksdm-base",
    "bksdm-small",
    "bksdm-tiny",
]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """What goes from a UNet, and how much; made by `ByNorm`, `BKSDM` and the others below.

    Attributes:
        name: the rule that scores units, or the fixed list of blocks.
        macs_budget: share of the UNet's MACs to keep, undershot by less than a unit.
        mac_counter: "exact", or "paper" as APTP's code counts.
        latent_size: height and width at which MACs are counted; None for the model's own.
        damping: added by `ByOBS` to Gram matrices, as a fraction of their mean diagonal.
    """

    name: Name
    macs_budget: float = 0.8
    _: dataclasses.KW_ONLY
    mac_counter: Literal["exact", "paper"] = "exact"
    latent_size: tuple[int, int] | None = None
    damping: float = 0.01


ByNorm = partial(Criterion, "norm")
"""Removes the units of the smallest weights."""

ByTaylor = partial(Criterion, "taylor")
"""Removes the units that change the denoising loss least, to first order."""

DiffPruning = partial(Criterion, "diff-pruning")
"""As `ByTaylor`, but the changes of a unit's single weights are summed without their signs."""

ByOBS = partial(Criterion, "obs")
"""Removes heads and neurons, and lets those that stay make up for them."""

LDPruner = partial(Criterion, "operators")
"""Removes whole ResNets and transformers, those first that move the latents least."""

Uniform = partial(Criterion, "uniform")
"""Removes the same share of the units of every site, drawn by the seed."""

RandomUnits = partial(Criterion, "random")
"""Removes units drawn by the seed from all sites together."""


def BKSDM(size: bksdm.Size) -> Criterion:  # noqa: N802
    """Removes a fixed list of blocks, without a budget."""
    return Criterion(cast(Name, f"bksdm-{size}"))


class Sliced(NamedTuple):
    """A smaller UNet.

    Attributes:
        params: its parameters, on the host.
        unet: its architecture.
        kept: by site of the dense UNet, how many units stay.
        details: what the criterion measured, for the record.
    """

    params: Any
    unet: unet.UNetConfig
    kept: dict[str, int]
    details: dict[str, Any]


def slice_unet(
    model: ModelConfig,
    params: Mapping[str, Any],
    criterion: Criterion,
    calibration: Calibration | None = None,
    *,
    seed: int = 0,
) -> Sliced:
    """Cuts units or blocks out of a UNet, whose parameters stay as they are.

    Args:
        model: architecture of the whole model.
        params: float32 parameters of its UNet.
        criterion: what goes, and how much.
        calibration: needed where the criterion runs the UNet; None otherwise.
        seed: draws units, and the noise under which operators are scored.

    Raises:
        ValueError: if the budget cannot be kept, the UNet not be cut so, or the criterion lacks its
            calibration.
    """
    if calibration is None and criterion.name in ("taylor", "diff-pruning", "obs", "operators"):
        raise UserError(f"{criterion.name} runs the model: give prompts to calibrate on")
    dense = jax.tree.map(sharding.to_host, params)
    if criterion.name.startswith("bksdm-"):
        return Sliced(*bksdm.cut(dense, model.unet, criterion.name.removeprefix("bksdm-")), {})
    if criterion.name == "obs":
        assert calibration is not None
        dense, keep, details = _compensated(model, dense, criterion, calibration, seed)
    else:
        scores, details = _scores(model, dense, criterion, calibration, seed)
        keep = _chosen(model, criterion, scores)
    smaller, config = sites.slice_params(dense, model.unet, keep)
    kept = {site.name: site.units for site in sites.table(model.unet)}
    kept |= {name: int(units.sum()) for name, units in keep.items()}
    return Sliced(smaller, config, kept, details)


def check(model: ModelConfig, criterion: Criterion) -> None:
    """Checks before any score is computed that a UNet can be cut to its budget.

    Raises:
        UserError: naming the least share of MACs that the criterion can keep, or why BK-SDM has no
            student of this UNet.
    """
    if criterion.name.startswith("bksdm-"):
        bksdm.student(model.unet, criterion.name.removeprefix("bksdm-"))
        return
    kinds = ("heads", "ff") if criterion.name == "obs" else structured.WIDTH
    scores = structured.uniform(model.unet, 0, kinds)
    if criterion.name == "operators":
        scores = {site.name: np.zeros(1) for site in sites.operators(model.unet)}
    _chosen(model, criterion, scores)


def _chosen(
    model: ModelConfig, criterion: Criterion, scores: structured.Scores
) -> sites.Architecture:
    """The units that stay within the budget; those of the lowest scores go first."""
    by_operator = criterion.name == "operators"
    count = macs.by_operator if by_operator else macs.by_site
    size = criterion.latent_size or (model.unet.sample_size,) * 2
    tokens = model.text_encoder.max_position_embeddings
    costs = count(model.unet, size, tokens, criterion.mac_counter)
    return structured.within_budget(scores, costs, criterion.macs_budget, keep_one=not by_operator)


def _scores(
    model: ModelConfig, dense: Any, criterion: Criterion, calibration: Calibration | None, seed: int
) -> tuple[structured.Scores, dict[str, Any]]:
    """Scores of all units, and what the criterion has measured."""
    config, name = model.unet, criterion.name
    if name == "norm":
        return structured.norm(dense, config), {}
    if name == "uniform":
        return structured.uniform(config, seed), {}
    if name == "random":
        return structured.random(config, seed), {}
    assert calibration is not None
    if name == "operators":
        blocks = [site.name for site in sites.operators(config)]
        text, mesh, settings = calibration.text_states(), calibration.mesh, calibration.settings
        scores = operators.score(model, dense, mesh, text, blocks, seed, settings)
        return scores, {"scores": {block: float(score[0]) for block, score in scores.items()}}
    sums = calibration.gradient_sums(dense)
    scores = structured.taylor(dense, sums.grads, config, signs_cancel=name == "taylor")
    return scores, {"losses": sums.losses}


def _compensated(
    model: ModelConfig, dense: Any, criterion: Criterion, calibration: Calibration, seed: int
) -> tuple[Any, sites.Architecture, dict[str, Any]]:
    """Every attention and feed-forward loses the same share; its last layer makes up for it."""
    table = {site.name: site for site in sites.table(model.unet)}
    scores = structured.uniform(model.unet, seed, kinds=("heads", "ff"))
    counts = _chosen(model, criterion, scores)
    closing = {table[name].members[-1][0]: name for name in counts}
    flat, keep, loss = convert.flatten(dense), {}, 0.0
    for paths, stats in calibration.parts(flat, list(closing), "gram"):
        for path in paths:
            name, read = closing[path], stats[path]
            assert not isinstance(read, np.ndarray)
            factor = obs.factorise(read, criterion.damping)
            if not factor.is_positive:
                logging.warning("%s: no factor even with damping 1, so by magnitude", path)
            size, num_removed = table[name].unit_size, int((~counts[name]).sum())
            solution = units.remove(jnp.asarray(flat[path]), factor, size, num_removed)
            flat[path], keep[name] = np.asarray(solution.kernel), np.asarray(solution.keep)
            loss += float(np.nan_to_num(solution.loss))  # there is none without a factor
    in_order = {name: keep[name] for name in counts}
    return convert.unflatten(flat, dense), in_order, {"loss": loss}
