"""Times features against torch, and measures the memory that a stream of them takes.

    python tools/bench/evaluation.py [--quick]

The embedded CLIP's vision tower on random bytes: our stream, which loads, scales, computes and
checks, against the forward pass alone of the same weights in torch, at the best of its batch sizes
and threads. Rounds alternate; other jobs slow both sides, so quote the ratio. The memory is the
peak of a process that streams moments, for two numbers of images. `--quick` takes an eighth of the
images.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from sdprune_jax import sharding
from sdprune_jax.evaluate import networks
from sdprune_jax.files import model_directory
from sdprune_jax.metrics import features, frechet

ROUNDS = 4
BATCHES = (32, 128)


class Case(NamedTuple):
    """A network on both sides."""

    network: networks.Network
    torch_features: Callable[[Any], Any]  # takes scaled images [b, 3, h, w]
    size: int  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="an eighth of the images")
    parser.add_argument("--stream", type=int, help="only stream the moments of this many images")
    arguments = parser.parse_args()
    if arguments.stream:
        print(_peak_bytes(arguments.stream))
        return
    share = 8 if arguments.quick else 1
    for name, case in {"embedded CLIP": _embedded()}.items():
        _race(name, case, 2048 // share)
    peaks = {}
    for num in (2048 // share, 16384 // share):
        command = [sys.executable, __file__, "--stream", str(num)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[num] = json.loads(done.stdout.splitlines()[-1])
        print(f"peak of a process that streams {num:6,} images: {peaks[num] / 2**20:.0f} MiB")
    low, high = peaks.values()
    print(f"memory grew by {(high - low) / 2**20:.1f} MiB, a factor of {high / low:.3f}")


def _race(name: str, case: Case, num: int) -> None:
    import torch

    images = np.random.default_rng(0).integers(
        0, 256, size=(num, case.size, case.size, 3), dtype=np.uint8
    )
    mesh, extracted = sharding.make_mesh(), {}
    scaled = torch.from_numpy(images.astype(np.float32) / 127.5 - 1)
    scaled = scaled.permute(0, 3, 1, 2).contiguous()

    def ours() -> None:
        extracted["jax"] = features.extract(
            case.network.embed, case.network.params, lambda rows: images[rows], num, mesh
        )

    def theirs(batch: int, threads: int) -> None:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            parts = [case.torch_features(scaled[i : i + batch]) for i in range(0, num, batch)]
        extracted["torch"] = torch.cat(parts).numpy()

    works: dict[Any, Callable[[], None]] = {"jax": ours}
    threads = sorted({1, os.cpu_count() or 1})  # on a busy machine its threads wait for each other
    works |= {way: lambda way=way: theirs(*way) for way in itertools.product(BATCHES, threads)}
    seconds: dict[Any, list[float]] = {key: [] for key in works}
    for _ in range(ROUNDS + 1):
        for key, work in works.items():
            start = time.perf_counter()
            work()
            seconds[key].append(time.perf_counter() - start)
    best = {key: min(taken[1:]) for key, taken in seconds.items()}  # the first one compiles
    ours_best = best.pop("jax")
    way = min(best, key=lambda key: best[key])
    error = np.abs(extracted["jax"] - extracted["torch"]).max()
    print(f"{name}: features differ from torch's by {error:.1e}")
    print(f"{name}: sdprune_jax {num / ours_best:.0f} images/s, in chunks of {features.CHUNK}")
    print(f"{name}: torch {num / best[way]:.0f} images/s, at batch {way[0]} on {way[1]} threads")
    print(f"{name}: {best[way] / ours_best:.2f} times torch")


def _embedded() -> Case:
    import torch
    import transformers

    directory = model_directory.directory_of("embedded")
    network = networks.load("embedded", "", model_directory.open_model(directory))
    reference = transformers.CLIPModel.from_pretrained(directory / "clip", dtype=torch.float32)

    def torch_features(images: torch.Tensor) -> torch.Tensor:
        pooled = reference.vision_model(pixel_values=images).pooler_output
        return torch.nn.functional.normalize(reference.visual_projection(pooled), dim=-1)

    return Case(network, torch_features, reference.config.vision_config.image_size)


def _peak_bytes(num: int) -> int:
    """The most memory that this process ever took, after streaming `num` images."""
    model = model_directory.open_model(model_directory.directory_of("embedded"))
    network = networks.load("embedded", "", model)

    def load(rows: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(int(rows[0]))
        return rng.integers(0, 256, size=(len(rows), 64, 64, 3), dtype=np.uint8)

    mesh = sharding.make_mesh()
    parts = features.stream(network.embed, network.params, load, num, mesh)
    assert frechet.moments(parts).num == num
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
