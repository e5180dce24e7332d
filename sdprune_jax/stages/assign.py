"""Stages `assign` and `materialise`: from codes and prompts to one smaller model each."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sdprune_jax import UserError, artefacts, config, sites
from sdprune_jax.aptp import assignment, balance, expert_files, gates, router_training
from sdprune_jax.aptp.layout import Layout, layout_of
from sdprune_jax.aptp.records import AssignRecord, RouterRecord, SplitRecord
from sdprune_jax.data import emoji, pictures
from sdprune_jax.sites import macs
from sdprune_jax.stages import cost_card, inputs
from sdprune_jax.training import encoded

_TOLERANCE = 0.02  # share of the budget that MACs may be off before a warning is due


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Gives every prompt of every split its expert, and every expert its architecture.

    Returns:
        `workdir/assign`: `assign.json`, with shares, balance and budget; `architectures.npy`,
        which of all gates each expert keeps; and `experts_<split>.npy`, of every prompt.
    """
    section, work, model = run.assign, pathlib.Path(run.workdir), inputs.open_model(run)
    assert section is not None
    output = artefacts.output_of("assign", work)
    params, trained = router_training.load(work, model, mesh)
    source, budget = trained.data, trained.macs_budget
    made_from = {
        "section": dataclasses.asdict(section),
        "model": artefacts.model_state(model.directory, trained.variant),
        "router": artefacts.identity(artefacts.output_of("router", work)),
        "pictures": pictures.checksums_of(source.dataset, source.directory),
    }
    if artefacts.is_complete(output, made_from):
        return output.directory
    layout = layout_of(sites.table(model.unet))
    code_gates = _code_gates(section, params, trained.seed, layout, work / "router")
    cache_dir, similarity, labels = work / "router" / "cache", {}, {}
    encoders = encoded.Encoders(model, mesh, cache_dir, trained.variant or None)
    for split in emoji.SPLITS:
        labels[split], embeddings = _prompts(trained, encoders, split)
        similarity[split] = assignment.similarities(
            params, embeddings, layout, code_gates, section.route_noise
        )
    offsets = np.zeros(trained.num_codes, np.float32)
    if section.balance == "optimal_transport":
        offsets = balance.offsets(similarity["train"])
    experts = {split: assignment.nearest(s, offsets) for split, s in similarity.items()}
    costs = router_training.budget_costs(model, trained.latent_size, trained.mac_counter)
    shift, keep = np.zeros(1), np.asarray(code_gates) >= 0.5
    unfitted = _kept(keep, layout, costs)
    if section.fit_budget != "none":
        shift, keep = _fit_budget(section, params, trained, experts["train"], costs, layout)
    kept = _kept(keep, layout, costs)
    splits = {s: balance.figures(experts[s], kept, budget, labels[s]) for s in experts}
    _warn(splits, kept, budget, section.fit_budget)
    arrays = {"architectures": keep, "offsets": offsets, "code_gates": np.asarray(code_gates)}
    arrays |= {f"experts_{split}": expert for split, expert in experts.items()}
    with artefacts.writing(output, made_from) as partial:
        expert_files.save_arrays(partial.directory, arrays)
        partial.record = AssignRecord(
            route_noise=section.route_noise,
            macs_budget=budget,
            mac_counter=trained.mac_counter,
            latent_size=trained.latent_size,
            logit_shift=shift.tolist(),
            macs_of_codes=unfitted.tolist(),
            macs_of_experts=kept.tolist(),
            units_that_differ=balance.differences(keep),
            splits=splits,
        )
    return output.directory


def _prompts(
    trained: RouterRecord, encoders: encoded.Encoders, split: str
) -> tuple[dict[str, Int[np.ndarray, " _rows"]], Float[np.ndarray, "rows n"]]:
    """Returns the labels of the prompts of the router's pictures, and what it reads of them."""
    images, count = pictures.load(trained.data, split), trained.data.captions_per_image
    prompts = pictures.prompts(images, split, trained.seed, count)
    return _labels(prompts), encoded.embed(encoders, prompts.texts, trained.data.encoder)


def _fit_budget(
    section: config.Assign,
    params: Any,
    trained: RouterRecord,
    expert: Int[np.ndarray, " rows"],
    costs: macs.SiteMacs,
    layout: Layout,
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, "k d"]]:
    """Shifts the logits of all experts, or of each, until their MACs are as the budget says."""
    counts = np.bincount(expert, minlength=trained.num_codes)
    average = np.atleast_2d(counts / counts.sum())
    weights = average if section.fit_budget == "average" else np.eye(trained.num_codes)
    logits, noise = _final_logits(params, section.final_codes, trained.seed)
    return balance.fit_budget(
        lambda shift: np.asarray(gates.soft_gates(logits + shift, noise, layout)) >= 0.5,
        lambda keep: weights @ _kept(keep, layout, costs),
        trained.macs_budget,
        len(weights),
    )


def _warn(
    splits: Mapping[str, SplitRecord],
    kept: Float[np.ndarray, " k"],
    budget: float,
    fit_budget: str,
) -> None:
    """Names experts without prompts and what is far from the budget."""
    if dead := splits["train"].dead:
        logging.warning("%d of %d experts get no prompt: %s", len(dead), len(kept), dead)
    if abs(splits["val"].macs / budget - 1) > _TOLERANCE:
        logging.warning("unseen prompts keep %.4f of the MACs", splits["val"].macs)
    far = np.flatnonzero(abs(kept / budget - 1) > _TOLERANCE)
    if fit_budget == "each" and len(far):
        shares = ", ".join(f"{index} keeps {kept[index]:.4f}" for index in far)
        logging.warning("no width gates bring these experts to the budget: %s", shares)


def _labels(prompts: pictures.Prompts) -> dict[str, Int[np.ndarray, " rows"]]:
    """Returns drawing style and group of each prompt, which embedded pictures alone have."""
    if prompts.concept is None or prompts.style is None:
        return {}
    groups = [emoji.concepts()[c].group for c in prompts.concept]
    return {"style": prompts.style, "group": np.unique(groups, return_inverse=True)[1]}


def _final_logits(
    params: Any, final_codes: str, seed: int
) -> tuple[Float[Array, "k d"], Float[Array, "..."]]:
    """Logits of the codes, and the noise that decides their gates: its median, or one draw."""
    codes = jnp.asarray(params["codes"])
    if final_codes == "median":
        return codes, jnp.asarray(gates.MEDIAN_NOISE)
    return codes, gates.gumbel(jax.random.uniform(jax.random.key(seed), codes.shape))


def _code_gates(
    section: config.Assign, params: Any, seed: int, layout: Layout, directory: pathlib.Path
) -> Float[Array, "k d"]:
    if section.final_codes == "stored":
        return _stored_gates(directory, section.fit_budget)
    logits, noise = _final_logits(params, section.final_codes, seed)
    return gates.soft_gates(logits, noise, layout)


def _stored_gates(directory: pathlib.Path, fit_budget: str) -> Float[Array, "k d"]:
    """The gates of the last training step of a router that was converted."""
    path, problems = directory / assignment.CODE_GATES, []
    if not path.is_file():
        problems.append(f"{path} is not there: only routers that sdprune convert wrote have it")
    if fit_budget != "none":
        problems.append("fit_budget moves logits, not gates that are stored: set it to none")
    if problems:
        raise UserError("config.assign.final_codes=stored is not possible: " + "; ".join(problems))
    return jnp.asarray(np.load(path))


def _kept(
    keep: Bool[np.ndarray, "k d"], layout: Layout, costs: macs.SiteMacs
) -> Float[np.ndarray, " k"]:
    """The share of all MACs that each expert keeps."""
    return np.asarray(router_training.kept_shares(jnp.asarray(keep, jnp.float32), layout, costs))


def check(run: config.Run, num_devices: int) -> None:  # noqa: ARG001
    """Checks that there is, or will be, a router, and stored gates if they are asked for."""
    assert run.assign is not None
    output = artefacts.output_of("router", run.workdir)
    if not run.router and not output.record.is_file():
        raise UserError(
            f"{output.directory} has no finished router: train one first, with"
            " --config.router=build"
        )
    if run.assign.final_codes == "stored":
        _stored_gates(output.directory, run.assign.fit_budget)


def plan(run: config.Run, planned: cost_card.Planned) -> str:  # noqa: ARG001
    """Returns nothing: it costs little beside the other stages."""
    return ""
