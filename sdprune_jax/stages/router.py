"""Stage `router`: learns the codes and the architecture predictor on a frozen UNet."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdprune_jax import artefacts, config, sharding, sites
from sdprune_jax.aptp import codebook, router, router_training
from sdprune_jax.aptp.layout import layout_of
from sdprune_jax.aptp.records import RouterRecord
from sdprune_jax.data import pictures
from sdprune_jax.files import model_directory
from sdprune_jax.files.weights import save_params
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
    model, variant = inputs.open_model(run), run.variant or None
    settings = dataclasses.asdict(section) | {
        "seed": run.seed,
        "dtype": run.dtype,
        "variant": run.variant,
        "model": artefacts.model_state(model.directory, run.variant),
        "pictures": pictures.checksums_of(section.data.dataset, section.data.directory),
    }
    if artefacts.is_complete(output, settings):
        return output.directory
    layout = layout_of(sites.table(model.unet))
    latent_size = (section.latent_size or pictures.size(section.data) // model.vae.downscale,) * 2
    examples = {
        split: encoded.of_split(
            section.data, model, split, run.seed, mesh, output.directory / "cache", variant
        )
        for split in ("train", "val")
    }
    settings_file.keep(output.directory / "training", settings, run.force)
    costs = router_training.budget_costs(section, model, latent_size)
    figures = functools.partial(
        router_training.evaluation,
        jnp.asarray(examples["val"].embedding),
        layout,
        costs,
        section.num_codes,
    )
    params = _train(run, model, costs, examples["train"], figures, mesh)
    with artefacts.writing(output, settings) as partial:
        save_params(partial.directory, params, dtype=np.float32, name="model")
        partial.record = RouterRecord(
            model=run.model,
            variant=run.variant,
            seed=run.seed,
            embedding_dim=examples["train"].embedding.shape[1],
            latent_size=list(latent_size),
            section=dataclasses.asdict(section),
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
        rows = loop.rows_of_batch(len(embedding), section.batch_size, step, run.seed)
        warms_up = np.full(len(rows), step < section.warmup_steps)
        return examples.batch(rows, [run.seed, step]) | {"warms_up": warms_up}

    directory = artefacts.output_of("router", run.workdir).directory / "training" / "router"
    return loop.fit(
        router_training.make_loss(section, model, costs, layout, jnp.dtype(run.dtype)),
        params,
        codebook.make_optimizer(section, seeds if has_seeds else None),
        batch_at,
        frozen,
        mesh=mesh,
        num_steps=section.num_steps,
        ema_decay=section.ema_decay,
        seed=run.seed,
        directory=directory,
        log_every=section.log_every,
        save_every=section.save_every,
        evaluate=figures,
        eval_every=max(section.num_steps // section.num_evals, 1),
    )


def check(run: config.Run, num_devices: int) -> None:  # noqa: ARG001
    """Checks the model, the data, the encoder of prompts, and that the budget is in reach."""
    section = run.router
    assert section is not None
    model = inputs.check_model(run)
    for split in ("train", "val"):
        pictures.load(section.data, split)
    encoded.encoder_of(section.data, model)
    layout = layout_of(sites.table(model.unet))
    latent = section.latent_size or pictures.size(section.data) // model.vae.downscale
    router_training.check(section, model, layout, (latent, latent))


def plan(run: config.Run, planned: cost_card.Planned) -> str:
    """Returns the steps; each is a pass of the teacher, and two of the student and one back.

    The router's weights are none of the student's, whose own have no gradient.
    """
    section = run.router
    assert section is not None
    unet_macs = cost_card.unet_macs(planned, pictures.size(section.data))
    work = section.batch_size * unet_macs * (3 + section.remat)
    frozen = cost_card.in_bytes(cost_card.bytes_a_device(planned.shapes["unet"], planned.mesh))
    return (
        f"router: {section.num_codes} codes at {section.macs_budget:.1%} of the UNet's MACs;"
        f" {section.num_steps:,} steps of {section.batch_size:,} prompts, {work / 1e12:,.3g} TMACs"
        f" each; {frozen} of frozen UNet a device"
    )
