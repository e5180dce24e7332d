"""How far the outputs of every layer move: SparseGPT against Wanda against magnitude.

    python tools/bench/output_error.py [--component=text_encoder] [--model=DIRECTORY]

Prints, of a component (the UNet of the embedded model, unless told) pruned to one sparsity, the
squared error of what every layer puts out, as a share of the output itself, by one Gram matrix for
all three methods; and on how many layers SparseGPT <= Wanda <= magnitude, which should be nine in
ten. All layers read the dense model.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import numpy as np

from sdprune_jax import sharding, sites
from sdprune_jax.data import captions
from sdprune_jax.files import convert, model_directory
from sdprune_jax.pruning import selection
from sdprune_jax.pruning.methods import Magnitude, Method
from sdprune_jax.scoring import obs
from sdprune_jax.scoring.calibration import Calibration
from sdprune_jax.scoring.recorder import LayerStats
from sdprune_jax.scoring.settings import CalibrationSettings

METHODS = ("sparsegpt", "wanda", "magnitude")  # in the order expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="diffusers directory")
    parser.add_argument("--component", default="unet", choices=("unet", "text_encoder"))
    parser.add_argument("--scope", default="linear+conv", choices=sites.SCOPES)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=25, help="of the sampler")
    parser.add_argument("--batch", type=int, default=20, help="prompts at once")
    arguments = parser.parse_args()
    method = Magnitude(arguments.sparsity, scope=arguments.scope)
    settings = CalibrationSettings(num_steps=arguments.steps, batch_size=arguments.batch)
    prompts = captions.prompts("embedded", "train", arguments.prompts, 0)
    found = dict(errors(arguments.model, arguments.component, method, settings, prompts))
    for name, row in found.items():
        print(f"{_cells(row)}  {name}{'' if row == sorted(row) else '  <- not in order'}")
    table = np.array(list(found.values()))
    print("".join(f"{name:>12}" for name in METHODS))
    for word, of in (("mean", np.mean), ("median", np.median), ("worst", np.max)):
        print(f"{_cells(of(table, axis=0))}  {word}")
    pairs = np.diff(table) >= 0
    both = pairs.all(axis=1)
    print(
        f"SparseGPT <= Wanda on {pairs[:, 0].sum()}, Wanda <= magnitude on {pairs[:, 1].sum()},"
        f" both on {both.sum()} of {len(table)} layers, {both.mean():.1%}"
    )


def errors(
    name: str,
    component: str,
    method: Method,
    settings: CalibrationSettings,
    prompts: Sequence[str],
) -> Iterator[tuple[str, list[float]]]:
    """Yields each layer's name and its relative errors, in the order of `METHODS`.

    Args:
        name: directory of the model, or "embedded".
        component: "unet" or "text_encoder".
        method: sparsity and scope; each of `METHODS` takes its place.
        settings: steps of the sampler, and prompts at once.
        prompts: texts to calibrate on.
    """
    model, mesh = (
        model_directory.open_model(model_directory.directory_of(name)),
        sharding.make_mesh(),
    )
    loaded = convert.flatten(model_directory.load(model, component, dtype=np.float32))
    flat = {path: np.asarray(x) for path, x in loaded.items()}
    layers = sites.prunable(model_directory.param_shapes(model, component), component, method.scope)
    sizes = {path: flat[path].size for path in layers}
    calibration = Calibration(settings, model, component, mesh, prompts)
    for paths, stats in calibration.parts(flat, layers, "gram"):
        kernels = {path: flat[path] for path in paths}
        found: dict[str, list[float]] = {path: [] for path in paths}
        for rule in METHODS:
            one = dataclasses.replace(method, method=rule)
            removed = selection.removed_of_each(kernels, one, stats, sizes)
            for path, pruned in selection.prune(kernels, one, removed, stats, jax.random.key(0)):
                kernel = kernels[path] if pruned.kernel is None else pruned.kernel
                read = stats[path]
                assert isinstance(read, LayerStats)
                error = obs.relative_error(kernels[path], kernel * pruned.keep, read)
                found[path].append(float(error))
        for path in paths:
            yield convert.torch_key(path).removesuffix(".weight"), found[path]


def _cells(row: list[float] | np.ndarray) -> str:
    return "".join(f"{error:12.3e}" for error in row)


if __name__ == "__main__":
    main()
