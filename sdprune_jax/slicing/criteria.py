"""One smaller UNet for all prompts, by one criterion, at one budget of MACs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from sdprune_jax import config, sites
from sdprune_jax.files import convert, model_directory
from sdprune_jax.models import unet
from sdprune_jax.scoring import gradients, obs
from sdprune_jax.scoring.calibration import Calibration
from sdprune_jax.sites import macs
from sdprune_jax.slicing import bksdm, operators, structured, units


class Task(NamedTuple):
    """What every criterion may read."""

    section: config.Slice
    model: model_directory.Model
    dense: Any  # parameters of the UNet: float32, on the host
    latent_size: tuple[int, int]
    mesh: Mesh
    seed: int
    variant: str

    def costs(self, of: Callable[..., macs.SiteMacs] = macs.by_site) -> macs.SiteMacs:
        tokens = self.model.text_encoder.max_position_embeddings
        return of(self.model.unet, self.latent_size, tokens, self.section.mac_counter)

    def calibration(self) -> Calibration:
        return Calibration(
            self.section.calibration, self.model, "unet", self.mesh, seed=self.seed,
            variant=self.variant,
        )  # fmt: skip


class Made(NamedTuple):
    """A smaller UNet, and what there is to say of how it was made."""

    params: Any
    unet: unet.UNetConfig
    kept: dict[str, int]
    said: dict[str, Any]


def _by_units(task: Task, scores: structured.Scores, said: Mapping[str, Any]) -> Made:
    """Removes units of the width sites, the lowest scores first."""
    architecture = structured.within_budget(scores, task.costs(), task.section.macs_budget)
    return _sliced(task, task.dense, architecture, said)


def _sliced(
    task: Task, params: Any, architecture: sites.Architecture, said: Mapping[str, Any]
) -> Made:
    params, smaller = sites.slice_params(params, task.model.unet, architecture)
    whole = {site.name: site.units for site in sites.table(task.model.unet)}
    kept = whole | {name: int(keep.sum()) for name, keep in architecture.items()}
    return Made(params, smaller, kept, dict(said))


def _norm(task: Task) -> Made:
    return _by_units(task, structured.norm(task.dense, task.model.unet), {})


def _uniform(task: Task) -> Made:
    return _by_units(task, structured.uniform(task.model.unet, task.seed), {})


def _random(task: Task) -> Made:
    return _by_units(task, structured.random(task.model.unet, task.seed), {})


def _taylor(task: Task) -> Made:
    section = task.section
    found = gradients.of_pictures(
        task.model, task.dense, task.mesh, section.calibration.gradients, task.seed,
        task.variant or None,
    )  # fmt: skip
    scores = structured.taylor(
        task.dense, found.grads, task.model.unet, signs_cancel=section.criterion == "taylor"
    )
    return _by_units(task, scores, {"losses": found.losses})


def _obs(task: Task) -> Made:
    """Every attention and feed-forward loses the same share; its last layer makes up for it."""
    table = {site.name: site for site in sites.table(task.model.unet)}
    scores = structured.uniform(task.model.unet, task.seed, kinds=("heads", "ff"))
    counts = structured.within_budget(scores, task.costs(), task.section.macs_budget)
    closing = {table[name].members[-1][0]: name for name in counts}
    flat, architecture, loss = convert.flatten(task.dense), {}, 0.0
    for paths, stats in task.calibration().parts(flat, list(closing), "gram"):
        for path in paths:
            name, read = closing[path], stats[path]
            assert not isinstance(read, np.ndarray)
            factor = obs.factorise(read, task.section.damping)
            if not factor.is_positive:
                logging.warning("%s: no factor even with damping 1, so by magnitude", path)
            solution = units.remove(
                jnp.asarray(flat[path]), factor, table[name].unit_size, int((~counts[name]).sum())
            )
            flat[path], architecture[name] = np.asarray(solution.kernel), np.asarray(solution.keep)
            loss += float(np.nan_to_num(solution.loss))  # there is none without a factor
    params = convert.unflatten(flat, task.dense)
    return _sliced(task, params, {name: architecture[name] for name in counts}, {"loss": loss})


def _operators(task: Task) -> Made:
    calibration = task.calibration()
    text = calibration.text_states()
    names = [site.name for site in sites.operators(task.model.unet)]
    scores = operators.score(
        task.model, task.dense, task.mesh, text[:-1], text[-1:], names, task.seed,
        calibration.trajectory(),
    )  # fmt: skip
    costs = task.costs(macs.by_operator)
    architecture = structured.within_budget(scores, costs, task.section.macs_budget, keep_one=False)
    said = {"scores": {name: float(score[0]) for name, score in scores.items()}}
    return _sliced(task, task.dense, architecture, said)


def _bksdm(task: Task) -> Made:
    size = task.section.criterion.removeprefix("bksdm-")
    return Made(*bksdm.cut(task.dense, task.model.unet, size), {})


def check(section: config.Slice, model: model_directory.Model, latent_size: int) -> None:
    """Checks before any score is computed that a UNet can be cut to its budget.

    Raises:
        UserError: naming the least share of MACs that the criterion can keep, or why BK-SDM has no
            student of this UNet.
    """
    if section.criterion.startswith("bksdm-"):
        bksdm.student(model.unet, section.criterion.removeprefix("bksdm-"))
        return
    size = (section.latent_size or latent_size,) * 2
    by_operator = section.criterion == "operators"
    count = macs.by_operator if by_operator else macs.by_site
    tokens = model.text_encoder.max_position_embeddings
    costs = count(model.unet, size, tokens, section.mac_counter)
    kinds = ("heads", "ff") if section.criterion == "obs" else structured.WIDTH
    scores = structured.uniform(model.unet, 0, kinds)
    if by_operator:
        scores = {site.name: np.zeros(1) for site in sites.operators(model.unet)}
    structured.within_budget(scores, costs, section.macs_budget, keep_one=not by_operator)


CRITERIA: Mapping[str, Callable[[Task], Made]] = {
    "uniform": _uniform,
    "random": _random,
    "norm": _norm,
    "taylor": _taylor,
    "diff-pruning": _taylor,
    "obs": _obs,
    "operators": _operators,
    **{f"bksdm-{size}": _bksdm for size in bksdm.SIZES},
}
