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

from sdprune_jax import UserError, artefacts, sharding, sites
from sdprune_jax.aptp import losses, router
from sdprune_jax.aptp.gates import MEDIAN_NOISE, forward_gates, hard, soft_gates
from sdprune_jax.aptp.layout import Layout, layout_of, to_gates
from sdprune_jax.aptp.records import RouterRecord
from sdprune_jax.files import model_directory
from sdprune_jax.files.weights import load_params
from sdprune_jax.models import unet
from sdprune_jax.sites import macs
from sdprune_jax.training import distillation, encoded, loop


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """What the router is trained for."""

    weights: Mapping[str, float]  # weight of each loss by its name in `make_loss`
    macs_budget: float  # share of the UNet's MACs to keep
    optimal_transport: bool  # balance the assignment of every batch
    epsilon: float  # softness of that balance
    forward_gates: str  # what the UNet multiplies by: one of `gates.FORWARD_GATES`
    contrastive_scale: float  # factor of the contrastive loss
    resource_kind: str  # one of `losses.RESOURCE_KINDS`
    min_snr_gamma: float  # see `distillation.denoising`
    snr_weight: str  # see `distillation.denoising`


def check_budget(macs_budget: float, costs: macs.SiteMacs, layout: Layout) -> None:
    """Refuses a budget that no architecture keeps.

    Raises:
        UserError: naming the lowest one.
    """
    lowest = lowest_share(costs, layout)
    if not lowest <= macs_budget <= 1:
        raise UserError(
            f"config.router.macs_budget is {macs_budget}, the share of all MACs to keep:"
            f" expected from {lowest:.4f}, with one unit at every site and no block that can go,"
            " to 1"
        )


def budget_costs(
    model: model_directory.ModelConfig, latent_size: tuple[int, int], mac_counter: str
) -> macs.SiteMacs:
    """Counts the MACs of every site, as the budget does."""
    tokens = model.text_encoder.max_position_embeddings
    return macs.by_site(model.unet, latent_size, tokens, mac_counter)


def lowest_share(costs: macs.SiteMacs, layout: Layout) -> float:
    """Returns the share of all MACs that is kept when everything is closed that can be."""
    vector = np.zeros((1, layout.size), np.float32)
    vector[:, layout.starts] = 1
    return float(kept_shares(jnp.asarray(vector), layout, costs)[0])


def kept_shares(
    gates: Float[Array, "b d"], layout: Layout, costs: macs.SiteMacs
) -> Float[Array, " b"]:
    """Returns the share of all MACs that each vector keeps if its gates are hard."""
    kept = losses.kept_macs(gates, layout, losses.site_shares(costs, layout))
    return losses.total_share(kept, costs)


def make_loss(
    settings: LossSettings,
    model: model_directory.ModelConfig,
    network: unet.UNet,
    costs: macs.SiteMacs,
    layout: Layout,
) -> loop.LossFn:
    """Makes the loss of the router's parameters, with the UNet frozen.

    The ungated UNet teaches the gated one in the same program. A batch is one of
    `encoded.Examples`, with `warms_up`: whether prompts still lend their own gates. `network` is
    the UNet of `model`, with the dtype and the place of the gates that are trained with.
    """
    apply: Any = network.apply
    shares, schedule = losses.site_shares(costs, layout), model.schedule
    # Not saved with a checkpoint, but derived again whenever a training starts or resumes.
    budget = losses.removable_budget(costs, settings.macs_budget)
    denoising = functools.partial(
        distillation.denoising,
        prediction_type=schedule.prediction_type,
        gamma=settings.min_snr_gamma,
        snr_weight=settings.snr_weight,
    )
    balance = {"optimal_transport": settings.optimal_transport, "epsilon": settings.epsilon}

    def loss_fn(params, frozen, batch, key):
        keys, embedding, warms_up = jax.random.split(key), batch["embedding"], batch["warms_up"]
        noisy = encoded.draw_noisy(batch, keys[0], schedule, model.vae.scaling_factor)
        routing = router.route(
            params, embedding, keys[1], layout, warms_up=warms_up[:, None], **balance
        )
        inputs = (noisy.latents, noisy.timestep, batch["text"].astype(jnp.float32))
        teacher, teacher_blocks = apply({"params": frozen}, *inputs, return_blocks=True)
        gates = to_gates(forward_gates(routing.gates, settings.forward_gates), layout)
        student, blocks = apply({"params": frozen}, *inputs, gates, return_blocks=True)
        kept = losses.kept_macs(routing.gates, layout, shares)
        prompts = router.features(routing.prompt_gates, layout)
        codes = router.features(routing.code_gates, layout)
        code_pull = losses.code_pull(prompts, codes, routing.assignment)
        # While codes do not learn, nor do they weigh; a weight of 0 may meet an infinite loss.
        code_pull *= 1 - warms_up.mean()
        parts = {
            "denoising": denoising(student, noisy.target, noisy.alpha_cumprod),
            "output": distillation.output_distillation(student, teacher),
            "block": distillation.block_distillation(blocks, teacher_blocks),
            "resource": losses.resource(kept, budget, settings.resource_kind),
            "contrastive": losses.contrastive(prompts, embedding, scale=settings.contrastive_scale),
            "highest": losses.highest(kept),
            "spread": losses.spread(kept),
            "code_pull": code_pull,
        }
        loss = distillation.weighted_sum(parts, settings.weights)
        counts = jax.nn.one_hot(routing.assignment, len(params["codes"])).sum(axis=0)
        metrics = parts | {"loss": loss, "macs": losses.total_share(kept, costs).mean()}
        metrics |= {"codes_used": (counts > 0).sum(), "largest_share": counts.max() / counts.sum()}
        return loss, metrics

    return loss_fn


def load(
    workdir: pathlib.Path, model: model_directory.ModelConfig, mesh: Mesh
) -> tuple[loop.Params, RouterRecord]:
    """Returns the parameters of the router of a run, on every device, and its record.

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
    size = layout_of(sites.table(model.unet)).size
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    heads = {"kernel": shape(record.embedding_dim, size), "bias": shape(size)}
    shapes = {"predictor": {"heads": heads}, "codes": shape(record.num_codes, size)}
    params = load_params(output.directory, shapes, sharding=sharding.replicated(mesh))
    return params, record


def evaluate(
    embeddings: Float[Array, "rows n"],
    layout: Layout,
    costs: macs.SiteMacs,
    params: Mapping[str, Any],
) -> dict[str, float]:
    """Says how unseen prompts are routed, without noise or balance, and what MACs that keeps."""
    nearest, code_gates = _route(jax.tree.map(sharding.to_host, params), embeddings, layout)
    counts = np.bincount(nearest, minlength=len(code_gates))
    kept = np.asarray(kept_shares(code_gates, layout, costs))
    return {
        "val_macs": float(kept[nearest].mean()),
        "val_codes_used": float((counts > 0).sum()),
        "val_largest_share": float(counts.max() / counts.sum()),
        "lowest_macs": float(kept.min()),
        "highest_macs": float(kept.max()),
    }


@functools.partial(jax.jit, static_argnames="layout")
def _route(
    params: Mapping[str, Any], embeddings: Float[Array, "rows n"], layout: Layout
) -> tuple[Int[Array, " rows"], Float[Array, "k d"]]:
    """Returns the nearest code of every prompt, and the hard gates of every code."""
    nearest = jnp.argmax(router.match(params, embeddings, layout), axis=1)
    return nearest, hard(soft_gates(params["codes"], MEDIAN_NOISE, layout))
