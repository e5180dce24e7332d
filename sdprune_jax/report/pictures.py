"""The part of a report on pictures: side by side, their difference, whether they are found."""

import math
import pathlib
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sdprune_jax.report import charts, files
from sdprune_jax.report.charts import text

_RECALL = "clip_embedded_r_at_"  # prefix of keys of `scores` and `chance` in generate.json
_CLIPPED = 0.01  # fraction of the differences that may be too large for the scale


def verdict(images: Mapping[str, Any]) -> list[str]:
    """One sentence of HTML on how many pictures are still found; none if that was not measured."""
    key = f"{_RECALL}10"
    scored = {name: m for name, m in images.get("models", {}).items() if key in m["scores"]}
    if not scored:
        return []
    shares = " and ".join(
        f"<b>{model['scores'][key]:.1%}</b> of the {text(name)}" for name, model in scored.items()
    )
    num = min(model["scores"].get("num", 0) for model in scored.values())
    changes = list(_changes(images).values())
    difference = f"; {_outcome(changes[0])}" if len(changes) == 1 else ""
    return [
        f"The embedded CLIP ranks the right caption among its first 10 for {shares} pictures"
        f" ({num:,.0f} each{difference}), a figure that compares with no other CLIP's."
    ]


def grid(images: Mapping[str, Any], folder: pathlib.Path, num_images: int) -> str:
    """The pictures of every model for the first prompts, each beside its difference to dense's."""
    prompts = images["prompts"][:num_images]
    if not images["models"] or not prompts:
        return ""
    others = [name for name in images["models"] if name != "dense" and "dense" in images["models"]]
    scale = _scale(images, folder, len(prompts), others)
    columns = []
    for name in images["models"]:
        columns += [name, f"difference of {name}"] if name in others else [name]
    head = "".join(f'<th role="columnheader" scope="col">{text(name)}</th>' for name in columns)
    rows = "\n".join(
        f'<tr role="row"><th role="rowheader" scope="row">{text(prompt)}</th>'
        + "".join(_cells(images, folder, i, scale, others))
        + "</tr>"
        for i, prompt in enumerate(prompts)
    )
    notes = [f"The first {len(prompts)} of {len(images['prompts'])} prompts, same noise."]
    if others:
        notes.append(
            f"Difference: how far each colour is from dense's, times {scale}; black is no change."
            " PSNR in dB says how close the two are, not which is better."
        )
    if any(model["found"] for model in images["models"].values()):
        notes.append("Found: the right caption is among the embedded CLIP's first 10.")
    return charts.section(
        "Pictures",
        f'<p class="note">{" ".join(notes)}</p>',
        f'<table class="pictures" role="table" style="--columns:{min(3, len(columns))}">'
        '<thead class="unseen" role="rowgroup"><tr role="row">'
        f'<th role="columnheader" scope="col">prompt</th>{head}</tr></thead>\n'
        f'<tbody role="rowgroup">\n{rows}\n</tbody></table>',
    )


def retrieval(images: Mapping[str, Any]) -> str:
    """How many pictures are found, with the uncertainty that their number brings."""
    models = images["models"]
    rows = []
    for k, label in ((1, "Right caption first"), (10, "Right caption among the first 10")):
        shares = [_share(model["scores"], f"{_RECALL}{k}") for model in models.values()]
        chance = images["chance"].get(f"{_RECALL}{k}")
        if any(shares):
            rows.append([label, *shares, "" if chance is None else f"{chance:.2%}"])
    if not rows:
        return ""
    rows.append(["Pictures", *(f"{m['scores'].get('num', 0):,.0f}" for m in models.values()), ""])
    notes = [
        f"Among the first 10, {name} against dense: {_outcome(change)}; p = {change[2]:.2g}, exact"
        " sign test."
        for name, change in _changes(images).items()
    ]
    if images["protocol"].get("prompts") == "embedded:train":
        notes.append(
            "These prompts are from the training split: the embedded CLIP has learned from them."
        )
    one = images["chance"].get(f"{_RECALL}1")
    among = f" of all {round(1 / one):,} concepts" if one else ""
    return charts.section(
        "Are the pictures still of what was asked?",
        f"<p>A picture is compared with the captions{among} by the embedded CLIP, the small one"
        " trained beside the embedded model. Its figures compare with nothing else: not with CLIP"
        " scores in papers, nor with those of another training.</p>",
        charts.table(
            "Share of pictures whose caption is found; in brackets the 95% interval (Wilson).",
            ["", *models, "by chance"],
            rows,
        ),
        *(f"<p>{text(note)}</p>" for note in notes),
    )


def _cells(
    images: Mapping[str, Any], folder: pathlib.Path, i: int, scale: int, others: list[str]
) -> Iterator[str]:
    """The cells of prompt `i`."""
    prompt = images["prompts"][i]
    for name, model in images["models"].items():
        pixels = files.picture(folder / model["files"][i])
        words = []
        for found in model["found"][i : i + 1]:
            mark = ("found", "✓ found") if found else ("lost", "✗ not found")
            words.append(f'<span class="{mark[0]}">{mark[1]}</span>')
        yield _cell(charts.picture(pixels, f"{name}: {prompt}"), name, words)
        if name in others:
            difference = _difference(images, folder, name, i)
            shown = np.minimum(difference.astype(np.int32) * scale, 255).astype(np.uint8)
            words = [
                f"<span>{psnr:.1f} dB</span>" for psnr in model.get("psnr_to_dense", [])[i : i + 1]
            ]
            if not difference.any():
                words = ["<span>no difference</span>"]
            alt = f"difference of {name} from dense, times {scale}: {prompt}"
            yield _cell(
                charts.picture(shown, alt), f"{scale}\N{MULTIPLICATION SIGN} difference", words
            )


def _cell(picture: str, name: str, words: list[str]) -> str:
    return f'<td role="cell">{picture}<span>{text(name)}</span>{"".join(words)}</td>\n'


def _difference(
    images: Mapping[str, Any], folder: pathlib.Path, name: str, i: int
) -> UInt8[np.ndarray, "h w 3"]:
    """Absolute difference to the picture of dense."""
    one, two = (
        files.picture(folder / images["models"][model]["files"][i]).astype(np.int16)
        for model in ("dense", name)
    )
    return np.abs(one - two).astype(np.uint8)


def _scale(
    images: Mapping[str, Any], folder: pathlib.Path, num_images: int, others: list[str]
) -> int:
    """The power of two by which almost all differences can be multiplied and still be shown."""
    counts = np.zeros(256, np.int64)
    for name in others:
        for i in range(num_images):
            counts += np.bincount(_difference(images, folder, name, i).ravel(), minlength=256)
    largest = int(np.searchsorted(np.cumsum(counts), (1 - _CLIPPED) * counts.sum()))
    return 2 ** int(math.log2(255 / max(largest, 4)))


def _share(scores: Mapping[str, Any], key: str) -> str:
    """A share with its 95% interval.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    if key not in scores:
        return ""
    share, num, z = scores[key], scores.get("num", 0), 1.96
    if not num:
        return f"{share:.1%}"
    middle = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + (z / (2 * num)) ** 2)
    low, high = middle - half, middle + half
    return f"{share:.1%} ({low:.0%}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high:.0%})"


def _changes(images: Mapping[str, Any]) -> dict[str, tuple[int, int, float]]:
    """For every other model: pictures lost, pictures gained, and the p of an exact sign test."""
    models, changes = images.get("models", {}), {}
    dense = models["dense"]["found"] if "dense" in models else []
    for name, model in models.items():
        if name == "dense" or not dense or not model["found"]:
            continue
        outcomes = list(zip(dense, model["found"], strict=True))
        lost, gained = outcomes.count((True, False)), outcomes.count((False, True))
        tail = sum(math.comb(lost + gained, i) for i in range(min(lost, gained) + 1))
        p = float(min(Fraction(1), Fraction(2 * tail, 2 ** (lost + gained))))
        changes[name] = (lost, gained, p)
    return changes


def _outcome(change: tuple[int, int, float]) -> str:
    lost, gained, p = change
    significance = "more than chance explains" if p < 0.05 else "which chance alone may explain"
    return f"{lost} lost and {gained} gained, {significance}"
