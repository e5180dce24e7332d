"""Stage `router`: learns the codes and the architecture predictor on a frozen UNet."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from sdprune_jax import config, sharding, sites
from sdprune_jax.aptp import codebook, router, router_training
from sdprune_jax.aptp.layout import layout_of
from sdprune_jax.data import cache, pictures
from sdprune_jax.files import model_directory, tensors
from sdprune_jax.stages import cost_card, inputs
from sdprune_jax.training import encoded, loop, settings_file

_NUM_SEEDING = 1024  # prompts that the codes are seeded from


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Trains what `run.router` asks for, or resumes it.

    Returns:
        `workdir/router`: `model.safetensors`, the parameters; `router.json`, what they are; and
        the training.

    Raises:
        ValueError: naming everything that cannot be trained as asked.
    """
    section, output = run.router, pathlib.Path(run.workdir) / "router"
    assert section is not None
    model = model_directory.open_model(model_directory.directory_of(run.model))
    settings = dataclasses.asdict(section) | {
        "seed": run.seed, "dtype": run.dtype, "variant": run.variant,
        "model": cache.directory_state(model.directory),
    }  # fmt: skip
    made_from, record = cache.fingerprint(settings), output / "router.json"
    if sharding.of_first(lambda: tensors.is_record_of(record, made_from)):
        logging.info("%s is complete: made from the same config and model", output)
        return output

    layout, variant = layout_of(sites.table(model.unet)), run.variant or None
    latent_size = (section.latent_size or pictures.size(section.data) // model.vae.downscale,) * 2
    router_training.check(section, model, layout, latent_size)
    examples, texts = {}, {}
    for split in ("train", "val"):
        pairs = pictures.load(section.data, split)
        texts[split] = pictures.prompts(section.data, pairs, split, run.seed).texts
        examples[split] = encoded.examples(
            section.data, model, pairs, texts[split], mesh, output / "cache", variant
        )
    settings_file.keep(output / "training", settings, run.force)
    costs = router_training.budget_costs(section, model, latent_size)
    shapes = model_directory.param_shapes(model, "unet")
    frozen = model_directory.load(
        model, "unet", dtype=np.float32, variant=variant,
        sharding=sharding.fsdp_shardings(shapes, mesh),
    )  # fmt: skip

    embedding = examples["train"].embedding
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
        return examples["train"].batch(rows, [run.seed, step]) | {"warms_up": warms_up}

    figures = functools.partial(
        router_training.evaluation,
        jnp.asarray(examples["val"].embedding),
        layout,
        costs,
        section.num_codes,
    )
    params = loop.fit(
        router_training.make_loss(section, model, costs, layout, jnp.dtype(run.dtype)),
        params,
        codebook.make_optimizer(section, seeds if has_seeds else None),
        batch_at,
        frozen,
        mesh=mesh, num_steps=section.num_steps, ema_decay=section.ema_decay, seed=run.seed,
        directory=output / "training" / "router", log_every=section.log_every,
        save_every=section.save_every, evaluate=figures,
        eval_every=max(section.num_steps // section.num_evals, 1),
    )  # fmt: skip
    if jax.process_index() == 0:
        record.unlink(missing_ok=True)
    model_directory.save_params(output, params, dtype=np.float32, name="model")
    values = {
        "made_from": made_from,
        "model": run.model,
        "model_state": settings["model"],
        "variant": run.variant,
        "seed": run.seed,
        "embedding_dim": embedding.shape[1],
        "latent_size": list(latent_size),
        "section": dataclasses.asdict(section),
        "figures": figures(params),
    }
    if jax.process_index() == 0:
        tensors.write_json(record, values)
    sharding.wait_for_all(record.name)
    return output


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
