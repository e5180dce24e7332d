"""The part of a report on a sweep: quality against sparsity, where it breaks, how that looks."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sdprune_jax.report import charts, files
from sdprune_jax.report import sweep_rows as table
from sdprune_jax.report.charts import text

_COLUMNS = 8  # pictures of a strip, dense included
_STRIPS = 3  # prompts
_COMPARED_AT = 0.5  # sparsity


def verdict(sweep: Mapping[str, Any]) -> list[str]:
    """How much was measured, where methods break, and which is best, in sentences of HTML."""
    if not sweep:
        return []
    broken = [
        f"{text(cliff['method'])} on the {text(table.word(cliff['component']))} at"
        f" <b>{cliff['broken']:.1%}</b>"
        for cliff in sweep["cliffs"]
        if cliff["criterion"] == sweep["agreement"] and "broken" in cliff
    ]
    sentences = [
        f"<b>{len({table.point(row) for row in sweep['rows']})}</b> pruned models were measured on"
        f" {sweep['protocol']['evaluated']:,} prompts and {_seeds(sweep)}."
    ]
    if broken:
        sentences.append(f"The agreement of picture and prompt breaks with {', '.join(broken)}.")
    if best := list(_nearest(sweep)):
        sentences.append(
            f"Nearest to dense's latents at a sparsity of {_COMPARED_AT:.0%}: {'; '.join(best)}."
        )
    return sentences


def curves(sweep: Mapping[str, Any]) -> str:
    """A drawing for every figure and group: a line a method, and its cliff; then the numbers."""
    parts = []
    for group in table.groups(sweep):
        keys = " ".join(
            f'<span class="legend"><span class="key s{i % 6}"></span>{text(name)}</span>'
            for i, name in enumerate(group.methods)
        )
        parts.append(f'<h3>{text(group.title)}</h3>\n<p class="note">{keys}</p>')
        for figure in table.figures(sweep):
            drawn = {
                name: list(table.means(rows, group.component, figure))
                for name, rows in group.methods.items()
            }
            drawn = {name: points for name, points in drawn.items() if points}
            marks = table.marks(sweep, group.component, figure)
            if drawn:
                label = table.label(figure, sweep)
                plot = charts.lines(
                    drawn,
                    f"{label} against sparsity of the {group.title}",
                    levels=table.levels(sweep, figure),
                    marks={name: x for name, x in marks.items() if name in drawn},
                    is_joined=group.component != table.BOTH,
                )
                better = "higher" if figure == sweep["agreement"] else "lower"
                caption = text(f"{label[:1].upper()}{label[1:]}: {better} is better")
                parts.append(f"<figure><figcaption>{caption}</figcaption>{plot}</figure>")
        if group.component != table.BOTH:
            parts.append(_numbers(sweep, group))
    limits = {cliff["limit"] for cliff in sweep["cliffs"]}
    notes = ["Sparsity is of the layers in scope; where both components are pruned, nominal."]
    if len(sweep["dense"]) > 1:
        notes.append(f"A dot is the mean of {_seeds(sweep)}, its bar their range.")
    if limits:
        notes.append(
            f"Dashed: the cliff, the lowest sparsity at which a figure has gone more than"
            f" {min(limits):.0%} of the way from dense to chance. Chance is the text of another"
            " prompt, and for the distance, the mean of all of dense's latents."
        )
    notes += [
        f"No cliff of {table.word(cliff['component'])}, {cliff['method']}, by"
        f" {table.label(cliff['criterion'], sweep)}: {cliff['why_not']}."
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
    for component, title, methods in table.groups(sweep):
        if component == table.BOTH:
            continue
        for name, rows in methods.items():
            shown = [row for row in rows if row["seed"] == dense["seed"] and "images" in row]
            shown = _spaced(sorted(shown, key=lambda row: table.at(row, component)))
            edge = table.marks(sweep, component, sweep["agreement"]).get(name)
            columns = [("dense", dense, False)] + [
                (
                    f"{table.at(row, component):.1%}",
                    row,
                    edge is not None and table.at(row, component) >= edge,
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
                    f"<h3>{text(title)}: {text(name)}</h3>\n"
                    f'<table class="pictures strip" role="table" style="--columns:{_COLUMNS}">'
                    '<thead class="unseen" role="rowgroup"><tr role="row">'
                    f'<th role="columnheader" scope="col">prompt</th>{heads}</tr></thead>\n'
                    f'<tbody role="rowgroup">\n{body}\n</tbody></table>'
                )
    note = '<p class="note">Same prompt, same noise. Marked: at the cliff or above it.</p>'
    return charts.section("Along the axis", note, *parts) if parts else ""


def points(sweep: Mapping[str, Any]) -> str:
    """Every point in numbers, the mean and the range over seeds."""
    names = table.names(sweep)
    by_point: dict[Any, list[table.Row]] = {}
    for row in sweep["rows"]:
        by_point.setdefault(table.point(row), []).append(row)
    spread = lambda rows: [table.spread(rows, name) for name in names]
    rows = [["dense", "", "0.00%", "0.00%", *spread(sweep["dense"])]]
    for seeds in by_point.values():
        parts = seeds[0]["components"]
        methods = [
            f"{parts[name]['sparsity']:.1%} {parts[name]['method']}" if name in parts else "dense"
            for name in ("text_encoder", "unet")
        ]
        shares = [f"{seeds[0][key]:.2%}" for key in ("nominal", "true")]
        rows.append([*methods, *shares, *spread(seeds)])
    labels = [table.label(name, sweep) for name in names]
    heads = ["text encoder", "UNet", "nominal", "true", *labels]
    caption = (
        f"Every point, by {_seeds(sweep)}. Shares are of the text encoder and the UNet together:"
        " nominal as asked of all their parameters, true those that are zero."
    )
    return charts.section(
        "All points",
        f"<details><summary>{len(rows)} rows</summary>\n"
        + charts.table(caption, heads, rows, "layers")
        + "</details>",
    )


def _seeds(sweep: Mapping[str, Any]) -> str:
    seeds = len({row["seed"] for row in sweep["dense"]})
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def _nearest(sweep: Mapping[str, Any]) -> Iterator[str]:
    """Yields the best method of each group that has several, and in how many seeds it is best."""
    for component, title, methods in table.groups(sweep):
        distances = {
            name: {
                row["seed"]: row["figures"][table.DISTANCE]["value"]
                for row in rows
                if table.at(row, component) == _COMPARED_AT and table.DISTANCE in row["figures"]
            }
            for name, rows in methods.items()
        }
        means = {
            name: np.mean([*by_seed.values()]) for name, by_seed in distances.items() if by_seed
        }
        if len(means) < 2:
            continue
        best = min(means, key=lambda name: means[name])
        others = [by_seed for name, by_seed in distances.items() if name != best]
        wins = sum(
            all(value < by_seed.get(seed, np.inf) for by_seed in others)
            for seed, value in distances[best].items()
        )
        yield (
            f"<b>{text(best)}</b> on the {text(title)} ({means[best]:.3g}, the nearest in {wins} of"
            f" {_seeds(sweep)})"
        )


def _numbers(sweep: Mapping[str, Any], group: table.Group) -> str:
    """What is drawn of a group, in tables of methods and sparsities."""
    at = sorted({table.at(row, group.component) for r in group.methods.values() for row in r})
    tables = []
    for figure in table.figures(sweep):
        rows = [
            [
                name,
                *(
                    table.spread([r for r in rows if table.at(r, group.component) == x], figure)
                    for x in at
                ),
            ]
            for name, rows in group.methods.items()
        ]
        label = table.label(figure, sweep)
        caption = f"{group.title}, {label}: the mean and the range of {_seeds(sweep)}."
        dense = table.levels(sweep, figure).get("dense")
        caption += "" if dense is None else f" Dense: {dense:.4g}."
        heads = ["", *(f"{x:.1%}" for x in at)]
        tables.append(charts.table(caption, heads, rows, "layers"))
    return "<details><summary>In numbers</summary>\n" + "\n".join(tables) + "</details>"


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


def _spaced(rows: table.Rows) -> list[Mapping[str, Any]]:
    """As many as a strip has room for, from the first to the last."""
    if len(rows) < _COLUMNS:
        return list(rows)
    chosen = np.linspace(0, len(rows) - 1, _COLUMNS - 1).round().astype(int)
    return [rows[i] for i in chosen]
