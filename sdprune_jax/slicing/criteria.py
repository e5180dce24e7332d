"""One smaller UNet for all prompts, by one criterion, at one budget of MACs."""

import dataclasses
from collections.abc import Callable, Mapping
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
        model: the configs of a diffusers directory.
        params: float32 parameters of its UNet.
        criterion: what goes, and how much.
        calibration: of the UNet; needed where the criterion reads prompts or pictures.
        seed: draws units, and the noise under which operators are scored.

    Raises:
        ValueError: if the budget cannot be kept, the UNet not be cut so, or the criterion lacks its
            calibration.
    """
    if calibration is None and criterion.name in ("taylor", "diff-pruning", "obs", "operators"):
        raise UserError(f"{criterion.name} runs the model: give prompts to calibrate on")
    dense = jax.tree.map(sharding.to_host, params)
    return _CRITERIA[criterion.name](_Task(model, dense, criterion, calibration, seed))


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


class _Task(NamedTuple):
    """What every criterion may read: the arguments of `slice_unet`."""

    model: ModelConfig
    dense: Any
    criterion: Criterion
    calibration: Calibration | None
    seed: int


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


def _by_units(task: _Task, scores: structured.Scores, details: Mapping[str, Any]) -> Sliced:
    """Removes units of the width sites, the lowest scores first."""
    architecture = _chosen(task.model, task.criterion, scores)
    return _sliced(task, task.dense, architecture, details)


def _sliced(
    task: _Task, params: Any, architecture: sites.Architecture, details: Mapping[str, Any]
) -> Sliced:
    params, smaller = sites.slice_params(params, task.model.unet, architecture)
    whole = {site.name: site.units for site in sites.table(task.model.unet)}
    kept = whole | {name: int(keep.sum()) for name, keep in architecture.items()}
    return Sliced(params, smaller, kept, dict(details))


def _norm(task: _Task) -> Sliced:
    return _by_units(task, structured.norm(task.dense, task.model.unet), {})


def _uniform(task: _Task) -> Sliced:
    return _by_units(task, structured.uniform(task.model.unet, task.seed), {})


def _random(task: _Task) -> Sliced:
    return _by_units(task, structured.random(task.model.unet, task.seed), {})


def _taylor(task: _Task) -> Sliced:
    assert task.calibration is not None
    sums = task.calibration.gradient_sums(task.dense)
    signs_cancel = task.criterion.name == "taylor"
    scores = structured.taylor(task.dense, sums.grads, task.model.unet, signs_cancel)
    return _by_units(task, scores, {"losses": sums.losses})


def _obs(task: _Task) -> Sliced:
    """Every attention and feed-forward loses the same share; its last layer makes up for it."""
    assert task.calibration is not None
    table = {site.name: site for site in sites.table(task.model.unet)}
    scores = structured.uniform(task.model.unet, task.seed, kinds=("heads", "ff"))
    counts = _chosen(task.model, task.criterion, scores)
    closing = {table[name].members[-1][0]: name for name in counts}
    flat, architecture, loss = convert.flatten(task.dense), {}, 0.0
    for paths, stats in task.calibration.parts(flat, list(closing), "gram"):
        for path in paths:
            name, read = closing[path], stats[path]
            assert not isinstance(read, np.ndarray)
            factor = obs.factorise(read, task.criterion.damping)
            if not factor.is_positive:
                logging.warning("%s: no factor even with damping 1, so by magnitude", path)
            solution = units.remove(
                jnp.asarray(flat[path]), factor, table[name].unit_size, int((~counts[name]).sum())
            )
            flat[path], architecture[name] = np.asarray(solution.kernel), np.asarray(solution.keep)
            loss += float(np.nan_to_num(solution.loss))  # there is none without a factor
    params = convert.unflatten(flat, task.dense)
    return _sliced(task, params, {name: architecture[name] for name in counts}, {"loss": loss})


def _operators(task: _Task) -> Sliced:
    calibration = task.calibration
    assert calibration is not None
    names = [site.name for site in sites.operators(task.model.unet)]
    scores = operators.score(
        task.model,
        task.dense,
        calibration.mesh,
        calibration.text_states(),
        names,
        task.seed,
        calibration.settings,
    )
    architecture = _chosen(task.model, task.criterion, scores)
    details = {"scores": {name: float(score[0]) for name, score in scores.items()}}
    return _sliced(task, task.dense, architecture, details)


def _bksdm(task: _Task) -> Sliced:
    size = task.criterion.name.removeprefix("bksdm-")
    return Sliced(*bksdm.cut(task.dense, task.model.unet, size), {})


_CRITERIA: Mapping[str, Callable[[_Task], Sliced]] = {
    "uniform": _uniform,
    "random": _random,
    "norm": _norm,
    "taylor": _taylor,
    "diff-pruning": _taylor,
    "obs": _obs,
    "operators": _operators,
    **{f"bksdm-{size}": _bksdm for size in bksdm.SIZES},
}
