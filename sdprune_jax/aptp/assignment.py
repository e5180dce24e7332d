"""Which expert draws which prompt."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
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

CODE_GATES = "code_gates.npy"  # beside a router that was converted from the published form

# Noise of the gates of prompts, and how many prompts are routed at once: published noise depends
# on the place of a prompt among them.
ROUTE_NOISES: Mapping[str, int] = {"none": 512, "published": 2048}


def similarities(
    params: Any,
    embeddings: Float[np.ndarray, "rows n"],
    layout: Layout,
    code_gates: Float[Array, "k d"],
    route_noise: str = "none",
) -> Float32[np.ndarray, "rows k"]:
    """Compares prompts with codes; without noise, a row depends on nothing but its prompt."""
    size = min(ROUTE_NOISES[route_noise], len(embeddings))
    noise = gates.MEDIAN_NOISE
    if route_noise == "published":
        noise = gates.published_noise(size, layout)
    match = jax.jit(functools.partial(router.match, layout=layout))
    parts = [
        np.asarray(match(params, jnp.asarray(embeddings[rows]), code_gates=code_gates, noise=noise))
        for rows in cache.in_batches(len(embeddings), size)
    ]
    return np.concatenate(parts)[: len(embeddings)]


def nearest(
    similarity: Float32[np.ndarray, "rows k"], offsets: Float32[np.ndarray, " k"]
) -> Int32[np.ndarray, " rows"]:
    """Returns the expert of each prompt: the first of those that only rounding tells apart."""
    return np.round(similarity + offsets, 6).argmax(axis=1).astype(np.int32)


def assign(
    workdir: pathlib.Path, model: model_directory.ModelConfig, texts: Sequence[str], mesh: Mesh
) -> Int32[np.ndarray, " rows"]:
    """Returns the expert of any prompt, by the router and the balance of a finished `assign`.

    If a run has one expert, all prompts are that one's, and no router is read.

    Raises:
        UserError: if the run has not finished `assign`, or has trained another router or cut other
            experts since.
    """
    experts = expert_files.models_of_run(str(model.directory), workdir).get("routed", ())
    if len(experts) == 1:
        return np.zeros(len(texts), np.int32)
    params, trained = router_training.load(workdir, model, mesh)
    record = read_assignment(workdir)
    output = artefacts.output_of("assign", workdir)
    if experts and not (len(experts) == trained.num_codes and _is_cut_for(output, workdir)):
        raise UserError(
            f"{workdir} has {len(experts)} experts of another assignment of prompts than its own:"
            " make them again, with --config.materialise=build"
        )
    encoders = encoded.Encoders(model, mesh, variant=trained.variant or None)
    embeddings = encoded.embed(encoders, texts, trained.data.encoder)
    layout = layout_of(sites.table(model.unet))
    code_gates = jnp.asarray(np.load(output.directory / "code_gates.npy"))
    similarity = similarities(params, embeddings, layout, code_gates, record.route_noise)
    return nearest(similarity, np.load(output.directory / "offsets.npy"))


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


def _is_cut_for(assignment: artefacts.Output, workdir: pathlib.Path) -> bool:
    """Whether the experts of a run are cut for an assignment; those without a record may be."""
    experts = artefacts.output_of("materialise", workdir)
    if not experts.record.is_file():
        return True
    cut_for = artefacts.inputs_of(experts).get("assign")
    return cut_for in (None, artefacts.identity(assignment))
