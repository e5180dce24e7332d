"""The part of a report on pruning: what was asked, where the zeros are, which weights are gone."""

from collections.abc import Mapping
from typing import Any

from sdprune_jax.report import charts
from sdprune_jax.report.charts import text

_WORDS = {
    "text_encoder": "text encoder",
    "unet": "UNet",
    "vae": "VAE",
    "linear+conv": "linear and convolution",
}


def verdict(prune: Mapping[str, Any]) -> list[str]:
    """What was pruned and what that saves, in two sentences of HTML."""
    parts = []
    for name, part in prune["components"].items():
        removed, requested = f"{part['of_prunable']:.1%}", f"{part['requested']:.1%}"
        note = "as requested" if removed == requested else f"{requested} requested"
        if before := part.get("zeros_before"):
            note += f"; {before / part['prunable']:.1%} were zero before"
        weights = text(f"{_word(part['scope'])} weights of the {_word(name)}")
        parts.append(f"<b>{removed}</b> of the {weights} ({note})")
    size = {name: charts.in_bytes(num) for name, num in prune["bytes"].items()}
    stored = f"keep their {size['pruned']}"
    if prune["bytes"]["dense"] != prune["bytes"]["pruned"]:
        stored = f"go from {size['dense']} to {size['pruned']}"
    return [
        f"Pruning set {' and '.join(parts) or 'nothing'} to zero; of all"
        f" {_count(prune['pipeline_parameters'])} parameters of the pipeline, that is"
        f" <b>{prune['of_pipeline']:.1%}</b>.",
        f"Stored as {text(prune['save_dtype'])} these components {stored}; gzip brings them to"
        f" about <b>{size['pruned_gzip']}</b>, the dense ones to {size['dense_gzip']}. Dense TPU"
        " and GPU kernels do not skip scattered zeros: this saves compressed size, not time.",
    ]


def sparsity(prune: Mapping[str, Any]) -> str:
    """The same zeros against the weights in scope, the component and the pipeline."""
    parts = prune["components"]
    total = {
        key: sum(part[key] for part in parts.values())
        for key in ("prunable", "parameters", "zeros", "underflow_zeros")
    }
    shares = lambda key, whole: [*(f"{part[key]:.2%}" for part in parts.values()), whole]
    counts = lambda key: [*(f"{part[key]:,}" for part in parts.values()), f"{total[key]:,}"]
    over = lambda key: f"{total['zeros'] / total[key]:.2%}" if total[key] else ""
    words = lambda key: [*(_word(part[key]) for part in parts.values()), ""]
    rows = [
        ["Requested, of the weights in scope", *shares("requested", "")],
        ["Zero, of the weights in scope", *shares("of_prunable", over("prunable"))],
        ["Zero, of the whole component", *shares("of_component", over("parameters"))],
        ["Zero, of the whole pipeline", *shares("of_pipeline", f"{prune['of_pipeline']:.2%}")],
        ["Zeros", *counts("zeros")],
        ["Weights in scope", *counts("prunable")],
        ["Parameters", *counts("parameters")],
        ["Scope: layers that may lose weights", *words("scope")],
        ["Threshold rule", *words("threshold")],
        *(
            [["Method", *words("method")]]
            if all("method" in part for part in parts.values())
            else []
        ),
    ]
    note = f"Rounding to {prune['save_dtype']} made {total['underflow_zeros']:,} zeros more."
    return charts.section(
        "How sparse it is",
        charts.table(
            "What was requested, and the same zeros counted against three different wholes.",
            ["", *map(_word, parts), "together"],
            rows,
        ),
        f'<p class="note">{text(note)}</p>',
    )


def layers(prune: Mapping[str, Any]) -> str:
    """Sparsity and threshold of every layer, drawn and in numbers."""
    figures = []
    for name, part in prune["components"].items():
        layers = charts.in_depth_order(part["layers"])
        if not layers:
            continue
        shares = [layer["zeros"] / layer["weights"] for layer in layers]
        thresholds = [layer["threshold"] for layer in layers]
        sparsities = _range(f"{min(shares):.1%}", f"{max(shares):.1%}")
        caption = (
            f"{len(layers)} layers, by block from input to output. Above: sparsity, {sparsities}."
            " Below: the magnitude up to which weights were removed,"
            f" {_range(f'{min(thresholds):.2g}', f'{max(thresholds):.2g}')}."
        )
        rows = [
            [
                layer["name"],
                " \N{MULTIPLICATION SIGN} ".join(map(str, layer["shape"])),
                f"{layer['zeros']:,}",
                f"{share:.2%}",
                f"{layer['threshold']:.3g}",
            ]
            for layer, share in zip(layers, shares, strict=True)
        ]
        figures.append(
            f"<h3>{text(_word(name))}</h3>\n<figure><figcaption>{text(caption)}</figcaption>\n"
            f"{charts.layer_bars(layers, _word(name))}</figure>\n"
            f"<details><summary>All {len(layers)} layers in numbers</summary>\n"
            + charts.table(
                f"Layers of the {_word(name)}",
                ["layer", "shape", "zeros", "sparsity", "threshold"],
                rows,
                "layers",
            )
            + "</details>"
        )
    return charts.section("Layer by layer", *figures) if figures else ""


def weights(prune: Mapping[str, Any]) -> str:
    """The weights that stay, drawn over all that were: what shows is what was removed."""
    figures = []
    for name, part in prune["components"].items():
        bins = part["histogram"]
        label = f"{_word(name)}: number of weights by value, before and after"
        drawn = f"{sum(bins['dense']):,} of the {part['prunable']:,} weights in scope are drawn."
        figures.append(
            f"<h3>{text(_word(name))}</h3>\n<figure>"
            + charts.histogram(bins["edges"], bins["dense"], bins["pruned"], label)
            + f"<figcaption>{drawn}</figcaption></figure>"
        )
    key = " ".join(
        f'<span class="legend"><span class="key {css}"></span>{word}</span>'
        for css, word in (("", "kept"), ("gone", "removed"))
    )
    return charts.section(
        "The weights before and after",
        '<p class="note">How many weights have which value, on a log axis. The zeros that took the'
        f" place of those removed are not drawn. {key}</p>",
        *figures,
    )


def _word(name: str) -> str:
    return _WORDS.get(name, name)


def _range(low: str, high: str) -> str:
    return f"{low} in each" if low == high else f"{low} to {high}"


def _count(num: int) -> str:
    return f"{num / 1e9:.2f} billion" if num >= 1e9 else f"{num / 1e6:.2f} million"
