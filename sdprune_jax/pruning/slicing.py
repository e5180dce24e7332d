"""Stage `slice`: one smaller UNet for all prompts, by one criterion, at one budget of MACs.

It is written as a set of one expert, so that stage `finetune` trains it as it trains APTP's, and
what is compared is the architecture alone.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from sdprune_jax import checkpoint, config, convert, macs, sites
from sdprune_jax.aptp import expert_files, pictures
from sdprune_jax.data import cache, captions, emoji
from sdprune_jax.models import unet
from sdprune_jax.pruning import bksdm, gradients, obs, operators, structured, units
from sdprune_jax.pruning.run import Calibration


class _Task(NamedTuple):
    """What every criterion may read."""

    section: config.Slice
    model: checkpoint.Model
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


class _Made(NamedTuple):
    """A smaller UNet, and what there is to say of how it was made."""

    params: Any
    unet: unet.UNetConfig
    kept: dict[str, int]
    said: dict[str, Any]


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Cuts the UNet of the run as `run.slice` asks.

    Returns:
        `workdir/experts`, of `expert_files.write`, with one expert.

    Raises:
        ValueError: if the budget cannot be kept, or the UNet not be cut so.
    """
    section, work = run.slice, pathlib.Path(run.workdir)
    assert section is not None
    model = checkpoint.open_model(checkpoint.directory_of(run.model))
    made_from = cache.fingerprint(
        "slice", dataclasses.asdict(section), captions.state(section.calibration.prompts),
        run.seed, run.variant, cache.directory_state(model.directory),
    )  # fmt: skip
    if expert_files.is_written(work, made_from):
        return work / "experts"

    train = pictures.load(section.data, "train")
    size = section.latent_size or train.images.shape[1] // model.vae.downscale
    dense = checkpoint.load(model, "unet", dtype=np.float32, variant=run.variant or None)
    dense = jax.tree.map(np.asarray, dense)
    task = _Task(section, model, dense, (size, size), mesh, run.seed, run.variant)
    made = _CRITERIA[section.criterion](task)

    purpose = expert_files.Purpose(
        section.data, run.seed, run.variant, section.mac_counter, (size, size), "slice/cache"
    )
    rows = {}
    for split in emoji.SPLITS:
        pairs = pictures.load(section.data, split)
        texts = pictures.prompts(section.data, pairs, split, run.seed).texts
        rows[split] = np.zeros(len(texts), np.int32)
    record = {
        "made_from": made_from,
        "slice": {"criterion": section.criterion, "macs_budget": section.macs_budget} | made.said,
    }
    cut = expert_files.Cut(made.params, made.unet, made.kept)
    output = expert_files.write(run, model, dense, [cut], purpose, rows, section.save_dtype, record)
    logging.info("%s: one UNet for all prompts, by %s", output, section.criterion)
    return output


def _by_units(task: _Task, scores: structured.Scores, said: Mapping[str, Any]) -> _Made:
    """Removes units of the width sites, the lowest scores first."""
    architecture = structured.within_budget(scores, task.costs(), task.section.macs_budget)
    return _sliced(task, task.dense, architecture, said)


def _sliced(
    task: _Task, params: Any, architecture: sites.Architecture, said: Mapping[str, Any]
) -> _Made:
    params, smaller = sites.slice_params(params, task.model.unet, architecture)
    whole = {site.name: site.units for site in sites.table(task.model.unet)}
    kept = whole | {name: int(keep.sum()) for name, keep in architecture.items()}
    return _Made(params, smaller, kept, dict(said))


def _norm(task: _Task) -> _Made:
    return _by_units(task, structured.norm(task.dense, task.model.unet), {})


def _uniform(task: _Task) -> _Made:
    return _by_units(task, structured.uniform(task.model.unet, task.seed), {})


def _random(task: _Task) -> _Made:
    return _by_units(task, structured.random(task.model.unet, task.seed), {})


def _taylor(task: _Task) -> _Made:
    section = task.section
    found = gradients.of_pictures(
        task.model, task.dense, task.mesh, section.calibration.gradients, task.seed,
        task.variant or None,
    )  # fmt: skip
    scores = structured.taylor(
        task.dense, found.grads, task.model.unet, signs_cancel=section.criterion == "taylor"
    )
    return _by_units(task, scores, {"losses": found.losses})


def _obs(task: _Task) -> _Made:
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


def _operators(task: _Task) -> _Made:
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


def _bksdm(task: _Task) -> _Made:
    size = task.section.criterion.removeprefix("bksdm-")
    return _Made(*bksdm.cut(task.dense, task.model.unet, size), {})


_CRITERIA: Mapping[str, Callable[[_Task], _Made]] = {
    "uniform": _uniform,
    "random": _random,
    "norm": _norm,
    "taylor": _taylor,
    "diff-pruning": _taylor,
    "obs": _obs,
    "operators": _operators,
    **{f"bksdm-{size}": _bksdm for size in bksdm.SIZES},
}
