"""Stage `router`: learns the codes and the architecture predictor on a frozen UNet."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from sdprune_jax import artefacts, config, sharding, sites
from sdprune_jax.aptp import codebook, router, router_training
from sdprune_jax.aptp.layout import Layout, layout_of
from sdprune_jax.aptp.records import RouterRecord
from sdprune_jax.data import pictures
from sdprune_jax.data.order import rows_of_batch
from sdprune_jax.files import model_directory
from sdprune_jax.files.weights import save_params
from sdprune_jax.models import unet
from sdprune_jax.sites import macs
from sdprune_jax.stages import cost_card, inputs
from sdprune_jax.training import encoded, loop, settings_file

_NUM_SEEDING = 1024  # prompts that the codes are seeded from


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Trains what `run.router` asks for, or resumes it.

    Returns:
        `workdir/router`: `model.safetensors`, the parameters; `router.json`, what they are; and
        the training.
    """
    section, output = run.router, artefacts.output_of("router", run.workdir)
    assert section is not None
    model = inputs.open_model(run)
    settings = dataclasses.asdict(section) | {
        "seed": run.seed,
        "dtype": run.dtype,
        "variant": run.variant,
        "model": artefacts.model_state(model.directory, run.variant),
        "pictures": pictures.checksums_of(section.data.dataset, section.data.directory),
    }
    if artefacts.is_complete(output, settings):
        return output.directory
    layout, source = layout_of(sites.table(model.unet)), inputs.picture_source(section.data)
    encoders = encoded.Encoders(model, mesh, output.directory / "cache", run.variant or None)
    examples = {
        split: encoded.encode_split(encoders, source, split, run.seed) for split in ("train", "val")
    }
    settings_file.keep(output.directory / "training", settings, run.force)
    latent_size, costs = budget(section, model)
    figures = functools.partial(
        router_training.evaluate, jnp.asarray(examples["val"].embedding), layout, costs
    )
    params = _train(run, model, costs, examples["train"], figures, mesh)
    with artefacts.writing(output, settings) as partial:
        save_params(partial.directory, params, dtype=np.float32, name="model")
        partial.record = RouterRecord(
            model=run.model,
            variant=run.variant,
            seed=run.seed,
            embedding_dim=examples["train"].embedding.shape[1],
            latent_size=latent_size,
            num_codes=section.num_codes,
            macs_budget=section.macs_budget,
            mac_counter=section.mac_counter,
            data=source,
            figures=figures(params),
        )
    return output.directory


def _train(
    run: config.Run,
    model: model_directory.ModelConfig,
    costs: macs.SiteMacs,
    examples: encoded.Examples,
    figures: Callable[[loop.Params], dict[str, float]],
    mesh: Mesh,
) -> loop.Params:
    """Returns the trained parameters of the router; the UNet stays as it is."""
    section, layout = run.router, layout_of(sites.table(model.unet))
    assert section is not None
    shardings = sharding.fsdp_shardings(model_directory.param_shapes(model, "unet"), mesh)
    frozen = model_directory.load(
        model, "unet", dtype=np.float32, variant=run.variant or None, sharding=shardings
    )
    embedding = examples.embedding
    params = router.init_params(layout, embedding.shape[1], section.num_codes, run.seed)
    order = np.random.default_rng(run.seed).permutation(len(embedding))[:_NUM_SEEDING]
    seeds = functools.partial(
        codebook.seeds, jnp.asarray(embedding[order]), section.num_codes, layout
    )
    has_seeds = section.code_seeds == "prompts"
    if has_seeds and not section.warmup_steps:
        params |= {"codes": seeds(params["predictor"])}

    def batch_at(step: int) -> dict[str, Any]:
        rows = rows_of_batch(len(embedding), section.batch_size, step, run.seed)
        warms_up = np.full(len(rows), step < section.warmup_steps)
        return examples.batch(rows, [run.seed, step]) | {"warms_up": warms_up}

    training = inputs.training_settings(
        section,
        optimizer=make_optimizer(section, seeds if has_seeds else None),
        seed=run.seed,
        mesh=mesh,
        directory=artefacts.output_of("router", run.workdir).directory / "training" / "router",
    )
    loss_fn = make_loss(section, model, costs, layout, jnp.dtype(run.dtype))
    return loop.fit(training, loss_fn, params, batch_at, frozen, figures)


def make_loss(
    section: config.Router,
    model: model_directory.ModelConfig,
    costs: macs.SiteMacs,
    layout: Layout,
    dtype: Any = jnp.float32,
) -> loop.LossFn:
    """Returns the loss that the section describes."""
    values = inputs.fields_of(router_training.LossSettings, section)
    settings = router_training.LossSettings(weights=dataclasses.asdict(section.losses), **values)
    network = unet.UNet(model.unet, dtype, section.remat, section.gate_position)
    return router_training.make_loss(settings, model, network, costs, layout)


def make_optimizer(
    section: config.Router, seeds: codebook.Seeds | None = None
) -> optax.GradientTransformation:
    """Returns the optimizer that the section describes."""
    steps = (section.ramp_steps, section.warmup_steps)
    return codebook.make_optimizer(section.learning_rate, *steps, seeds)


def budget(
    section: config.Router, model: model_directory.ModelConfig
) -> tuple[tuple[int, int], macs.SiteMacs]:
    """Returns the latent size that the budget is counted at, and the MACs of every site there."""
    side = inputs.picture_source(section.data).side // model.vae.downscale
    latent_size = (section.latent_size or side,) * 2
    return latent_size, router_training.budget_costs(model, latent_size, section.mac_counter)


def check(run: config.Run, num_devices: int) -> None:  # noqa: ARG001
    """Checks the model, the data, the encoder of prompts, and that the budget is in reach."""
    section = run.router
    assert section is not None
    model = inputs.check_model(run)
    for split in ("train", "val"):
        pictures.load(inputs.picture_source(section.data), split)
    encoded.encoder_config(section.data.encoder, model)
    layout, (_, costs) = layout_of(sites.table(model.unet)), budget(section, model)
    router_training.check_budget(section.macs_budget, costs, layout)


def plan(run: config.Run, planned: cost_card.Planned) -> str:
    """Returns the steps; each is a pass of the teacher, and two of the student and one back.

    The router's weights are none of the student's, whose own have no gradient.
    """
    section = run.router
    assert section is not None
    unet_macs = cost_card.unet_macs(planned, inputs.picture_source(section.data).side)
    work = section.batch_size * unet_macs * (3 + section.remat)
    frozen = cost_card.in_bytes(cost_card.bytes_a_device(planned.shapes["unet"], planned.mesh))
    return (
        f"router: {section.num_codes} codes at {section.macs_budget:.1%} of the UNet's MACs;"
        f" {section.num_steps:,} steps of {section.batch_size:,} prompts, {work / 1e12:,.3g} TMACs"
        f" each; {frozen} of frozen UNet a device"
    )
