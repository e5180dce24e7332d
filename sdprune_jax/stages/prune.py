"""Stage `prune`: zeroes weights of each component that has a section."""

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from sdprune_jax import UserError, artefacts, config, sites
from sdprune_jax.data import captions
from sdprune_jax.files import convert, model_directory
from sdprune_jax.pruning import component, record, request
from sdprune_jax.pruning.methods import STATISTIC, Method, Override
from sdprune_jax.scoring.calibration import Calibration
from sdprune_jax.scoring.settings import CalibrationSettings, GradientSettings
from sdprune_jax.stages import cost_card, inputs


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Writes `workdir/pruned`, a diffusers directory, and `workdir/prune.json`, what was done.

    One component at a time is on the host; calibration, where a method needs it, is on the mesh.

    Raises:
        ValueError: if no component has a section, the model cannot be read, or a section asks for
            what cannot be.
    """
    assert run.prune is not None
    sections = {
        name: section
        for name in model_directory.COMPONENTS
        if (section := getattr(run.prune, name, None)) is not None
    }
    if not sections:
        raise UserError("config.prune has no component: set config.prune.unet or text_encoder")
    model, output = inputs.open_model(run), artefacts.output_of("prune", run.workdir)
    made_from = {
        "section": dataclasses.asdict(run.prune),
        "seed": run.seed,
        "variant": run.variant,
        "model": artefacts.model_state(model.directory, run.variant),
        "prompts": captions.state(run.prune.calibration.prompts),
    }
    if artefacts.is_complete(output, made_from):
        return output.directory
    seconds = dict.fromkeys(("load", "calibrate", "select", "save", "verify"), 0.0)
    with artefacts.writing(output, made_from) as partial:
        pruned: dict[str, Any] = {}
        records: dict[str, record.ComponentRecord] = {}
        for name, section in sections.items():
            pruned[name], records[name] = _prune(run, model, name, section, mesh, seconds)
        start = time.perf_counter()
        dtype, variant = jnp.dtype(run.prune.save_dtype), run.variant or None
        model_directory.write(model, pruned, partial.directory, dtype=dtype, variant=variant)
        seconds["save"] = time.perf_counter() - start
        partial.record = _record(run, model, partial.directory, pruned, records, seconds)
    return output.directory


def _prune(
    run: config.Run,
    model: model_directory.ModelConfig,
    name: str,
    section: config.PruneComponent,
    mesh: Mesh,
    seconds: dict[str, float],
) -> tuple[Any, record.ComponentRecord]:
    """Returns a pruned component and what became of it; adds to the durations of the phases."""
    assert run.prune is not None
    start = time.perf_counter()
    params = model_directory.load(model, name, variant=run.variant or None)
    params = jax.tree.map(np.array, params)  # ours to overwrite
    seconds["load"] += time.perf_counter() - start
    start = time.perf_counter()
    calibration = open_calibration(run.prune.calibration, model, name, mesh, run.seed, run.variant)
    params, done = component.prune_component(
        params, name, method_of(section), calibration.parts, seed=run.seed, in_place=True
    )
    seconds["select"] += time.perf_counter() - start - calibration.seconds
    seconds["calibrate"] += calibration.seconds
    counts = (done.zeros, len(done.layers), done.zeros_before)
    logging.info("%s: %d zeros in %d layers, of which %d were there before", name, *counts)
    return params, done


def _record(
    run: config.Run,
    model: model_directory.ModelConfig,
    directory: pathlib.Path,
    pruned: dict[str, Any],
    records: Mapping[str, record.ComponentRecord],
    seconds: dict[str, float],
) -> record.PruneRecord:
    """Reads back what was written, compares it, and returns the record of the whole."""
    assert run.prune is not None
    start = time.perf_counter()
    shapes = [model_directory.param_shapes(model, name) for name in model_directory.COMPONENTS]
    total = sum(leaf.size for tree in shapes for leaf in jax.tree.leaves(tree))
    dtype = jnp.dtype(run.prune.save_dtype)
    components = {
        name: dataclasses.replace(
            done,
            of_pipeline=done.zeros / total,
            underflow_zeros=record.verify(directory, name, pruned[name], dtype),
        )
        for name, done in records.items()
    }
    seconds["verify"] = time.perf_counter() - start
    return record.PruneRecord(
        model=run.model,
        directory="pruned",
        save_dtype=run.prune.save_dtype,
        seconds={key: round(value, 3) for key, value in seconds.items() if value},
        pipeline_parameters=total,
        of_pipeline=sum(done.zeros for done in components.values()) / total,
        bytes=record.stored_bytes(model, directory, pruned, run.variant or None),
        components=components,
    )


def check(run: config.Run, num_devices: int) -> None:
    """Checks the model, the layers that each section names, prompts, batches and the sampler."""
    assert run.prune is not None
    sections = {name: getattr(run.prune, name) for name in ("text_encoder", "unet")}
    calibrated = [name for name, part in sections.items() if part and STATISTIC[part.method]]
    model, problems = inputs.check_model(run, reads_texts=bool(calibrated)), []
    for name, section in sections.items():
        if section:
            shapes = model_directory.param_shapes(model, name)
            leaves = convert.flatten(shapes)
            layers = sites.prunable(shapes, name, section.scope)
            try:
                request.check({path: leaves[path] for path in layers}, method_of(section))
                if name in calibrated:
                    key = "prune.calibration"
                    inputs.check_calibration(run.prune.calibration, model, num_devices, key)
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def plan(run: config.Run, planned: cost_card.Planned) -> str:
    """Returns the four sparsities that papers mix up, by component and together.

    The first, as requested, weighs components by all of their parameters.
    """
    assert run.prune is not None
    parts = {name: getattr(run.prune, name, None) for name in model_directory.COMPONENTS}
    pipeline, sums, rows = cost_card.num_parameters(planned.shapes), np.zeros(4), []
    for name, part in parts.items():
        if part is None:
            continue
        count, sizes = (
            cost_card.num_parameters(planned.shapes[name]),
            cost_card.prunable_sizes(planned.shapes[name], name, part.scope),
        )
        removed = request.num_removed(sizes, method_of(part))
        found = np.array([part.sparsity * count, removed, sum(sizes.values()), count])
        rule = f"{len(sizes)} {part.scope} layers, {part.threshold}"
        rows.append((name, rule, *_sparsities(found, pipeline)))
        sums += found
    if not rows:
        raise UserError("config.prune has no component: set config.prune.unet or text_encoder")
    rows.append(("together", "", *_sparsities(sums, pipeline)))
    heads = ("requested", "zeros", "of prunable", "of component", "of pipeline")
    return cost_card.aligned([("prune", "", *heads), *rows])


def _sparsities(found: Any, pipeline: int) -> list[str]:
    requested, zeros, prunable, component = found
    shares = (zeros / prunable, zeros / component, zeros / pipeline)
    return [f"{requested / component:.2%}", f"{int(zeros):,}", *(f"{x:.2%}" for x in shares)]


def method_of(section: config.PruneComponent) -> Method:
    """The method that a section of the config describes."""
    values: dict[str, Any] = {f.name: getattr(section, f.name) for f in dataclasses.fields(Method)}
    values = {name: float(x) if isinstance(x, int) else x for name, x in values.items()}
    if section.overrides:
        own = tuple(Override(o.layers, float(o.sparsity)) for o in section.overrides)
        values["overrides"] = own
    return Method(**values)


def open_calibration(
    section: config.Calibration,
    model: model_directory.ModelConfig,
    component: str,
    mesh: Mesh,
    seed: int,
    variant: str,
) -> Calibration:
    """The calibration that a section of the config describes, with its prompts."""
    values = {
        f.name: getattr(section, f.name)
        for f in dataclasses.fields(CalibrationSettings)
        if hasattr(section, f.name)
    }
    values["gradients"] = GradientSettings(**dataclasses.asdict(section.gradients))
    prompts = captions.prompts(section.prompts, "train", section.num_prompts, seed)
    settings = CalibrationSettings(**values)
    return Calibration(settings, model, component, mesh, prompts, seed, variant or None)
