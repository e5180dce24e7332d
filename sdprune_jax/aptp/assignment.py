"""Which expert draws which prompt."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int32

from sdprune_jax import UserError, artefacts, sites
from sdprune_jax.aptp import expert_files, gates, router, router_training
from sdprune_jax.aptp.layout import Layout, layout_of
from sdprune_jax.aptp.records import AssignRecord
from sdprune_jax.data import cache
from sdprune_jax.files import model_directory
from sdprune_jax.training import encoded

CODE_GATES = "code_gates.npy"  # beside a router that was not trained here: tools/convert.py


_ROWS = {"none": 512, "published": 2048}  # prompts at once; the published noise is of the row


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
    workdir: pathlib.Path, model: model_directory.ModelConfig, texts: Sequence[str], mesh: Mesh
) -> Int32[np.ndarray, " rows"]:
    """Returns the experts of any prompts, by the router and the balance of a finished `assign`.

    If a run has one expert, all prompts are that one's, and no router is read.

    Raises:
        UserError: if the run has not finished `assign`, or has trained another router or cut other
            experts since.
    """
    cut = expert_files.models_of_run(str(model.directory), workdir).get("routed", ())
    if len(cut) == 1:
        return np.zeros(len(texts), np.int32)
    params, trained, made = router_training.load(workdir, model, mesh)
    record = read_assignment(workdir)
    assigned = artefacts.output_of("assign", workdir)
    experts = artefacts.output_of("materialise", workdir)
    is_cut_for = True
    if experts.record.is_file():
        of_experts = artefacts.inputs_of(experts).get("assign")
        is_cut_for = of_experts in (None, artefacts.identity(assigned))
    if cut and not (is_cut_for and len(cut) == trained.num_codes):
        raise UserError(
            f"{workdir} has {len(cut)} experts of another assignment of prompts than its own: make"
            " them again, with --config.materialise=build"
        )
    layout, directory = layout_of(sites.table(model.unet)), assigned.directory
    embedding = encoded.embeddings(trained.data, model, texts, mesh, None, made.variant or None)
    code_gates = jnp.asarray(np.load(directory / "code_gates.npy"))
    found = similarities(params, embedding, layout, code_gates, record.section["route_noise"])
    return nearest(found, np.load(directory / "offsets.npy"))


def read_assignment(workdir: pathlib.Path) -> AssignRecord:
    """Returns the record of a finished `assign`.

    Raises:
        UserError: if there is none, it is damaged, or it is of another router than the run's.
    """
    output = artefacts.output_of("assign", workdir)
    if not output.record.is_file():
        raise UserError(
            f"{output.directory} has no assignment of prompts: make one with --config.assign=build"
        )
    record = artefacts.require(output, AssignRecord)
    router_of_run = artefacts.identity(artefacts.output_of("router", workdir))
    if artefacts.inputs_of(output)["router"] != router_of_run:
        raise UserError(
            f"{output.directory} is not of the router beside it: assign again,"
            " --config.assign=build"
        )
    return record
