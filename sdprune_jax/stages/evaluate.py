"""Stage `evaluate`: every model of the run under one protocol.

Images are kept as files and features in a cache, so an interrupted evaluation goes on, and one of
more images or other metrics computes what is missing.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdprune_jax import artefacts, config, pipeline
from sdprune_jax.aptp import expert_files, routed
from sdprune_jax.data import cache
from sdprune_jax.evaluate import images, measuring, needs, networks, scores, task
from sdprune_jax.evaluate.measurement import Measurement
from sdprune_jax.evaluate.protocols import PROTOCOLS, Protocol
from sdprune_jax.files import model_directory
from sdprune_jax.models import samplers
from sdprune_jax.stages import cost_card, inputs

VALUES = "values.npz"  # in `evaluate/`


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Writes `workdir/evaluate.json`: the protocol, and every figure of every model.

    Beside a figure stand the number of its images and, where there is one, its interval. What means
    are of, image by image, is in `evaluate/values.npz`, as arrays `model/figure`: prompts and noise
    are the same for all models of all runs of a protocol, so these can be compared in pairs.
    """
    section, work = run.evaluate, pathlib.Path(run.workdir)
    assert section is not None
    protocol = PROTOCOLS[section.protocol]
    directories = expert_files.models_of_run(run.model, work)
    dense = model_directory.open_model(directories["dense"][0])
    size = (protocol.generate_size or dense.unet.sample_size * dense.vae.downscale,) * 2
    measurement = Measurement(**dataclasses.asdict(section))
    needs.check(measurement, size[0])
    asked = task.load(
        protocol.data,
        section.data,
        section.num_images or protocol.num_images,
        needs.has_pictures(measurement, protocol),
    )
    perceptual = networks.load_lpips(section.networks, dense, size)
    output = artefacts.output_of("evaluate", work)
    states = routed.states(directories, work, run.variant)
    made_from = _inputs(run, protocol, measurement, asked, states, perceptual)
    if artefacts.is_complete(output, made_from):
        return output.record

    folders = {
        name: output.directory / "pictures" / f"{name}-{_key(run, protocol, state, asked, size)}"
        for name, state in states.items()
    }
    models = routed.models(directories, work, dense, asked.prompts, mesh)
    _render(run, mesh, protocol, models, folders, asked.prompts, size)
    loaded = measuring.load_networks(measurement, protocol, dense)
    figures = measuring.measure(
        measurement, mesh, protocol, loaded, folders, asked, output.directory / "cache"
    )
    _add_distances(figures, folders, len(asked.prompts), perceptual, mesh, section.num_resamples)
    of_each: dict[str, Any] = {
        f"{name}/{key}": x
        for name, of_model in figures.items()
        for key, x in scores.take_values(of_model).items()
    }
    used = loaded | ({"lpips": perceptual} if perceptual else {})
    with artefacts.writing(output, made_from) as partial:
        partial.record = {
            "dense": cache.fingerprint(states["dense"][0]),
            "protocol": _protocol(run, protocol, asked, size),
            "weights": {name: network.weights for name, network in used.items()},
            "models": {
                name: drawn.described() | {"figures": figures[name]}
                for name, drawn in models.items()
            },
        }
        if jax.process_index() == 0:
            np.savez(partial.directory / VALUES, **of_each)
    return output.record


def _add_distances(
    figures: dict[str, scores.Figures],
    folders: Mapping[str, pathlib.Path],
    num_images: int,
    perceptual: networks.Network | None,
    mesh: Mesh,
    num_resamples: int,
) -> None:
    """Adds how far the images of each model are from the dense model's."""
    for name in folders.keys() - {"dense"}:
        pair = (folders[name], folders["dense"], num_images)
        figures[name] |= scores.to_dense(*pair, num_resamples)
        if perceptual:
            figures[name] |= scores.lpips_to_dense(
                *pair, perceptual, mesh, num_resamples=num_resamples
            )


def _protocol(
    run: config.Run, protocol: Protocol, asked: task.Task, size: tuple[int, int]
) -> dict[str, Any]:
    """Returns how the figures came about, for the record."""
    counts = {"evaluated": len(asked.prompts), "references": asked.num_references}
    made = {"height": size[0], "width": size[1], "seed": run.seed, "dtype": run.dtype}
    return dataclasses.asdict(protocol) | counts | made


def _inputs(
    run: config.Run,
    protocol: Protocol,
    measurement: Measurement,
    asked: task.Task,
    states: Mapping[str, list[Any]],
    perceptual: networks.Network | None,
) -> dict[str, Any]:
    """Returns all that the figures depend on."""
    return {
        "section": dataclasses.asdict(measurement),
        "protocol": dataclasses.asdict(protocol),
        "seed": run.seed,
        "dtype": run.dtype,
        "variant": run.variant,
        "model": states["dense"][0],
        "models": states,
        "data": asked.state,
        "prompts": list(asked.prompts),
        "networks": needs.states(measurement, protocol),
        "lpips": perceptual.weights if perceptual else None,
    }


def _key(
    run: config.Run, protocol: Protocol, state: Any, asked: task.Task, size: tuple[int, int]
) -> str:
    """Changes with all that an image depends on, but for how many there are."""
    how = (protocol.data, protocol.sampler or "", protocol.num_steps, protocol.guidance_scale)
    return cache.fingerprint(how, state, asked.state, size, run.seed, run.dtype, run.variant)


def _render(
    run: config.Run,
    mesh: Mesh,
    protocol: Protocol,
    models: Mapping[str, routed.Drawn],
    folders: Mapping[str, pathlib.Path],
    prompts: Sequence[str],
    size: tuple[int, int],
) -> None:
    assert run.evaluate is not None
    for name, drawn in models.items():
        for directory, index in drawn.parts():
            model = model_directory.open_model(directory)
            sample = pipeline.make_sample(
                model,
                mesh,
                sampler=protocol.sampler,
                num_steps=protocol.num_steps,
                guided=protocol.guidance_scale > 1,
                dtype=jnp.dtype(run.dtype),
            )
            variant = run.variant if name == "dense" else None
            # The weights are named nowhere here: they are gone before the next expert's come.
            images.complete(
                folders[name],
                model,
                pipeline.load(model, mesh, variant),
                sample,
                prompts,
                index,
                size=size,
                seed=run.seed,
                batch_size=run.evaluate.batch_size,
                guidance_scale=protocol.guidance_scale,
                negative_prompt="",
            )


def check(run: config.Run, num_devices: int) -> None:  # noqa: ARG001
    """Checks the model, the data, the networks, the size of the pictures, and the sampler."""
    assert run.evaluate is not None
    model, protocol = inputs.check_model(run), PROTOCOLS[run.evaluate.protocol]
    needs.check(
        Measurement(**dataclasses.asdict(run.evaluate)),
        protocol.generate_size or model.unet.sample_size * model.vae.downscale,
    )
    samplers.timetable(model.schedule, protocol.sampler, protocol.num_steps)


def plan(run: config.Run, planned: cost_card.Planned) -> str:  # noqa: ARG001
    """Returns the protocol and how many pictures it draws."""
    assert run.evaluate is not None
    protocol = PROTOCOLS[run.evaluate.protocol]
    count = run.evaluate.num_images or protocol.num_images
    return (
        f"evaluate: {protocol.name}, {count:,} images of {cost_card.models_of(run)},"
        f" {protocol.num_steps} steps, guidance {protocol.guidance_scale:g}:"
        f" {', '.join(m.name for m in protocol.metrics)}"
    )
