"""The loss of the router's training, its budget, and how its routing is judged."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sdprune_jax import UserError, artefacts, config, sharding, sites
from sdprune_jax.aptp import losses, router
from sdprune_jax.aptp.gates import MEDIAN_NOISE, forward_gates, hard, soft_gates
from sdprune_jax.aptp.layout import Layout, layout_of, to_gates
from sdprune_jax.aptp.records import RouterRecord
from sdprune_jax.files import model_directory
from sdprune_jax.files.weights import load_params
from sdprune_jax.models import unet
from sdprune_jax.sites import macs
from sdprune_jax.training import distillation, encoded, loop


def check(
    section: config.Router,
    model: model_directory.ModelConfig,
    layout: Layout,
    latent_size: tuple[int, int],
) -> None:
    """Refuses a budget that no architecture keeps.

    Raises:
        ValueError: naming the lowest one.
    """
    costs = budget_costs(section, model, latent_size)
    lowest = lowest_share(costs, layout)
    if not lowest <= section.macs_budget <= 1:
        raise UserError(
            f"config.router.macs_budget is {section.macs_budget}, the share of all MACs to keep:"
            f" expected from {lowest:.4f}, with one unit at every site and no block that can go,"
            " to 1"
        )


def budget_costs(
    section: config.Router, model: model_directory.ModelConfig, latent_size: tuple[int, int]
) -> macs.SiteMacs:
    """MACs of every site, as the budget counts them."""
    tokens = model.text_encoder.max_position_embeddings
    return macs.by_site(model.unet, latent_size, tokens, section.mac_counter)


def lowest_share(costs: macs.SiteMacs, layout: Layout) -> float:
    """The share of all MACs that is kept when everything is closed that can be."""
    vector = np.zeros((1, layout.size), np.float32)
    vector[:, layout.starts] = 1
    return float(kept_shares(jnp.asarray(vector), layout, costs)[0])


def kept_shares(
    gates: Float[Array, "b d"], layout: Layout, costs: macs.SiteMacs
) -> Float[Array, " b"]:
    """The share of all MACs that is kept if the gates are hard."""
    kept = losses.kept_macs(gates, layout, losses.site_shares(costs, layout))
    return losses.total_share(kept, costs)


def make_loss(
    section: config.Router,
    model: model_directory.ModelConfig,
    costs: macs.SiteMacs,
    layout: Layout,
    dtype: Any = jnp.float32,
) -> loop.LossFn:
    """The loss of the router's parameters, with the UNet frozen.

    The ungated UNet teaches the gated one in the same program. Batches are those of
    `data.Examples`, and `warms_up`, whether prompts still lend their own gates.
    """
    apply: Any = unet.UNet(
        model.unet, dtype, remat=section.remat, gate_position=section.gate_position
    ).apply
    shares = losses.site_shares(costs, layout)
    # Not saved with a checkpoint, but derived again whenever a training starts or resumes.
    budget = losses.removable_budget(costs, section.macs_budget)
    weights, schedule = dataclasses.asdict(section.losses), model.schedule

    def loss_fn(params, frozen, batch, key):
        keys = jax.random.split(key)
        noisy = encoded.noised(batch, keys[0], schedule, model.vae.scaling_factor)
        routing = router.route(
            params, batch["embedding"], keys[1], layout, warms_up=batch["warms_up"][:, None],
            optimal_transport=section.optimal_transport, epsilon=section.epsilon,
        )  # fmt: skip
        inputs = (noisy.latents, noisy.timestep, batch["text"].astype(jnp.float32))
        teacher, teacher_blocks = apply({"params": frozen}, *inputs, return_blocks=True)
        gates = to_gates(forward_gates(routing.gates, section.forward_gates), layout)
        student, blocks = apply({"params": frozen}, *inputs, gates, return_blocks=True)
        kept = losses.kept_macs(routing.gates, layout, shares)
        features = router.features(routing.prompt_gates, layout)
        parts = {
            "denoising": distillation.denoising(
                student, noisy.target, noisy.alpha_cumprod, schedule.prediction_type,
                section.min_snr_gamma or None, section.snr_weight,
            ),
            "output": distillation.output_distillation(student, teacher),
            "block": distillation.block_distillation(blocks, teacher_blocks),
            "resource": losses.resource(kept, budget, section.resource_kind),
            "contrastive": losses.contrastive(
                features, batch["embedding"], scale=section.contrastive_scale
            ),
            "highest": losses.highest(kept),
            "spread": losses.spread(kept),
            "code_pull": losses.code_pull(
                features, router.features(routing.code_gates, layout), routing.assignment
            ),
        }  # fmt: skip
        # While codes do not learn, nor do they weigh; a weight of 0 may meet an infinite loss.
        is_joint = 1 - batch["warms_up"].mean()
        parts["code_pull"] = parts["code_pull"] * is_joint
        loss = distillation.weighted_sum(parts, weights)
        counts = _counts(routing.assignment, section.num_codes)
        metrics = parts | {"loss": loss, "macs": losses.total_share(kept, costs).mean()}
        metrics |= {"codes_used": (counts > 0).sum(), "largest_share": counts.max() / counts.sum()}
        return loss, metrics

    return loss_fn


def load(
    workdir: pathlib.Path, model: model_directory.ModelConfig, mesh: Mesh
) -> tuple[loop.Params, config.Router, RouterRecord]:
    """Returns the router of a run: its parameters, the section that made it, and its record.

    Raises:
        UserError: if there is none, it is damaged, or it was trained for another model.
    """
    output = artefacts.output_of("router", workdir)
    if not output.record.is_file():
        raise UserError(
            f"{output.directory} has no finished router: train one first, with"
            " --config.router=build"
        )
    variant = artefacts.read(output.record, RouterRecord).variant
    state = artefacts.model_state(model.directory, variant)
    record = artefacts.require(output, RouterRecord, state)
    parts: dict[str, Any] = {
        "data": config.RouterData(**record.section["data"]),
        "losses": config.RouterLosses(**record.section["losses"]),
    }
    section = config.Router(**record.section | parts)
    layout = layout_of(sites.table(model.unet))
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    heads = {"kernel": shape(record.embedding_dim, layout.size), "bias": shape(layout.size)}
    shapes = {"predictor": {"heads": heads}, "codes": shape(section.num_codes, layout.size)}
    params = load_params(output.directory, shapes, sharding=sharding.replicated(mesh))
    return params, section, record


def _counts(assignment: Int[Array, " b"], num_codes: int) -> Float[Array, " k"]:
    return jax.nn.one_hot(assignment, num_codes).sum(axis=0)


def evaluation(
    embeddings: Float[Array, "rows n"],
    layout: Layout,
    costs: macs.SiteMacs,
    num_codes: int,
    params: Mapping[str, Any],
) -> dict[str, float]:
    """How unseen prompts are routed, without noise or balance, and what that keeps."""
    found = _route(jax.tree.map(sharding.to_host, params), embeddings, layout)
    counts = np.bincount(found[0], minlength=num_codes)
    kept = np.asarray(kept_shares(found[1], layout, costs))
    return {
        "val_macs": float(kept[found[0]].mean()),
        "val_codes_used": float((counts > 0).sum()),
        "val_largest_share": float(counts.max() / counts.sum()),
        "lowest_macs": float(kept.min()),
        "highest_macs": float(kept.max()),
    }


@functools.partial(jax.jit, static_argnames="layout")
def _route(
    params: Mapping[str, Any], embeddings: Float[Array, "rows n"], layout: Layout
) -> tuple[Int[Array, " rows"], Float[Array, "k d"]]:
    """Nearest code of every prompt, and the hard gates of every code."""
    nearest = jnp.argmax(router.match(params, embeddings, layout), axis=1)
    return nearest, hard(soft_gates(params["codes"], MEDIAN_NOISE, layout))
