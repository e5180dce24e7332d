"""Stage `prune`: zeroes weights of each component that has a section."""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from sdprune_jax import UserError, config, sharding, sites
from sdprune_jax.data import cache, captions
from sdprune_jax.files import convert, model_directory, tensors
from sdprune_jax.pruning import component, methods, record, request
from sdprune_jax.scoring.calibration import Calibration


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
    model = model_directory.open_model(model_directory.directory_of(run.model))
    work = pathlib.Path(run.workdir)
    output, file = work / "pruned", work / "prune.json"
    made_from = cache.fingerprint(
        dataclasses.asdict(run.prune), captions.state(run.prune.calibration.prompts), run.seed,
        run.variant, cache.directory_state(model.directory),
    )  # fmt: skip
    if sharding.of_first(lambda: output.is_dir() and tensors.is_record_of(file, made_from)):
        logging.info("%s is complete: made from the same config and model", output)
        return output

    shapes = {
        name: model_directory.param_shapes(model, name) for name in model_directory.COMPONENTS
    }
    sizes = {name: _num_parameters(tree) for name, tree in shapes.items()}
    layers = {
        name: sites.prunable(shapes[name], name, section.scope)
        for name, section in sections.items()
    }
    for name, section in sections.items():
        leaves = convert.flatten(shapes[name])
        request.check({path: leaves[path] for path in layers[name]}, section)
    if jax.process_index() == 0:
        file.unlink(missing_ok=True)
    seconds = dict.fromkeys(("load", "calibrate", "select", "save", "verify"), 0.0)
    pruned, done = {}, {}
    for name, section in sections.items():
        start = time.perf_counter()
        loaded = model_directory.load(model, name, variant=run.variant or None)
        flat = {path: np.array(x) for path, x in convert.flatten(loaded).items()}
        del loaded
        seconds["load"] += time.perf_counter() - start
        calibration = Calibration(
            run.prune.calibration, model, name, mesh, seed=run.seed, variant=run.variant
        )
        parts = calibration.parts(flat, layers[name], methods.STATISTIC[section.method])
        start = time.perf_counter()
        done[name] = component.prune_component(flat, layers[name], section, parts, run.seed)
        seconds["select"] += time.perf_counter() - start - calibration.seconds
        seconds["calibrate"] += calibration.seconds
        pruned[name] = convert.unflatten(flat, shapes[name])
        logging.info(
            "%s: %d zeros in %d layers, of which %d were there before",
            name, done[name]["zeros"], len(layers[name]), done[name]["zeros_before"],
        )  # fmt: skip

    start = time.perf_counter()
    dtype = jnp.dtype(run.prune.save_dtype)
    model_directory.save(
        model, pruned, output, dtype=dtype, variant=run.variant or None, overwrite=output.exists()
    )
    seconds["save"] = time.perf_counter() - start
    start = time.perf_counter()
    for name, tree in pruned.items():
        stored = record.verify(output, name, tree, dtype)
        done[name]["underflow_zeros"] = stored - done[name].pop("all_zeros")
    seconds["verify"] = time.perf_counter() - start

    total = sum(sizes.values())
    for name, values in done.items():
        values["parameters"] = sizes[name]
        values["of_component"] = values["zeros"] / sizes[name]
        values["of_pipeline"] = values["zeros"] / total
    values = {
        "made_from": made_from,
        "model": run.model,
        "directory": output.name,
        "save_dtype": run.prune.save_dtype,
        "seconds": {key: round(value, 3) for key, value in seconds.items() if value},
        "pipeline_parameters": total,
        "of_pipeline": sum(values["zeros"] for values in done.values()) / total,
        "bytes": record.stored_bytes(model, output, pruned, run.variant or None),
        "components": done,
    }
    if jax.process_index() == 0:
        tensors.write_json(file, values)
    sharding.wait_for_all(file.name)
    return output


def _num_parameters(shapes: Any) -> int:
    return sum(leaf.size for leaf in convert.flatten(shapes).values())
