"""Stage `report`: what was pruned, what it saves, what it does to the pictures; one HTML file.

All is said from the numbers that earlier stages left in the run's directory. The page loads nothing
and runs nothing.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import string
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from sdprune_jax import config, report
from sdprune_jax.report import charts, evaluation, experts, pictures, pruning, sweep
from sdprune_jax.report import files as inputs
from sdprune_jax.report.charts import text
from sdprune_jax.stages import cost_card

_TEMPLATE = pathlib.Path(report.__file__).with_name("page.html")
_LABELS = {"routed": "Experts, routed"}


def run(run: config.Run, mesh: Mesh | None = None) -> pathlib.Path:  # noqa: ARG001
    """Writes `report.html` into the run's directory, by the first process only, and returns it.

    Reads `prune.json`, `images/generate.json` and `sweep.json` with their pictures,
    `evaluate.json`, the records of experts and their prompts, and `config.json`; what is not there
    is left out.

    Raises:
        ValueError: naming all that is not as the stages before write it.
    """
    assert run.report is not None, "a stage without its section"
    path = pathlib.Path(run.workdir) / "report.html"
    if jax.process_index() > 0:
        return path
    files = inputs.read(path.parent, run.report.num_images)
    prune, images = files.prune, files.images
    sentences = pruning.verdict(prune) if prune else []
    sentences += sweep.verdict(files.sweep)
    sentences += experts.verdict(files)
    sentences = sentences or ["Nothing was pruned in this run."]
    sentences += pictures.verdict(images)
    sentences += evaluation.verdict(files.evaluation)
    parts = [f'<p class="verdict">{sentence}</p>' for sentence in sentences]
    images = _labelled(images)
    if images:
        parts.append(pictures.grid(images, files.folder, run.report.num_images))
        parts.append(pictures.retrieval(images))
    if files.evaluation:
        parts.append(evaluation.figures(_labelled(files.evaluation)))
    parts.append(experts.overview(files))
    if files.sweep:
        parts.append(sweep.curves(files.sweep))
        parts.append(sweep.strips(files.sweep, path.parent, run.report.num_images))
        parts.append(sweep.points(files.sweep))
    if prune:
        parts.append(pruning.sparsity(prune))
        parts.append(pruning.layers(prune))
        parts.append(pruning.weights(prune))
    parts.append(_costs(prune, images))
    if prune:
        parts.append(_use(prune, images))
    parts.append(_protocol(images, files.settings))
    page = string.Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=text(run.report.title), body="\n".join(parts), versions=text(_versions())
    )
    new = path.with_name("report.html.tmp")
    new.write_text(page, encoding="utf-8", errors="surrogateescape")  # names in an ASCII locale
    os.replace(new, path)
    return path


def _labelled(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the models under the names that tables and pictures show."""
    if not record:
        return record
    models = {_LABELS.get(name, name): model for name, model in record["models"].items()}
    return {**record, "models": models}


def _costs(prune: Mapping[str, Any], images: Mapping[str, Any]) -> str:
    tables = []
    if prune:
        rows = []
        for label, end in (("As stored", ""), ("After gzip, about", "_gzip")):
            dense, pruned = prune["bytes"][f"dense{end}"], prune["bytes"][f"pruned{end}"]
            change = "none" if dense == pruned else f"{pruned / dense - 1:+.1%}"
            rows.append([label, charts.in_bytes(dense), charts.in_bytes(pruned), change])
        caption = f"Size of the pruned components, as {prune['save_dtype']}."
        tables.append(charts.table(caption, ["", "dense", "pruned", "change"], rows))
        rows = [[key.replace("_", " "), _seconds(s)] for key, s in prune["seconds"].items()]
        tables.append(charts.table("Time to prune.", ["step", "time"], rows))
    if images:
        times = {
            "first_batch_seconds": "first batch, compiling included",
            "seconds_per_image": "each picture after that",
            "seconds": "all",
        }
        rows = [
            [name, *(_seconds(model[key]) if key in model else "" for key in times)]
            for name, model in images["models"].items()
        ]
        caption = "Time to make the pictures, measured once: no benchmark."
        tables.append(charts.table(caption, ["model", *times.values()], rows))
    if not tables:
        return ""
    return charts.section("Sizes and times", '<div class="tables">', *tables, "</div>")


def _use(prune: Mapping[str, Any], images: Mapping[str, Any]) -> str:
    prompt = next(iter(images.get("prompts", [])), "a red apple")
    code = (
        "from diffusers import StableDiffusionPipeline\n"
        f"pipeline = StableDiffusionPipeline.from_pretrained({prune['directory']!r})\n"
        f"pipeline({prompt!r}).images[0].save('picture.png')"
    )
    return charts.section(
        "How to use it",
        "<p>In the directory of this report. The zeros are ordinary values: any loader reads"
        " them.</p>",
        f'<pre tabindex="0"><code>{text(code)}</code></pre>',
    )


def _protocol(images: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    parts = []
    if images:
        rows = [
            [key.replace("_", " "), "(empty)" if value == "" else value]
            for key, value in images["protocol"].items()
        ]
        parts.append(charts.table("How the pictures were made.", ["setting", "value"], rows))
    if settings:
        shown = text(json.dumps(settings, indent=2, ensure_ascii=False))
        parts.append(
            "<details><summary>The whole config of the run</summary>\n"
            f'<pre tabindex="0"><code>{shown}</code></pre></details>'
        )
    return charts.section("Protocol", *parts) if parts else ""


def _versions() -> str:
    """The machine and the libraries that wrote the report."""
    names = []
    for name in ("sdprune_jax", "jax", "flax", "numpy"):
        try:
            names.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            names.append(f"{name} (not installed)")
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return " · ".join(
        ["Written by", *names, f"Python {platform.python_version()}", f"on {devices}"]
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.{2 if seconds >= 1 else 3}f}\N{NO-BREAK SPACE}s"


def check(run: config.Run, num_devices: int) -> None:
    """Checks nothing: what stages left is looked at when they are done."""


def plan(run: config.Run, planned: cost_card.Planned) -> str:  # noqa: ARG001
    """Returns nothing: it costs little beside the other stages."""
    return ""
