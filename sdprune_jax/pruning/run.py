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

from sdprune_jax import checkpoint, config, convert, sites, tensors
from sdprune_jax.data import cache, captions, tokenizer
from sdprune_jax.models import clip
from sdprune_jax.pruning import calibrate, inputs, masks, methods, record
from sdprune_jax.pruning.trajectory import Trajectory


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
        for name in checkpoint.COMPONENTS
        if (section := getattr(run.prune, name, None)) is not None
    }
    if not sections:
        raise ValueError("config.prune has no component: set config.prune.unet or text_encoder")
    model = checkpoint.open_model(checkpoint.directory_of(run.model))
    work = pathlib.Path(run.workdir)
    output, file = work / "pruned", work / "prune.json"
    made_from = cache.fingerprint(
        dataclasses.asdict(run.prune), run.seed, run.variant, cache.directory_state(model.directory)
    )
    if file.exists() and output.is_dir() and tensors.read_json(file)["made_from"] == made_from:
        logging.info("%s is complete: made from the same config and model", output)
        return output

    shapes = {name: checkpoint.param_shapes(model, name) for name in checkpoint.COMPONENTS}
    sizes = {name: _num_parameters(tree) for name, tree in shapes.items()}
    layers = {
        name: sites.prunable(shapes[name], name, section.scope)
        for name, section in sections.items()
    }
    for name, section in sections.items():
        leaves = convert.flatten(shapes[name])
        methods.check({path: leaves[path] for path in layers[name]}, section)
    file.unlink(missing_ok=True)
    seconds = dict.fromkeys(("load", "calibrate", "select", "save", "verify"), 0.0)
    pruned, done = {}, {}
    for name, section in sections.items():
        start = time.perf_counter()
        loaded = checkpoint.load(model, name, variant=run.variant or None)
        flat = {path: np.array(x) for path, x in convert.flatten(loaded).items()}
        del loaded
        seconds["load"] += time.perf_counter() - start
        calibration = _Calibration(run, mesh, model, name, shapes[name])
        start = time.perf_counter()
        done[name] = _prune_component(flat, layers[name], section, calibration)
        seconds["select"] += time.perf_counter() - start - calibration.seconds
        seconds["calibrate"] += calibration.seconds
        pruned[name] = convert.unflatten(flat, shapes[name])
        logging.info("%s: %d zeros in %d layers", name, done[name]["zeros"], len(layers[name]))

    start = time.perf_counter()
    dtype = jnp.dtype(run.prune.save_dtype)
    checkpoint.save(
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
    tensors.write_json(
        file,
        {
            "made_from": made_from,
            "model": run.model,
            "directory": output.name,
            "save_dtype": run.prune.save_dtype,
            "seconds": {key: round(value, 3) for key, value in seconds.items() if value},
            "pipeline_parameters": total,
            "of_pipeline": sum(values["zeros"] for values in done.values()) / total,
            "bytes": record.stored_bytes(model, output, pruned, run.variant or None),
            "components": done,
        },
    )
    return output


def _prune_component(
    flat: dict[str, np.ndarray],
    layers: list[str],
    section: config.PruneComponent,
    calibration: "_Calibration",
) -> dict[str, Any]:
    """Prunes arrays of `flat` in place; returns what was done to every layer."""
    kernels = {path: flat[path] for path in layers}
    before = record.sample(kernels)
    rows: dict[str, dict[str, Any]] = {}
    statistic = methods.STATISTIC[section.method]
    for package in calibration.packages(layers, statistic):
        stats = calibration.stats(flat, package, statistic) if statistic else {}
        part = {path: kernels[path] for path in package}
        removed = methods.removed_of_each(part, section, stats)
        key = jax.random.key(calibration.seed)
        for path, found in methods.prune(part, section, removed, stats, key):
            kernel = flat[path]
            threshold = record.threshold(kernel, found.keep)
            if found.kernel is not None:
                np.copyto(kernel, found.kernel, casting="same_kind")
            masks.zero(kernel, found.keep)
            rows[path] = record.layer(path, kernel, found, threshold)
    prunable = sum(kernel.size for kernel in kernels.values())
    zeros = sum(row["zeros"] for row in rows.values())
    names = ("method", "group", "pattern", "allocation", "scope", "threshold")
    return {
        "requested": section.sparsity,
        **{name: value for name in names if (value := getattr(section, name)) is not None},
        "prunable": prunable,
        "zeros": zeros,
        "of_prunable": zeros / prunable,
        "all_zeros": sum(x.size - int(np.count_nonzero(x)) for x in flat.values()),
        "layers": [rows[path] for path in layers],
        "histogram": record.histogram(before, record.sample(kernels)),
    }


class _Calibration:
    """Runs prompts through a component as it is at the time."""

    def __init__(
        self, run: config.Run, mesh: Mesh, model: checkpoint.Model, component: str, shapes: Any
    ):
        assert run.prune is not None
        self.seed, self.seconds = run.seed, 0.0
        self._section, self._run, self._mesh = run.prune.calibration, run, mesh
        self._model, self._component, self._shapes = model, component, shapes

    def packages(self, layers: list[str], statistic: str | None) -> list[list[str]]:
        if statistic is None:
            return [layers]
        configs = {"unet": self._model.unet, "text_encoder": self._model.text_encoder}
        limit = int(self._section.max_gigabytes * 1e9)
        return inputs.packages(configs[self._component], layers, statistic, limit)

    def stats(
        self, flat: Mapping[str, np.ndarray], paths: list[str], statistic: str
    ) -> calibrate.Stats:
        start = time.perf_counter()
        section, model = self._section, self._model
        params = convert.unflatten(
            {path: jnp.asarray(x, jnp.float32) for path, x in flat.items()}, self._shapes
        )
        prompts = captions.prompts(section.prompts, "train", section.num_prompts, self.seed)
        words = tokenizer.load(model.directory / "tokenizer")
        length = model.text_encoder.max_position_embeddings
        ids = tokenizer.encode(words, prompts, length)
        if self._component == "text_encoder":
            found = calibrate.text_statistics(
                model.text_encoder, params, self._mesh, ids, paths, statistic,
                batch_size=section.batch_size, mask_pads=section.mask_pads,
            )  # fmt: skip
        else:
            variant = self._run.variant or None
            text_params = checkpoint.load(model, "text_encoder", dtype=np.float32, variant=variant)
            encode = jax.jit(clip.TextTower(model.text_encoder).apply)
            encoded = encode(
                {"params": text_params}, tokenizer.encode(words, [*prompts, ""], length)
            )
            text = np.asarray(encoded)
            trajectory = Trajectory(
                num_steps=section.num_steps, guidance_scale=section.guidance_scale,
                batch_size=section.batch_size, timestep_weights=section.timestep_weights,
                position_fraction=section.position_fraction,
            )  # fmt: skip
            found = calibrate.unet_statistics(
                model, params, self._mesh, text[:-1], text[-1:], paths, statistic,
                jax.random.key(self.seed), trajectory,
            )  # fmt: skip
        jax.block_until_ready(found)
        self.seconds += time.perf_counter() - start
        return found


def _num_parameters(shapes: Any) -> int:
    return sum(leaf.size for leaf in convert.flatten(shapes).values())
