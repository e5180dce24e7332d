"""Pieces of an HTML page: escaped text, sections, tables, plots drawn by hand, pictures.

All words of a plot are HTML around the drawing, so that the drawing may stretch and they do not.
"""

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

_MAX_PIXELS = 384  # longer side of a picture: twice what a page has room for
_SMALL_PIXELS = 128  # up to here a picture is enlarged, in crisp pixels, and stored exactly


def text(value: Any) -> str:
    """Returns `value` as it may stand in a page, between tags or in an attribute."""
    return html.escape(str(value))


def section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>\n<h2>{text(title)}</h2>", *parts, "</section>"])


def table(
    caption: str, columns: Sequence[Any], rows: Iterable[Sequence[Any]], css: str = ""
) -> str:
    """Returns a table of escaped texts; the first of each row, and of `columns`, names the row."""
    head = "".join(
        f'<th scope="col">{text(cell)}</th>' if cell != "" else "<td></td>" for cell in columns
    )
    body = "\n".join(
        f'<tr><th scope="row">{text(first)}</th>'
        + "".join(f"<td>{text(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    # The caption stands outside of what scrolls: a phone shows it whole.
    return (
        f'<figure class="table"><figcaption>{text(caption)}</figcaption>\n'
        f'<div class="scroll" role="region" aria-label="{text(caption)}" tabindex="0">'
        f'<table class="{css}" aria-label="{text(caption)}">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div></figure>"
    )


def in_bytes(num: int) -> str:
    """The number in the largest unit, of 1000, that leaves at least 1."""
    power = min(4, (len(str(num)) - 1) // 3)
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    return f"{num / 1000**power:.{2 if power else 0}f}\N{NO-BREAK SPACE}{unit}"


def picture(pixels: UInt8[np.ndarray, "h w 3"], alt: str) -> str:
    """Returns an `img` that holds the picture: exactly if it is small, else as WebP."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    if is_small := max(image.size) <= _SMALL_PIXELS:
        image.save(file, "png")
    else:
        image.thumbnail((_MAX_PIXELS, _MAX_PIXELS))
        image.save(file, "webp", quality=90)
    kind, css = ("png", "small") if is_small else ("webp", "")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<img class="{css}" src="data:image/{kind};base64,{data}" width="{image.width}"'
        f' height="{image.height}" alt="{text(alt)}">'
    )


def in_depth_order(layers: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Sorts layers by block, from input to output; within a block by name, 2 before 10."""

    def position(layer: Mapping[str, Any]) -> tuple[int, str]:
        name = layer["name"]
        place = 0 if name.startswith(("conv_in", "time_")) else 2 if name.startswith("conv_") else 1
        return place, re.sub(r"\d+", lambda number: number[0].zfill(6), name)  # down < mid < up

    return sorted(layers, key=position)


def layer_bars(layers: Sequence[Mapping[str, Any]], label: str) -> str:
    """Returns two rows of bars over the depth of the network: sparsity, and threshold.

    Args:
        layers: in order, each with `name`, `weights`, `zeros` and `threshold`.
        label: what the bars are of, for those who cannot see them.
    """
    blocks = [block(layer["name"]) for layer in layers]
    starts = [i for i, name in enumerate(blocks) if i == 0 or blocks[i - 1] != name]
    ends = [*starts[1:], len(blocks)]
    bands = "".join(
        f'<rect class="band" x="{start}" y="0" width="{end - start}" height="100"/>'
        for start, end in list(zip(starts, ends, strict=True))[::2]
    )
    top = max(layer["threshold"] for layer in layers) or 1
    titles = [
        f"{layer['name']}: {layer['zeros'] / layer['weights']:.1%} of {layer['weights']:,} weights"
        f" zero, threshold {layer['threshold']:.3g}"
        for layer in layers
    ]
    zeros = _bars([layer["zeros"] / layer["weights"] for layer in layers], titles)
    thresholds = _bars([layer["threshold"] / top for layer in layers], titles)
    words = "".join(
        f'<span class="block {"short" if len(blocks[start]) < 3 else ""}"'
        f' style="left:{start / len(blocks):.2%};width:{(end - start) / len(blocks):.2%}">'
        f"<i>{text(blocks[start])}</i></span>"
        for start, end in zip(starts, ends, strict=True)
    )
    size = f"0 0 {len(blocks)} 100"
    return _plot(
        bands + zeros, size, f"{label}: sparsity", {0: "100%", 50: "50%", 100: "0%"}
    ) + _plot(
        bands + thresholds, size, f"{label}: threshold", {0: f"{top:.2g}", 100: "0"}, words, "low"
    )


def histogram(
    edges: Sequence[float], before: Sequence[int], after: Sequence[int], label: str
) -> str:
    """Returns the counts before in pale, and those after over them, on a log axis."""
    counts = [n for n in (*before, *after) if n > 0] or [1]
    bottom = math.log10(min(counts)) - 0.3  # so that the fewest can be seen
    top = max(math.ceil(math.log10(max(counts))), bottom + 1)
    height = lambda n: (math.log10(n) - bottom) / (top - bottom) if n > 0 else 0.0
    powers = range(math.ceil(bottom), math.floor(top) + 1)
    ticks = {
        100 - 100 * height(10**d): f"10<sup>{d}</sup>" for d in powers[:: len(powers) // 5 + 1]
    }
    areas = "".join(
        f'<path class="{css}" d="M0 100'
        + "".join(f"V{100 - 100 * height(n):.4g}H{i + 1}" for i, n in enumerate(counts))
        + 'V100Z"/>'
        for css, counts in (("gone", before), ("kept", after))
    )
    zero = min(max(-edges[0] / (edges[-1] - edges[0]), 0), 1)
    words = (
        f"<span>{edges[0]:.2g}</span>"
        f'<span style="left:{zero:.2%}">0</span>'
        f'<span style="left:100%">{edges[-1]:.2g}</span>'
    )
    return _plot(areas, f"0 0 {len(before)} 100", label, ticks, words)


def intervals(figures: Mapping[str, Mapping[str, float]], label: str) -> str:
    """Returns one row a model: a point and the interval around it, on a shared axis.

    Args:
        figures: `value`, `low` and `high` by name of the model.
        label: what the figure is, for those who cannot see it.
    """
    low = min(figure["low"] for figure in figures.values())
    high = max(figure["high"] for figure in figures.values())
    margin = 0.05 * (high - low) or abs(high) or 1.0
    left, width = low - margin, high - low + 2 * margin
    x = lambda value: 100 * (value - left) / width
    parts = []
    for i, (name, figure) in enumerate(figures.items()):
        y = 100 * (i + 0.5) / len(figures)
        a, b, middle = (x(figure[key]) for key in ("low", "high", "value"))
        words = f"{name}: {figure['value']:.4g}, {figure['low']:.4g} to {figure['high']:.4g}"
        parts.append(
            f'<g><title>{text(words)}</title><rect class="gone" x="{a:.4g}" y="{y - 5:.4g}"'
            f' width="{max(b - a, 0.3):.4g}" height="10"/><rect class="kept"'
            f' x="{middle - 0.4:.4g}" y="{y - 12:.4g}" width=".8" height="24"/></g>'
        )
    ticks = {100 * (i + 0.5) / len(figures): text(name) for i, name in enumerate(figures)}
    ends = f'<span>{left:.3g}</span><span style="left:100%">{left + width:.3g}</span>'
    return _plot("".join(parts), "0 0 100 100", label, ticks, ends, "low")


def lines(
    series: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    label: str,
    *,
    levels: Mapping[str, float],
    marks: Mapping[str, float],
    is_joined: bool = True,
) -> str:
    """Returns the mean of each point over a bar of its range, joined by lines, on shared axes.

    Args:
        series: by name, points in order: x, a fraction, and the values of y that were measured.
        label: what y is, for those who cannot see it.
        levels: y of horizontal lines, by what they are.
        marks: x of a vertical line, by name of the series that it belongs to.
        is_joined: whether the points of a series follow one another.
    """
    ys = [y for points in series.values() for _, values in points for y in values]
    xs = [x for points in series.values() for x, _ in points] + list(marks.values())
    low, high = min([*ys, *levels.values()]), max([*ys, *levels.values()])
    margin = 0.06 * (high - low) or abs(high) or 1.0
    left, right = math.floor(10 * min(xs) + 1e-9) / 10, math.ceil(10 * max(xs) - 1e-9) / 10
    right = max(right, left + 0.1)
    across = lambda x: 100 * (x - left) / (right - left)
    down = lambda y: 100 * (high + margin - y) / (high - low + 2 * margin)
    drawn = []
    for i, (name, points) in enumerate(series.items()):
        css = f"s{i % 6}"
        means = [(across(x), down(sum(y) / len(y))) for x, y in points]
        if name in marks:
            words = f"{name}: the cliff is at {marks[name]:.1%}"
            drawn.append(
                f'<g><title>{text(words)}</title><path class="cliff {css}"'
                f' d="M{across(marks[name]):.4g} 0V100"/></g>'
            )
        if is_joined:
            path = "L".join(f"{x:.4g} {y:.4g}" for x, y in means)
            drawn.append(f'<path class="line {css}" d="M{path}"/>')
        for (x, y), (at, values) in zip(means, points, strict=True):
            words = f"{name} at {at:.1%}: {sum(values) / len(values):.4g}"
            if len(values) > 1:
                words += f", {min(values):.4g} to {max(values):.4g} in {len(values)} seeds"
            bar = f"M{x:.4g} {down(min(values)):.4g}V{down(max(values)):.4g}"
            drawn.append(
                f'<g><title>{text(words)}</title><path class="range {css}" d="{bar}"/>'
                f'<path class="dot {css}" d="M{x:.4g} {y:.4g}h0"/></g>'
            )
    ticks = {down(y): text(f"{word} {y:.3g}") for word, y in levels.items()}
    for y in (low, high):
        if all(abs(down(y) - other) > 9 for other in ticks):
            ticks[down(y)] = f"{y:.3g}"
    num = round(10 * (right - left))
    words = "".join(
        f'<span style="left:{100 * i / num:.4g}%">{left + i / 10:.0%}</span>'
        for i in range(0, num + 1, num // 10 + 1)
    )
    return _plot("".join(drawn), "0 0 100 100", label, ticks, words, "tall")


def block(name: str) -> str:
    """Returns "down 0" for a layer of the UNet's first block, "3" for one of text layer 3."""
    found = re.search(r"(down|mid|up)_blocks?(?:\.(\d+))?|layers\.(\d+)", name)
    return (
        " ".join(part for part in found.groups() if part) if found else re.split(r"[._]", name)[0]
    )


def _bars(heights: Sequence[float], titles: Sequence[str]) -> str:
    """Bars of unit width; heights in [0, 1]."""
    return "".join(
        f'<rect class="kept" x="{i + 0.1:g}" y="{100 - 100 * height:.4g}" width=".8"'
        f' height="{100 * height:.4g}"><title>{text(title)}</title></rect>'
        for i, (height, title) in enumerate(zip(heights, titles, strict=True))
    )


def _plot(
    body: str,
    size: str,
    label: str,
    ticks: Mapping[float | int, str],
    words: str = "",
    css: str = "",
) -> str:
    """Returns a drawing that fills the width, with its axes.

    Args:
        body: SVG; y runs from 0, the top, to 100.
        size: the `viewBox`.
        label: the same in words.
        ticks: HTML of the y axis, by position in [0, 100].
        words: HTML of the x axis.
        css: class.
    """
    width = size.split()[2]
    lines = "".join(f'<line x1="0" x2="{width}" y1="{y:.4g}" y2="{y:.4g}"/>' for y in ticks)
    marks = "".join(f'<span style="top:{y:.4g}%">{mark}</span>' for y, mark in ticks.items())
    return (
        f'<div class="plot {css}"><div class="y" aria-hidden="true">{marks}</div>'
        f'<svg viewBox="{size}" preserveAspectRatio="none" role="img" aria-label="{text(label)}">'
        f'{lines}{body}</svg><div class="x" aria-hidden="true">{words}</div></div>\n'
    )
