"""One table of several evaluated runs, in Markdown: what each costs, and what it draws.

    sdprune compare runs/aptp_study/* [--output FILE] [--repeats 0] [--against NAME]

Of every model of every run: MACs and parameters, of a set of experts the means over its prompts;
milliseconds of a call of the UNet, batch 1, timed in turns here and now, and their share of those
of the dense UNet [of the fastest expert, of the slowest]; and the figures of `evaluate.json`, with
their intervals. Runs of another protocol, dense model or number of images are refused: their
figures do not compare. The dense model is taken from the first run. `--against` adds by how much
every row is above one of them, with the interval of the differences image by image: prompts and
noise are the same, so it is narrower than those of the two.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdprune_jax import UserError
from sdprune_jax.files import json_files, model_directory
from sdprune_jax.metrics import interval
from sdprune_jax.models import unet
from sdprune_jax.sites import macs
from sdprune_jax.stages import evaluate

# Key of a figure, and how the table calls it; those that no run has are left out.
FIGURES = {
    "latent_mse_to_dense": "latent MSE to dense",
    "lpips_to_dense": "LPIPS to dense",
    "ssim_to_dense": "SSIM to dense",
    "cosine_clip_embedded": "CLIP agreement",
    "clip_embedded_r_at_1": "found at 1",
    "fd_clip_embedded": "FD (CLIP)",
    "fid": "FID",
    "clip_score": "CLIP score",
    "cmmd": "CMMD",
}


class Row(NamedTuple):
    """A model of a run.

    Attributes:
        name: what the table calls the run, and the model where that says more.
        directories: one diffusers directory an expert, or the only one.
        shares: share of the prompts that each directory draws; they sum to 1.
        figures: the model's figures in `evaluate.json`.
        values: what each image scores, by figure.
    """

    name: str
    directories: list[pathlib.Path]
    shares: list[float]
    figures: Mapping[str, Mapping[str, Any]]
    values: Mapping[str, np.ndarray]


def main(arguments: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sdprune compare", description=__doc__, formatter_class=raw)
    parser.add_argument("runs", type=pathlib.Path, nargs="+", help="working directories")
    parser.add_argument("--output", type=pathlib.Path, help="a file to write the table to, too")
    parser.add_argument("--repeats", type=int, default=5, help="of the timing; 0 leaves it out")
    parser.add_argument("--against", help="a row, by its name in the table")
    args = parser.parse_args(arguments)
    table_rows = rows(args.runs)
    differences = f"\n\n{against(table_rows, args.against)}" if args.against else ""
    text = table(table_rows, _milliseconds(table_rows, args.repeats) if args.repeats else None)
    text += differences
    print(text)
    if args.output:
        args.output.write_text(f"{text}\n")


def rows(runs: Sequence[pathlib.Path]) -> list[Row]:
    """Every model of every run, the dense one once.

    Raises:
        ValueError: naming the runs that are not evaluated, or by another protocol than the first.
    """
    records, problems = {}, []
    for run in runs:
        if not (run / "evaluate.json").is_file():
            problems.append(f"{run} has no evaluate.json: evaluate it, --config.evaluate=build")
            continue
        records[run] = json_files.read_json(run / "evaluate.json")
        how = [_how(records[path]) for path in (next(iter(records)), run)]
        if how[0] != how[1]:
            problems.append(f"{run} is evaluated as {how[1]}, and the first run as {how[0]}")
    if problems:
        raise UserError("these runs do not compare:\n  " + "\n  ".join(problems))
    table_rows = []
    for run, record in records.items():
        stored = run / "evaluate" / evaluate.VALUES
        values = dict(np.load(stored)) if stored.is_file() else {}
        for name, model in record["models"].items():
            if name == "dense" and table_rows:
                continue
            parts = model.get("experts") or [{"directory": model["directory"], "prompts": 1}]
            parts = [part for part in parts if part["prompts"]]
            total = sum(part["prompts"] for part in parts)
            label = {"dense": "dense", "routed": run.name}.get(name, f"{run.name}, {name}")
            directories = [pathlib.Path(part["directory"]) for part in parts]
            shares = [part["prompts"] / total for part in parts]
            own = {key.split("/")[1]: x for key, x in values.items() if key.startswith(f"{name}/")}
            table_rows.append(Row(label, directories, shares, model["figures"], own))
    return table_rows


def table(table_rows: Sequence[Row], milliseconds: Mapping[pathlib.Path, float] | None) -> str:
    """The rows in Markdown; with times, those of the fastest and the slowest expert in brackets."""
    names = [name for name in FIGURES if any(name in row.figures for row in table_rows)]
    costs = {path: _cost(path) for row in table_rows for path in row.directories}
    whole = costs[table_rows[0].directories[0]]
    heads = ["", "experts", "GMACs", "of dense", "M parameters", "of dense"]
    heads += ["ms a call", "of dense"] if milliseconds else []
    heads += [FIGURES[name] for name in names]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in table_rows:
        pairs = list(zip(row.directories, row.shares, strict=True))
        cells = [row.name, str(len(pairs))]
        for i, unit in ((0, 1e9), (1, 1e6)):
            mean = sum(share * costs[path][i] for path, share in pairs)
            cells += [f"{mean / unit:.4g}", f"{mean / whole[i]:.3f}"]
        if milliseconds:
            times = [milliseconds[path] for path in row.directories]
            mean = sum(share * time for time, share in zip(times, row.shares, strict=True))
            unit = milliseconds[table_rows[0].directories[0]]
            ends = f" [{min(times) / unit:.3f}, {max(times) / unit:.3f}]" if len(pairs) > 1 else ""
            cells += [f"{mean:.2f}", f"{mean / unit:.3f}{ends}"]
        lines.append([*cells, *(_figure(row.figures.get(name)) for name in names)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def against(table_rows: Sequence[Row], name: str) -> str:
    """By how much each row is above the one of that name, in Markdown.

    Raises:
        ValueError: if there is no such row, or no values of each image.
    """
    names = [row.name for row in table_rows]
    if names.count(name) != 1:
        raise UserError(f"--against is {name!r}, expected one of {', '.join(names)}, and no twin")
    lacking = [row.name for row in table_rows if not row.values]
    if lacking:
        raise UserError(
            f"no values of each image of {', '.join(lacking)}: delete evaluate.json and evaluate"
            " again; images and features are kept, so that takes seconds"
        )
    base = table_rows[names.index(name)].values
    keys = [key for key in FIGURES if key in base]
    lines = [[f"less {name}", *(FIGURES[key] for key in keys)], ["---", *["---:"] * len(keys)]]
    for row in table_rows:
        if row.name != name:
            cells = [_difference(row.values.get(key), base[key]) for key in keys]
            lines.append([row.name, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _difference(values: np.ndarray | None, base: np.ndarray) -> str:
    if values is None:  # the dense model has no distance to itself
        return ""
    each = values.astype(np.float64) - base
    ends = interval.of_mean(each)
    return f"{each.mean():+.4g} [{ends.low:+.4g}, {ends.high:+.4g}]"


def _how(record: Mapping[str, Any]) -> str:
    """What figures depend on, but for the model; a file by the start of its hash."""
    keys = ("name", "evaluated", "num_steps", "guidance_scale", "seed", "dtype", "height", "width")
    told = [f"{key} {record['protocol'][key]}" for key in (*keys, "references")]
    files = {"dense model": record.get("dense", "unknown")} | record["weights"]
    return ", ".join((*told, *(f"{name} {state[:8]}" for name, state in sorted(files.items()))))


def _figure(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    ends = f" [{figure['low']:.4g}, {figure['high']:.4g}]" if "low" in figure else ""
    return f"{figure['value']:.4g}{ends}"


@functools.cache
def _cost(directory: pathlib.Path) -> tuple[int, int]:
    """MACs of a call of the UNet, and its parameters."""
    model = model_directory.open_model(directory)
    tokens = model.text_encoder.max_position_embeddings
    size = (model.unet.sample_size,) * 2
    sizes = jax.tree.map(lambda x: x.size, model_directory.param_shapes(model, "unet"))
    return sum(macs.of_unet(model.unet, size, tokens)), sum(jax.tree.leaves(sizes))


def _milliseconds(table_rows: Sequence[Row], repeats: int) -> dict[pathlib.Path, float]:
    """The fastest call of every UNet; they take turns, so other jobs slow all alike."""
    calls = {path: _call(path) for row in table_rows for path in row.directories}
    fastest = dict.fromkeys(calls, float("inf"))
    for turn in range(1 + repeats):
        for path, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:  # the first one compiles
                fastest[path] = min(fastest[path], 1000 * (time.perf_counter() - start))
    return fastest


def _call(directory: pathlib.Path) -> Callable[[], Any]:
    model = model_directory.open_model(directory)
    params = jax.tree.map(jnp.asarray, model_directory.load(model, "unet", dtype=np.float32))
    size, tokens = model.unet.sample_size, model.text_encoder.max_position_embeddings
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    inputs = (
        draw(1, size, size, 4),
        jnp.full(1, 500),
        draw(1, tokens, model.unet.cross_attention_dim),
    )
    apply = jax.jit(unet.UNet(model.unet).apply)
    return lambda: apply({"params": params}, *inputs)
