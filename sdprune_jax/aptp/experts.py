"""Stages `assign` and `materialise`: from codes and prompts to one smaller model each."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from sdprune_jax import checkpoint, config, macs, sites, tensors
from sdprune_jax.aptp import (
    balance,
    data,
    expert_files,
    gates,
    pictures,
    router,
    train_router,
    zero_padding,
)
from sdprune_jax.aptp.layout import Layout, layout_of, to_architecture
from sdprune_jax.data import cache, emoji

CODE_GATES = "code_gates.npy"  # beside a router that was not trained here: tools/convert.py
_TOLERANCE = 0.02  # of the budget, beyond which a warning is due
_ROWS = {"none": 512, "published": 2048}  # prompts at once; the published noise is of the row


def assign(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Gives every prompt of every split its expert, and every expert its architecture.

    Returns:
        `workdir/assign`: `assign.json`, with shares, balance and budget; `architectures.npy`,
        which of all gates each expert keeps; and `experts_<split>.npy`, of every prompt.

    Raises:
        ValueError: if the run has no finished router, or not the gates that `final_codes` asks for.
    """
    section, work = run.assign, pathlib.Path(run.workdir)
    assert section is not None
    model = checkpoint.open_model(checkpoint.directory_of(run.model))
    params, trained, values = train_router.load(work, model, mesh)
    output = work / "assign"
    made_from = cache.fingerprint(dataclasses.asdict(section), values["made_from"])
    if expert_files.is_complete(output, made_from, "assign.json"):
        return output

    layout = layout_of(sites.table(model.unet))
    if section.final_codes == "stored":
        code_gates = _stored_gates(work / "router", section.fit_budget)
    else:
        code_gates = _code_gates(params, layout, section.final_codes, values["seed"])
    similarity, labels = {}, {}
    for split in emoji.SPLITS:
        pairs = pictures.load(trained.data, split)
        prompts = pictures.prompts(trained.data, pairs, split, values["seed"])
        embedding = data.embeddings(
            trained.data, model, prompts.texts, mesh, work / "router" / "cache",
            values["variant"] or None,
        )  # fmt: skip
        similarity[split] = similarities(params, embedding, layout, code_gates, section.route_noise)
        labels[split] = prompts
    costs = train_router.budget_costs(trained, model, tuple(values["latent_size"]))
    offsets = np.zeros(trained.num_codes, np.float32)
    if section.balance == "optimal_transport":
        offsets = balance.offsets(similarity["train"])
    experts = {split: nearest(s, offsets) for split, s in similarity.items()}
    counts = np.bincount(experts["train"], minlength=trained.num_codes)
    keep, shift = np.asarray(code_gates) >= 0.5, np.zeros(1)
    unfitted = _kept(keep, layout, costs)
    if section.fit_budget != "none":
        average = np.atleast_2d(counts / counts.sum())
        weights = average if section.fit_budget == "average" else np.eye(trained.num_codes)
        logits, noise = _final_logits(params, section.final_codes, values["seed"])
        shift, keep = balance.fit_budget(
            lambda shift: np.asarray(gates.soft_gates(logits + shift, noise, layout)) >= 0.5,
            lambda keep: weights @ _kept(keep, layout, costs),
            trained.macs_budget,
            len(weights),
        )
    kept = _kept(keep, layout, costs)

    partial = expert_files.fresh(output)
    arrays = {"architectures": keep, "offsets": offsets, "code_gates": np.asarray(code_gates)}
    of_prompts = {f"experts_{split}": found for split, found in experts.items()}
    expert_files.save_arrays(partial, arrays | of_prompts)
    report = {}
    for split, found in experts.items():
        report[split] = balance.figures(found, kept, trained.macs_budget)
        report[split] |= balance.information(found, _labels(labels[split]))
    if len(dead := report["train"]["dead"]):
        logging.warning("%d of %d experts get no prompt: %s", len(dead), trained.num_codes, dead)
    if abs(report["val"]["macs"] / trained.macs_budget - 1) > _TOLERANCE:
        logging.warning("unseen prompts keep %.4f of the MACs", report["val"]["macs"])
    far = np.flatnonzero(abs(kept / trained.macs_budget - 1) > _TOLERANCE)
    if section.fit_budget == "each" and len(far):
        told = ", ".join(f"{index} keeps {kept[index]:.4f}" for index in far)
        logging.warning("no width gates bring these experts to the budget: %s", told)
    values = {
        "made_from": made_from,
        "section": dataclasses.asdict(section),
        "macs_budget": trained.macs_budget,
        "mac_counter": trained.mac_counter,
        "latent_size": values["latent_size"],
        "logit_shift": shift.tolist(),
        "macs_of_codes": unfitted.tolist(),
        "macs_of_experts": kept.tolist(),
        "units_that_differ": balance.differences(keep),
        "splits": report,
    }
    return expert_files.finish(partial, output, "assign.json", values)


def similarities(
    params: Any,
    embedding: Float[np.ndarray, "rows n"],
    layout: Layout,
    code_gates: Float[Array, "k d"],
    route_noise: str = "none",
) -> Float32[np.ndarray, "rows k"]:
    """Of prompts to codes; without noise, a prompt's are the same in any batch and place."""
    size = min(_ROWS[route_noise], len(embedding))
    noise = gates.MEDIAN_NOISE
    if route_noise == "published":
        noise = gates.published_noise(size, layout)
    match = jax.jit(functools.partial(router.match, layout=layout))
    parts = [
        np.asarray(match(params, jnp.asarray(embedding[rows]), code_gates=code_gates, noise=noise))
        for rows in cache.in_batches(len(embedding), size)
    ]
    return np.concatenate(parts)[: len(embedding)]


def nearest(
    similarity: Float32[np.ndarray, "rows k"], offsets: Float32[np.ndarray, " k"]
) -> Int32[np.ndarray, " rows"]:
    """The expert of each prompt. Rounding alone never decides: of equals, it is the first."""
    return np.round(similarity + offsets, 6).argmax(axis=1).astype(np.int32)


def of_prompts(
    workdir: pathlib.Path, model: checkpoint.Model, texts: Sequence[str], mesh: Mesh
) -> Int32[np.ndarray, " rows"]:
    """The experts of any prompts, by the router and the balance of a finished `assign`.

    Of a run with one expert all prompts are that one's, and no router is read.

    Raises:
        ValueError: if the run has not finished it, or has trained another router or cut other
            experts since.
    """
    cut = checkpoint.models_of_run(str(model.directory), workdir).get("routed", ())
    if len(cut) == 1:
        return np.zeros(len(texts), np.int32)
    values = read_assignment(workdir)
    params, trained, made = train_router.load(workdir, model, mesh)
    _check_assignment(workdir, values, made)
    layout, directory = layout_of(sites.table(model.unet)), workdir / "assign"
    cut_for = expert_files.record(workdir).get("assignment", values["made_from"])
    if cut and (len(cut) != trained.num_codes or cut_for != values["made_from"]):
        raise ValueError(
            f"{workdir} has {len(cut)} experts of another assignment of prompts than its own: make"
            " them again, with --config.materialise=build"
        )
    embedding = data.embeddings(
        trained.data, model, texts, mesh, None, variant=made["variant"] or None
    )
    code_gates = jnp.asarray(np.load(directory / "code_gates.npy"))
    noise = values["section"]["route_noise"]
    found = similarities(params, embedding, layout, code_gates, noise)
    return nearest(found, np.load(directory / "offsets.npy"))


def read_assignment(workdir: pathlib.Path) -> dict[str, Any]:
    """The record of a finished `assign`.

    Raises:
        ValueError: if there is none.
    """
    path = workdir / "assign" / "assign.json"
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no assignment of prompts: make one with --config.assign=build"
        )
    return tensors.read_json(path)


def _check_assignment(
    workdir: pathlib.Path, assigned: Mapping[str, Any], router_record: Mapping[str, Any]
) -> None:
    if assigned["made_from"] != cache.fingerprint(assigned["section"], router_record["made_from"]):
        raise ValueError(
            f"{workdir / 'assign'} is not of the router beside it: assign again,"
            " --config.assign=build"
        )


def materialise(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Cuts every expert out of the dense UNet: the weights are loaded first, then sliced.

    Returns:
        `workdir/experts`, of `expert_files.write`; with `zero_padded`, each also in the dense
        shape.

    Raises:
        ValueError: if the run has no assignment, or one of another router, or the UNet cannot be
            sliced so.
    """
    section, work = run.materialise, pathlib.Path(run.workdir)
    assert section is not None
    model = checkpoint.open_model(checkpoint.directory_of(run.model))
    assigned = read_assignment(work)
    _, trained, values = train_router.load(work, model, mesh)
    _check_assignment(work, assigned, values)
    purpose = expert_files.Purpose(
        trained.data, values["seed"], values["variant"], trained.mac_counter,
        tuple(assigned["latent_size"]), "router/cache",
    )  # fmt: skip
    made_from = cache.fingerprint(
        dataclasses.asdict(section), assigned["made_from"], dataclasses.asdict(purpose),
        cache.directory_state(model.directory),
    )  # fmt: skip
    if expert_files.is_written(work, made_from):
        return work / "experts"

    layout = layout_of(sites.table(model.unet))
    dense = checkpoint.load(model, "unet", variant=purpose.variant or None)
    dense = jax.tree.map(np.asarray, dense)

    def cuts() -> Iterator[expert_files.Cut]:
        for vector in np.load(work / "assign" / "architectures.npy"):
            architecture = to_architecture(vector, layout)
            params, unet_config = sites.slice_params(dense, model.unet, architecture)
            kept = {site: int(units.sum()) for site, units in architecture.items()}
            padded = None
            if section.zero_padded:
                padded = zero_padding.zero_params(dense, model.unet, architecture)
            yield expert_files.Cut(params, unet_config, kept, padded)

    rows = {split: np.load(work / "assign" / f"experts_{split}.npy") for split in emoji.SPLITS}
    record = {"made_from": made_from, "assignment": assigned["made_from"]}
    return expert_files.write(run, model, dense, cuts(), purpose, rows, section.save_dtype, record)


def _labels(prompts: pictures.Prompts) -> dict[str, Int[np.ndarray, " rows"]]:
    """What may be said of who draws a prompt: of embedded pictures, drawing style and group."""
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


def _code_gates(params: Any, layout: Layout, final_codes: str, seed: int) -> Float[Array, "k d"]:
    logits, noise = _final_logits(params, final_codes, seed)
    return gates.soft_gates(logits, noise, layout)


def _stored_gates(directory: pathlib.Path, fit_budget: str) -> Float[Array, "k d"]:
    """The gates of the last training step of a router that was converted."""
    path, problems = directory / CODE_GATES, []
    if not path.is_file():
        problems.append(f"{path} is not there: only routers of tools/convert.py have it")
    if fit_budget != "none":
        problems.append("fit_budget moves logits, not gates that are stored: set it to none")
    if problems:
        raise ValueError("config.assign.final_codes=stored is not possible: " + "; ".join(problems))
    return jnp.asarray(np.load(path))


def _kept(
    keep: Bool[np.ndarray, "k d"], layout: Layout, costs: macs.SiteMacs
) -> Float[np.ndarray, " k"]:
    """The share of all MACs that each expert keeps."""
    return np.asarray(train_router.kept_shares(jnp.asarray(keep, jnp.float32), layout, costs))
