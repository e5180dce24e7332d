"""The part of a report on quality: every figure of every model, with its interval."""

from collections.abc import Mapping
from typing import Any

from sdprune_jax.report import charts
from sdprune_jax.report.charts import text

_LOWER = ("fid", "fd_", "kid", "kd_", "cmmd", "mmd_", "latent_mse", "lpips")  # lower is better


def verdict(evaluation: Mapping[str, Any]) -> list[str]:
    """What was measured, and how, in a sentence of HTML."""
    if not evaluation:
        return []
    protocol = evaluation["protocol"]
    count, whole = protocol["evaluated"], protocol["num_images"]
    share = "" if count == whole else f" of the {whole:,} that it asks for"
    return [
        f"Quality is measured under the protocol <b>{text(protocol['name'])}</b>, on"
        f" {count:,} images{share}."
    ]


def figures(evaluation: Mapping[str, Any]) -> str:
    """One table of figures, and one drawing a figure: the models on one axis."""
    models = {name: model["figures"] for name, model in evaluation["models"].items()}
    names = list(dict.fromkeys(name for of_model in models.values() for name in of_model))
    rows = [
        [_label(name), *(_value(of_model.get(name)) for of_model in models.values())]
        for name in names
    ]
    drawn = []
    for name in names:
        held = {model: of_model[name] for model, of_model in models.items() if name in of_model}
        if len(held) > 1 and all("low" in figure for figure in held.values()):
            drawn.append(
                f"<figure><figcaption>{text(_label(name))}</figcaption>"
                f"{charts.intervals(held, _label(name))}</figure>"
            )
    protocol = evaluation["protocol"]
    remarks = protocol["remarks"]
    notes = [f"{remarks[:1].upper()}{remarks[1:]}." if remarks else ""]
    notes.append(f"Source: {protocol['source']}.")
    if protocol["evaluated"] != protocol["num_images"]:
        notes.append("With another number of images, distances do not compare with published ones.")
    return charts.section(
        "Quality",
        f'<p class="note">{" ".join(text(note) for note in notes if note)} Intervals are'
        " those of 95 % confidence, by bootstrap over images: of the mean over all such images and,"
        " for distances, of what this number of them gives on average.</p>",
        charts.table("Every figure.", ["", *models], rows),
        '<div class="tables">',
        *drawn,
        "</div>",
    )


def _label(name: str) -> str:
    lower = name.startswith(_LOWER)
    return f"{name.replace('_', ' ')} ({'lower' if lower else 'higher'} is better)"


def _value(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    ends = f" [{figure['low']:.4g}, {figure['high']:.4g}]" if "low" in figure else ""
    return f"{figure['value']:.4g}{ends}"
