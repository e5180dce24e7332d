"""Stage `prune`: zeroes weights of each component that has a section."""

import dataclasses
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Float, Int32

from sdprune_jax import checkpoint, config, convert, sharding, sites, tensors
from sdprune_jax.data import cache, captions, tokenizer
from sdprune_jax.models import clip
from sdprune_jax.pruning import calibrate, gradients, inputs, masks, methods, record, request
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
        dataclasses.asdict(run.prune), captions.state(run.prune.calibration.prompts), run.seed,
        run.variant, cache.directory_state(model.directory),
    )  # fmt: skip
    if sharding.of_first(lambda: output.is_dir() and tensors.is_record_of(file, made_from)):
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
        request.check({path: leaves[path] for path in layers[name]}, section)
    if jax.process_index() == 0:
        file.unlink(missing_ok=True)
    seconds = dict.fromkeys(("load", "calibrate", "select", "save", "verify"), 0.0)
    pruned, done = {}, {}
    for name, section in sections.items():
        start = time.perf_counter()
        loaded = checkpoint.load(model, name, variant=run.variant or None)
        flat = {path: np.array(x) for path, x in convert.flatten(loaded).items()}
        del loaded
        seconds["load"] += time.perf_counter() - start
        calibration = Calibration(
            run.prune.calibration, model, name, mesh, seed=run.seed, variant=run.variant
        )
        parts = calibration.parts(flat, layers[name], methods.STATISTIC[section.method])
        start = time.perf_counter()
        done[name] = prune_component(flat, layers[name], section, parts, run.seed)
        seconds["select"] += time.perf_counter() - start - calibration.seconds
        seconds["calibrate"] += calibration.seconds
        pruned[name] = convert.unflatten(flat, shapes[name])
        logging.info(
            "%s: %d zeros in %d layers, of which %d were there before",
            name, done[name]["zeros"], len(layers[name]), done[name]["zeros_before"],
        )  # fmt: skip

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


def prune_component(
    flat: dict[str, np.ndarray],
    layers: Sequence[str],
    section: config.PruneComponent,
    parts: Iterable[tuple[Sequence[str], Mapping[str, methods.Stat]]],
    seed: int,
) -> dict[str, Any]:
    """Prunes a component in memory.

    Args:
        flat: arrays of the component by path; those of `layers` are changed in place.
        layers: paths of the kernels in scope.
        section: what to do.
        parts: layers that are pruned together and what they read, of `Calibration.parts`; each is
            taken once those before it are pruned.
        seed: of random scores.

    Returns:
        What was done, as in `prune.json`.
    """
    kernels = {path: flat[path] for path in layers}
    before = record.sample(kernels)
    zeros_before = sum(kernel.size - int(np.count_nonzero(kernel)) for kernel in kernels.values())
    sizes = {path: kernel.size for path, kernel in kernels.items()}
    rows: dict[str, dict[str, Any]] = {}
    for names, stats in parts:
        part = {path: kernels[path] for path in names}
        removed = methods.removed_of_each(part, section, stats, sizes)
        for path, found in methods.prune(part, section, removed, stats, jax.random.key(seed)):
            kernel = flat[path]
            threshold = record.threshold(kernel, found.keep)
            if found.kernel is not None:
                np.copyto(kernel, found.kernel, casting="same_kind")
            masks.zero(kernel, found.keep)
            rows[path] = record.layer(path, kernel, found, threshold)
        del stats  # before those of the next part are computed
    prunable = sum(sizes.values())
    zeros = sum(row["zeros"] for row in rows.values())
    said = dataclasses.asdict(section)
    names = (
        "method", "group", "pattern", "allocation", "scope", "threshold", "overrides", "band",
    )  # fmt: skip
    return {
        "requested": section.sparsity,
        **{name: said[name] for name in names if said[name] is not None},
        "prunable": prunable,
        "zeros": zeros,
        "zeros_before": zeros_before,
        "of_prunable": zeros / prunable,
        "all_zeros": sum(x.size - int(np.count_nonzero(x)) for x in flat.values()),
        "layers": [rows[path] for path in layers],
        "histogram": record.histogram(before, record.sample(kernels)),
    }


class Calibration:
    """Runs prompts through a component as it is at the time.

    Attributes:
        seconds: that it has taken so far.
    """

    def __init__(
        self,
        section: config.Calibration,
        model: checkpoint.Model,
        component: str,
        mesh: Mesh,
        *,
        seed: int,
        variant: str,
    ):
        self.seconds = 0.0
        self._section, self._seed, self._variant = section, seed, variant or None
        self._model, self._component, self._mesh = model, component, mesh

    def parts(
        self, flat: Mapping[str, np.ndarray], layers: list[str], statistic: str | None
    ) -> Iterator[tuple[list[str], Mapping[str, methods.Stat]]]:
        """Yields layers whose statistics fit in memory together, and those statistics.

        Args:
            flat: arrays of the component by path, read anew for every part.
            layers: paths of the kernels in scope.
            statistic: None makes one part, without any.
        """
        for names in self.packages(layers, statistic) if statistic else [layers]:
            yield names, self.stats(flat, names, statistic) if statistic else {}

    def packages(self, layers: list[str], statistic: str) -> list[list[str]]:
        """The layers of each part; gradients make one, as they are of all layers together."""
        if statistic == "gradient":
            return [layers]
        configs = {"unet": self._model.unet, "text_encoder": self._model.text_encoder}
        limit = int(self._section.max_gigabytes * 1e9)
        return inputs.packages(configs[self._component], layers, statistic, limit)

    def stats(
        self, flat: Mapping[str, np.ndarray], paths: Sequence[str], statistic: str
    ) -> Mapping[str, methods.Stat]:
        """What the layers at `paths` read in the component whose arrays are `flat`.

        Or, as "gradient", the sums of the loss's gradients by their kernels. In "weighted_gram" the
        sampler's calls count as `calibration.timestep_weights` says; else all count the same.
        """
        start = time.perf_counter()
        section, model = self._section, self._model
        params = convert.unflatten(
            {path: jnp.asarray(x, jnp.float32) for path, x in flat.items()},
            checkpoint.param_shapes(model, self._component),
        )
        if statistic == "gradient":
            assert self._component == "unet"  # checks.py refuses others
            sums = gradients.of_pictures(
                model, params, self._mesh, section.gradients, self._seed, self._variant
            )
            grads = convert.flatten(sums.grads)
            self.seconds += time.perf_counter() - start
            return {path: grads[path] for path in paths}
        if self._component == "text_encoder":
            found = calibrate.text_statistics(
                model.text_encoder, params, self._mesh, self._ids(()), paths, statistic,
                batch_size=section.batch_size, mask_pads=section.mask_pads,
            )  # fmt: skip
        else:
            text, walk = self.text_states(), self.trajectory()
            if statistic != "weighted_gram":
                walk = dataclasses.replace(walk, timestep_weights="uniform")
            found = calibrate.unet_statistics(
                model, params, self._mesh, text[:-1], text[-1:], paths,
                statistic.removeprefix("weighted_"), jax.random.key(self._seed), walk,
            )  # fmt: skip
        jax.block_until_ready(found)
        self.seconds += time.perf_counter() - start
        return found

    def text_states(self) -> Float[np.ndarray, "rows n d"]:
        """Of the prompts and, the last row, of no text."""
        model = self._model
        params = checkpoint.load(model, "text_encoder", dtype=np.float32, variant=self._variant)
        encode = jax.jit(clip.TextTower(model.text_encoder).apply)
        return np.asarray(encode({"params": params}, self._ids([""])))

    def trajectory(self) -> Trajectory:
        section = self._section
        return Trajectory(
            num_steps=section.num_steps, guidance_scale=section.guidance_scale,
            batch_size=section.batch_size, timestep_weights=section.timestep_weights,
            position_fraction=section.position_fraction,
        )  # fmt: skip

    def _ids(self, more: Sequence[str]) -> Int32[np.ndarray, "rows n"]:
        """Tokens of the prompts and then of `more`."""
        section, model = self._section, self._model
        prompts = captions.prompts(section.prompts, "train", section.num_prompts, self._seed)
        words = tokenizer.load(model.directory / "tokenizer")
        length = model.text_encoder.max_position_embeddings
        return tokenizer.encode(words, [*prompts, *more], length)


def _num_parameters(shapes: Any) -> int:
    return sum(leaf.size for leaf in convert.flatten(shapes).values())
