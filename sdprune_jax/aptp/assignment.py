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

from sdprune_jax import UserError, sites
from sdprune_jax.aptp import expert_files, gates, router, router_training
from sdprune_jax.aptp.layout import Layout, layout_of
from sdprune_jax.data import cache
from sdprune_jax.files import model_directory, tensors
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
    workdir: pathlib.Path, model: model_directory.Model, texts: Sequence[str], mesh: Mesh
) -> Int32[np.ndarray, " rows"]:
    """The experts of any prompts, by the router and the balance of a finished `assign`.

    Of a run with one expert all prompts are that one's, and no router is read.

    Raises:
        ValueError: if the run has not finished it, or has trained another router or cut other
            experts since.
    """
    cut = model_directory.models_of_run(str(model.directory), workdir).get("routed", ())
    if len(cut) == 1:
        return np.zeros(len(texts), np.int32)
    values = read_assignment(workdir)
    params, trained, made = router_training.load(workdir, model, mesh)
    check_assignment(workdir, values, made)
    layout, directory = layout_of(sites.table(model.unet)), workdir / "assign"
    cut_for = expert_files.record(workdir).get("assignment", values["made_from"])
    if cut and (len(cut) != trained.num_codes or cut_for != values["made_from"]):
        raise UserError(
            f"{workdir} has {len(cut)} experts of another assignment of prompts than its own: make"
            " them again, with --config.materialise=build"
        )
    embedding = encoded.embeddings(
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
        raise UserError(
            f"{path.parent} has no assignment of prompts: make one with --config.assign=build"
        )
    return tensors.read_json(path)


def check_assignment(
    workdir: pathlib.Path, assigned: Mapping[str, Any], router_record: Mapping[str, Any]
) -> None:
    if assigned["made_from"] != cache.fingerprint(assigned["section"], router_record["made_from"]):
        raise UserError(
            f"{workdir / 'assign'} is not of the router beside it: assign again,"
            " --config.assign=build"
        )
