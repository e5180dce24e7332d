"""The part of a report on a sweep: quality against sparsity, where it breaks, how that looks."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sdprune_jax.report import charts, files
from sdprune_jax.report.charts import text

_DISTANCE = "latent_mse_to_dense"
_WORDS = {
    "text_encoder": "text encoder",
    "unet": "UNet",
    _DISTANCE: "distance to dense's latents",
    "fd_clip_embedded": "FD of the embedded CLIP's features",
    "fid": "FID",
}
_BOTH = "both"  # components at once
_COLUMNS = 8  # pictures of a strip, dense included
_STRIPS = 3  # prompts

_Rows = Sequence[Mapping[str, Any]]


def verdict(sweep: Mapping[str, Any]) -> list[str]:
    """How much was measured, and where each method breaks, in sentences of HTML."""
    if not sweep:
        return []
    seeds = len({row["seed"] for row in sweep["dense"]})
    seeds_said = "one seed" if seeds == 1 else f"{seeds} seeds"
    found = [
        f"{text(cliff['method'])} on the {text(_word(cliff['component']))} at"
        f" <b>{cliff['broken']:.1%}</b>"
        for cliff in sweep["cliffs"]
        if cliff["criterion"] == sweep["agreement"] and "broken" in cliff
    ]
    sentences = [
        f"<b>{len({_point(row) for row in sweep['rows']})}</b> pruned models were measured on"
        f" {sweep['protocol']['evaluated']:,} prompts and {seeds_said}."
    ]
    if found:
        sentences.append(f"The agreement of picture and prompt breaks with {', '.join(found)}.")
    return sentences


def curves(sweep: Mapping[str, Any]) -> str:
    """A drawing for every figure and component: a line a method, and its cliff."""
    distances = [name for name in _names(sweep) if name.startswith(("fd_", "fid"))]
    figures = [sweep["agreement"], _DISTANCE, *distances]
    parts = []
    for component, methods in _series(sweep).items():
        keys = " ".join(
            f'<span class="legend"><span class="key s{i % 6}"></span>{text(name)}</span>'
            for i, name in enumerate(methods)
        )
        parts.append(f'<h3>{text(_word(component))}</h3>\n<p class="note">{keys}</p>')
        for figure in figures:
            drawn = {name: list(_means(rows, component, figure)) for name, rows in methods.items()}
            drawn = {name: points for name, points in drawn.items() if points}
            if drawn:
                label = _label(figure, sweep)
                plot = charts.lines(
                    drawn,
                    f"{label} against sparsity of the {_word(component)}",
                    levels=_levels(sweep, figure),
                    marks=_marks(sweep, component, figure),
                    is_joined=component != _BOTH,
                )
                better = "higher" if figure == sweep["agreement"] else "lower"
                caption = text(f"{label[:1].upper()}{label[1:]}: {better} is better")
                parts.append(f"<figure><figcaption>{caption}</figcaption>{plot}</figure>")
    limits = {cliff["limit"] for cliff in sweep["cliffs"]}
    notes = ["Sparsity is of the layers in scope; where both components are pruned, nominal."]
    if limits:
        notes.append(
            f"Dashed: the cliff, the lowest sparsity at which a figure has gone more than"
            f" {min(limits):.0%} of the way from dense to chance. Chance is the text of another"
            " prompt, and for the distance, the mean of all of dense's latents."
        )
    notes += [
        f"No cliff of {_word(cliff['component'])}, {cliff['method']}, by"
        f" {_label(cliff['criterion'], sweep)}: {cliff['why_not']}."
        for cliff in sweep["cliffs"]
        if "why_not" in cliff
    ]
    return charts.section(
        "Quality against sparsity",
        *(f'<p class="note">{text(note)}</p>' for note in notes),
        *parts,
    )


def strips(sweep: Mapping[str, Any], workdir: pathlib.Path, num_images: int) -> str:
    """Pictures of the same prompt and noise as sparsity grows, a table a method."""
    if not sweep["dense"] or not sweep["prompts"]:
        return ""
    dense, parts = sweep["dense"][0], []
    for component, methods in _series(sweep).items():
        if component == _BOTH:
            continue
        for name, rows in methods.items():
            shown = [row for row in rows if row["seed"] == dense["seed"] and "images" in row]
            shown = _spaced(sorted(shown, key=lambda row: _at(row, component)))
            edge = _marks(sweep, component, sweep["agreement"]).get(name)
            columns = [("dense", dense, False)] + [
                (
                    f"{_at(row, component):.1%}",
                    row,
                    edge is not None and _at(row, component) >= edge,
                )
                for row in shown
            ]
            body = "\n".join(_strip(sweep, columns, workdir, min(num_images, _STRIPS)))
            if shown and body:
                heads = "".join(
                    f'<th role="columnheader" scope="col">{text(head)}</th>'
                    for head, _, _ in columns
                )
                parts.append(
                    f"<h3>{text(_word(component))}, {text(name)}</h3>\n"
                    f'<table class="pictures strip" role="table" style="--columns:{_COLUMNS}">'
                    '<thead class="unseen" role="rowgroup"><tr role="row">'
                    f'<th role="columnheader" scope="col">prompt</th>{heads}</tr></thead>\n'
                    f'<tbody role="rowgroup">\n{body}\n</tbody></table>'
                )
    note = '<p class="note">Same prompt, same noise. Marked: at the cliff or above it.</p>'
    return charts.section("Along the axis", note, *parts) if parts else ""


def points(sweep: Mapping[str, Any]) -> str:
    """Every row in numbers, the mean over seeds."""
    names = _names(sweep)
    by_point: dict[Any, list[Mapping[str, Any]]] = {}
    for row in sweep["rows"]:
        by_point.setdefault(_point(row), []).append(row)
    rows = [["dense", "", "0.00%", "0.00%", *_cells(sweep["dense"], names)]]
    for found in by_point.values():
        parts = found[0]["components"]
        said = [
            f"{parts[name]['sparsity']:.1%} {parts[name]['method']}" if name in parts else "dense"
            for name in ("text_encoder", "unet")
        ]
        shares = [f"{found[0][key]:.2%}" for key in ("nominal", "true")]
        rows.append([*said, *shares, *_cells(found, names)])
    heads = ["text encoder", "UNet", "nominal", "true", *(_label(name, sweep) for name in names)]
    caption = (
        "Every point. Shares are of the text encoder and the UNet together: nominal as asked of all"
        " their parameters, true those that are zero."
    )
    return charts.section(
        "All points",
        f"<details><summary>{len(rows)} rows</summary>\n"
        + charts.table(caption, heads, rows, "layers")
        + "</details>",
    )


def _strip(
    sweep: Mapping[str, Any],
    columns: Sequence[tuple[str, Mapping[str, Any], bool]],
    workdir: pathlib.Path,
    num_prompts: int,
) -> Iterator[str]:
    for i, prompt in enumerate(sweep["prompts"][:num_prompts]):
        paths = [workdir / row["images"] / f"{i:06d}.png" for _, row, _ in columns]
        if not all(path.exists() for path in paths):
            continue
        cells = "".join(
            f'<td role="cell">{charts.picture(files.picture(path), f"{head}: {prompt}")}'
            f'<span class="{"lost" if is_broken else ""}">{text(head)}</span></td>\n'
            for path, (head, _, is_broken) in zip(paths, columns, strict=True)
        )
        yield f'<tr role="row"><th role="rowheader" scope="row">{text(prompt)}</th>{cells}</tr>'


def _series(sweep: Mapping[str, Any]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Rows by component and method."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in sweep["rows"]:
        parts = row["components"]
        component = next(iter(parts)) if len(parts) == 1 else _BOTH
        method = " and ".join(dict.fromkeys(part["method"] for part in parts.values()))
        found.setdefault(component, {}).setdefault(method, []).append(row)
    return found


def _means(rows: _Rows, component: str, figure: str) -> Iterator[tuple[float, list[float]]]:
    """Each sparsity, and the figure of every seed."""
    at: dict[float, list[float]] = {}
    for row in rows:
        if figure in row["figures"]:
            at.setdefault(_at(row, component), []).append(row["figures"][figure]["value"])
    yield from sorted(at.items())


def _at(row: Mapping[str, Any], component: str) -> float:
    return row["nominal"] if component == _BOTH else row["components"][component]["sparsity"]


def _point(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(
        (name, part["method"], part["sparsity"]) for name, part in row["components"].items()
    )


def _marks(sweep: Mapping[str, Any], component: str, figure: str) -> dict[str, float]:
    return {
        cliff["method"]: cliff["broken"]
        for cliff in sweep["cliffs"]
        if (cliff["component"], cliff["criterion"]) == (component, figure) and "broken" in cliff
    }


def _levels(sweep: Mapping[str, Any], figure: str) -> dict[str, float]:
    """What the dense model and chance get, on average over seeds."""
    chance = [row["chance"][figure] for row in sweep["dense"] if figure in row["chance"]]
    dense = [row["figures"][figure]["value"] for row in sweep["dense"] if figure in row["figures"]]
    dense = dense or ([0.0] if figure == _DISTANCE else [])
    levels = {"dense": dense, "chance": chance}
    return {name: float(np.mean(values)) for name, values in levels.items() if values}


def _names(sweep: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for row in sweep["rows"] for name in row["figures"]))


def _cells(rows: _Rows, names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        values = [row["figures"][name]["value"] for row in rows if name in row["figures"]]
        cells.append(f"{np.mean(values):.4g}" if values else "")
    return cells


def _spaced(rows: _Rows) -> list[Mapping[str, Any]]:
    """As many as a strip has room for, from the first to the last."""
    if len(rows) < _COLUMNS:
        return list(rows)
    chosen = np.linspace(0, len(rows) - 1, _COLUMNS - 1).round().astype(int)
    return [rows[i] for i in chosen]


def _label(name: str, sweep: Mapping[str, Any]) -> str:
    return "agreement with the prompt" if name == sweep["agreement"] else _word(name)


def _word(name: str) -> str:
    return _WORDS.get(name, name.replace("_", " "))
