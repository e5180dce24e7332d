"""Times a call of SD2.1's UNet against smaller ones: what of the MACs saved is time saved?

    python tools/bench/latency.py [--run RUN] [--macs_budget 0.65] [--size 32] [--repeats 5]

The smaller ones are cut at one budget: the same share of every site (uniform), units at random, and
BK-SDM's base student. The first expert of a run on any model of the same blocks, the embedded one,
say, lends the share of units that it keeps of every site. Weights are random, float32, batch 1. All
take turns, so other jobs slow all alike: quote the shares.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from sdprune_jax import sites
from sdprune_jax.files import json_files, model_directory
from sdprune_jax.models import clip, noise_schedule, unet, vae
from sdprune_jax.sites import macs
from sdprune_jax.slicing import bksdm, structured

_TOKENS = 77


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=pathlib.Path, help="working directory that has experts")
    parser.add_argument("--macs_budget", type=float, default=0.65, help="share of all MACs")
    parser.add_argument("--size", type=int, default=32, help="of the latents: an eighth of pixels")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    size, config = (args.size,) * 2, unet.UNetConfig()
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), _shapes(config))
    costs = macs.by_site(config, size, _TOKENS)
    cut = lambda keep: sites.slice_params(zeros, config, keep)[1]
    within = lambda scores: cut(structured.within_budget(scores, costs, args.macs_budget))
    smaller = {
        "uniform": within(structured.uniform(config, 0)),
        "random": within(structured.random(config, 0)),
        "bksdm-base": bksdm.cut(zeros, config, "base")[1],
    }
    if args.run:
        smaller[f"as expert 0 of {args.run}"] = cut(_as_first_expert(args.run, config))

    whole, dense = sum(macs.of_unet(config, size, _TOKENS)), _call(config, args.size)
    print(f"SD2.1's UNet, latents of {args.size}, on {jax.devices()[0].device_kind}", flush=True)
    for name, few in smaller.items():
        share = sum(macs.of_unet(few, size, _TOKENS)) / whole
        times = _fastest([dense, _call(few, args.size)], args.repeats)
        said = f"{1000 * times[1]:.0f} of {1000 * times[0]:.0f} ms, {times[1] / times[0]:.3f}"
        print(f"{name}: {share:.3f} of the MACs, {said}", flush=True)


def _as_first_expert(run: pathlib.Path, config: unet.UNetConfig) -> sites.Architecture:
    """As many units of every site, in proportion, as the expert keeps; at least one."""
    record = json_files.read_json(run / "experts" / "experts.json")
    kept = record["experts"][0]["kept"]
    lender = model_directory.open_model(model_directory.directory_of(record["model"])).unet
    shares = {site.name: kept[site.name] / site.units for site in sites.table(lender)}
    return {
        site.name: np.arange(site.units) < _units(shares[site.name] * site.units, site.kind)
        for site in sites.table(config)
    }


def _units(num: float, kind: str) -> int:
    return max(round(num), int(kind != "depth"))


def _shapes(config: unet.UNetConfig) -> Any:
    parts = (clip.TextConfig(), config, vae.VAEConfig(), noise_schedule.Schedule())
    return model_directory.param_shapes(model_directory.ModelConfig(*parts, pathlib.Path()), "unet")


def _call(config: unet.UNetConfig, size: int) -> Callable[[], Any]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.random(shape, np.float32) - 0.5)
    inputs = (
        draw(1, size, size, config.in_channels),
        jnp.full(1, 500),
        draw(1, _TOKENS, config.cross_attention_dim),
    )
    params = jax.tree.map(lambda x: draw(*x.shape) / x.shape[0], _shapes(config))
    apply = jax.jit(unet.UNet(config).apply)
    return lambda: apply({"params": params}, *inputs)


def _fastest(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    fastest = [float("inf")] * len(calls)
    for turn in range(1 + repeats):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:  # the first one compiles
                fastest[i] = min(fastest[i], time.perf_counter() - start)
    return fastest


if __name__ == "__main__":
    main()
