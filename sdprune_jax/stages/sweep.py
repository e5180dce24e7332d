"""Stage `sweep`: many pruned models, one table, and the sparsity at which each method breaks.

No model is written. A row is added to the table once it is whole, so a sweep that was stopped goes
on with what is missing, and one of more points computes only those.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from sdprune_jax import NotFiniteError, UserError, artefacts, config, sharding, sites
from sdprune_jax.data import cache, captions
from sdprune_jax.evaluate import needs, task
from sdprune_jax.evaluate.measurement import Measurement
from sdprune_jax.evaluate.protocols import PROTOCOLS, Protocol
from sdprune_jax.files import convert, json_files, model_directory
from sdprune_jax.models import samplers
from sdprune_jax.pruning import request
from sdprune_jax.scoring.calibration import Calibration
from sdprune_jax.stages import cost_card, inputs
from sdprune_jax.stages.prune import method_of, open_calibration
from sdprune_jax.sweep import cliff, points, trial

_KINDS = ("fid", "clip_score", "recall")  # of metrics; the others say the same at more cost

_Row = dict[str, Any]
_RowOf = Callable[[points.Point, int], _Row]  # of a point and a seed; measured if need be


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Writes `workdir/sweep.json`: the dense model, every point, every cliff.

    The first pictures of each stay in `workdir/sweep`.
    """
    section = run.sweep
    assert section is not None
    model = model_directory.open_model(model_directory.directory_of(run.model))
    protocol = _protocol(section)
    edge = protocol.generate_size or model.unet.sample_size * model.vae.downscale
    _refuse(section, model, protocol, edge)
    measurement = _measurement(section)
    asked = task.load(
        protocol.data,
        section.measure.data,
        section.measure.num_images or protocol.num_images,
        needs.has_pictures(measurement, protocol),
    )
    made_from = _inputs(run, model, protocol, measurement, asked)
    values = _values(run, protocol, asked, edge)
    table = _begun(artefacts.output_of("sweep", run.workdir), made_from, values, section.num_kept)
    all_points = points_of(section)

    def calibration(component: str, seed: int) -> Calibration:
        return open_calibration(section.calibration, model, component, mesh, seed, run.variant)

    bench = functools.cache(
        lambda: trial.open_bench(
            mesh,
            model,
            protocol,
            asked,
            (edge, edge),
            table.output.directory,
            all_points,
            calibration,
            measurement,
            run.dtype,
            run.variant,
        )
    )
    seeds = range(run.seed, run.seed + section.num_seeds)
    row_of = functools.partial(_row_of, bench, table)
    for seed in seeds:
        _dense_of(bench, table, seed)
        for i, point in enumerate(all_points):
            row_of(point, seed)
            logging.info("seed %d: %d of %d points", seed, i + 1, len(all_points))
    if section.cliff:
        found = [
            _cliff_of(section.cliff, series, criterion, values, row_of, seeds)
            for series in points.series(all_points)
            for criterion in (values["agreement"], trial.DISTANCE)
        ]
        if found != values["cliffs"]:
            values["cliffs"] = found
            table.write()
    return table.output.record


def _inputs(
    run: config.Run,
    model: model_directory.ModelConfig,
    protocol: Protocol,
    measurement: Measurement,
    asked: task.Task,
) -> dict[str, Any]:
    """Returns all that every row depends on, beside its point and seed."""
    section = run.sweep
    assert section is not None
    return {
        "measure": dataclasses.asdict(measurement),
        "calibration": dataclasses.asdict(section.calibration),
        "protocol": dataclasses.asdict(protocol),
        "calibration prompts": captions.state(section.calibration.prompts),
        "dtype": run.dtype,
        "variant": run.variant,
        "model": artefacts.model_state(model.directory, run.variant),
        "data": asked.state,
        "prompts": list(asked.prompts),
        "networks": needs.states(measurement, protocol),
    }


def points_of(section: config.Sweep) -> list[points.Point]:
    """The points that the config lists."""
    return [
        points.Point(
            **{
                name: method_of(part)
                for name in points.COMPONENTS
                if (part := getattr(point, name)) is not None
            }
        )
        for point in section.points
    ]


class _Table(NamedTuple):
    """The record, which grows by a row whenever a point is measured."""

    output: artefacts.Output
    made_from: artefacts.MadeFrom
    values: dict[str, Any]
    num_kept: int

    def write(self) -> None:
        artefacts.seal(self.output, self.made_from, self.values)

    def drawing(self, key: str) -> pathlib.Path:
        """Returns where the pictures of a row are until it is measured."""
        return self.output.directory / "drawing" / key

    def add(self, kind: str, key: str, row: _Row, num_images: int, num_kept: int) -> _Row:
        """Adds a row, with the first pictures of those that were drawn for it."""
        folder = self.output.directory / key / "images"
        if "failed" in row:
            num_kept = 0
        else:
            row = row | {"images": f"sweep/{key}/images"}
        if jax.process_index() == 0:
            trial.keep(self.drawing(key), folder, num_images, num_kept)
        sharding.wait_for_all(key)
        self.values[kind].append(row)
        self.write()
        return row


def _values(run: config.Run, protocol: Protocol, asked: task.Task, edge: int) -> dict[str, Any]:
    """Returns a record without rows."""
    assert run.sweep is not None
    names = [metric.name for metric in protocol.metrics if metric.kind == "clip_score"]
    counts = {"evaluated": len(asked.prompts), "references": asked.num_references}
    made = {"height": edge, "width": edge, "dtype": run.dtype}
    return {
        "model": run.model,
        "protocol": dataclasses.asdict(protocol) | counts | made,
        "agreement": names[0],
        "prompts": list(asked.prompts[: run.sweep.num_kept]),
        "dense": [],
        "rows": [],
        "cliffs": [],
    }


def _begun(
    output: artefacts.Output,
    made_from: artefacts.MadeFrom,
    values: dict[str, Any],
    num_kept: int,
) -> _Table:
    """Returns the table with the rows that there are already, but for those that are damaged."""
    old, damaged = artefacts.begun(output, made_from)
    if old:
        whole = lambda row: (
            not any(f"sweep/{name}".startswith(row.get("images", "-")) for name in damaged)
        )
        values |= {name: [*filter(whole, old[name])] for name in ("dense", "rows")}
        values["cliffs"] = old["cliffs"]
        logging.info("%s has %d rows already", output.record, len(values["rows"]))
    return _Table(output, made_from, values, num_kept)


def _row_of(
    bench: Callable[[], trial.Bench], table: _Table, point: points.Point, seed: int
) -> _Row:
    key = cache.fingerprint(dataclasses.asdict(point), seed)
    for row in table.values["rows"]:
        if row["key"] == key:
            return row
    dense = _dense_of(bench, table, seed)
    of_dense = table.output.directory.parent / dense["images"]
    try:
        row = trial.trial(bench(), point, seed, table.drawing(key), of_dense)
    except NotFiniteError as error:  # a broken model is a result, and others are to come
        logging.warning("a point failed: %s", error)
        row = trial.failed(bench(), point, seed, str(error))
    num_images = len(bench().asked.prompts)
    return table.add("rows", key, {"key": key} | row, num_images, table.num_kept)


def _dense_of(bench: Callable[[], trial.Bench], table: _Table, seed: int) -> _Row:
    for row in table.values["dense"]:
        if row["seed"] == seed:
            return row
    key, num_images = f"dense-{seed}", len(bench().asked.prompts)
    row = trial.dense(bench(), seed, table.drawing(key))
    return table.add("dense", key, row, num_images, num_images)


def _cliff_of(
    section: config.Cliff,
    series: points.Series,
    criterion: str,
    values: dict[str, Any],
    row_of: _RowOf,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """The cliff of a series by one figure, averaged over seeds; or why there is none."""
    dense = {row["seed"]: row for row in values["dense"]}
    is_distance = criterion == trial.DISTANCE

    @functools.cache
    def share(sparsity: float) -> float:
        if sparsity == 0:
            return 0.0
        shares = []
        for seed in seeds:
            figures = row_of(series.point(sparsity), seed)["figures"]
            if not figures:
                return np.inf
            shares.append(
                cliff.way_to_chance(
                    figures[criterion]["value"],
                    0.0 if is_distance else dense[seed]["figures"][criterion]["value"],
                    dense[seed]["chance"][criterion],
                    higher_is_better=not is_distance,
                )
            )
        return float(np.mean(shares))

    found: dict[str, Any] = {
        "component": series.component,
        "method": points.label(series.method),
        "criterion": criterion,
        "limit": section.limit,
    }
    try:
        tried = {sparsity: share(sparsity) for sparsity in (0.0, *series.sparsities)}
        low, high = cliff.bracket(tried, section.limit)
        if high is None and low >= section.highest:
            raise cliff.NoBreakError(f"whole still at {low:g}, and highest is {section.highest:g}")
        high = section.highest if high is None else high
        edge = cliff.bisect(share, low, high, section.tolerance, section.limit)
    except cliff.NoBreakError as error:
        logging.warning("no cliff of %s: %s", found, error)
        return found | {"why_not": str(error)}
    whole_again = [s for s, way in tried.items() if s > edge.broken and way <= section.limit]
    return found | edge._asdict() | {"whole_again": whole_again}


def _measurement(section: config.Sweep) -> Measurement:
    return Measurement(**dataclasses.asdict(section.measure))


def _protocol(section: config.Sweep) -> Protocol:
    protocol = PROTOCOLS[section.measure.protocol]
    metrics = tuple(metric for metric in protocol.metrics if metric.kind in _KINDS)
    steps = section.num_steps or protocol.num_steps
    return dataclasses.replace(protocol, metrics=metrics, num_steps=steps)


def _refuse(
    section: config.Sweep,
    model: model_directory.ModelConfig,
    protocol: Protocol,
    edge: int,
) -> None:
    """Raises for all that would end the sweep later, at once."""
    problems = needs.problems(_measurement(section), protocol, edge, "config.sweep.measure")
    all_points = points_of(section)
    asked = {f"points[{i}]": point for i, point in enumerate(all_points)}
    if section.cliff:  # bisected between points, or up to `highest`
        found = enumerate(points.series(all_points))
        asked |= {f"cliff.highest, series {i}": s.point(section.cliff.highest) for i, s in found}
    for where, point in asked.items():
        for name, part in points.methods(point).items():
            shapes = model_directory.param_shapes(model, name)
            leaves = convert.flatten(shapes)
            layers = sites.prunable(shapes, name, part.scope)
            try:
                request.check({path: leaves[path] for path in layers}, part)
            except ValueError as error:
                problems.append(f"{where}.{name}: {error}")
    if problems:
        raise UserError("config.sweep is not possible:\n  " + json_files.listing(problems))


def check(run: config.Run, num_devices: int) -> None:
    """Checks the model, every point, the data, the networks, the calibration, and the sampler."""
    section = run.sweep
    assert section is not None
    model, protocol = inputs.check_model(run), _protocol(section)
    edge = protocol.generate_size or model.unet.sample_size * model.vae.downscale
    _refuse(section, model, protocol, edge)
    samplers.timetable(model.schedule, protocol.sampler, protocol.num_steps)
    inputs.check_calibration(section.calibration, model, num_devices, "sweep.calibration")


def plan(run: config.Run, planned: cost_card.Planned) -> str:
    """Returns every point with the sparsity that papers state and the one that there is."""
    section, shapes = run.sweep, planned.shapes
    assert section is not None
    rows: list[cost_card.Row] = [("sweep", *points.COMPONENTS, "nominal", "true", "zeros")]
    for i, point in enumerate(points_of(section)):
        parts = points.methods(point)
        words = [
            f"{parts[name].sparsity:g} {points.label(parts[name])}" if name in parts else "dense"
            for name in points.COMPONENTS
        ]
        found = points.expected(point, shapes)
        sizes = (f"{found.nominal:.2%}", f"{found.true:.2%}", f"{found.zeros:,}")
        rows.append((str(i + 1), *words, *sizes))
    protocol = PROTOCOLS[section.measure.protocol]
    count = section.measure.num_images or protocol.num_images
    steps = section.num_steps or protocol.num_steps
    cliffs = len(list(points.series(points_of(section)))) if section.cliff else 0
    total = count * section.num_seeds * (len(section.points) + 1)
    return "\n\n".join(
        [
            cost_card.aligned(rows),
            "shares are of the text encoder and the UNet together: nominal as asked of all their"
            " parameters, true those that are zero\n"
            f"{protocol.name}: {len(section.points)} points and dense, {count:,} images,"
            f" {section.num_seeds} seeds, {steps} steps: {total:,} images in all"
            + (f", and those that bisect {cliffs} cliffs by 2 figures" if cliffs else ""),
        ]
    )
