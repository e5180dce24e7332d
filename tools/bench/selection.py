"""Times layer-wise magnitude pruning of SD2.1's 354 linear layers against torch.sort.

    python tools/bench/selection.py [--quick]

Weights are random. Both sides choose and zero the same fraction of every layer in its own memory.
Other jobs slow both sides, so quote the ratio. `--quick` takes an eighth of the layers.
"""

import argparse
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

from sdprune_jax.pruning import allocate
from sdprune_jax.scoring import masks

TORCH_SECONDS = 180  # at most; what is left is scaled by its number of weights
SPARSITY = {"unet": 0.35, "text_encoder": 0.475}  # Ramesh and Zhao 2024
LAYERS = {  # shape: how many
    "unet": {
        (320, 320): 40,
        (320, 1024): 10,
        (320, 1280): 10,
        (640, 640): 40,
        (640, 1024): 10,
        (640, 1280): 5,
        (640, 2560): 5,
        (1280, 320): 1,
        (1280, 1024): 12,
        (1280, 1280): 61,
        (1280, 5120): 6,
        (2560, 320): 5,
        (5120, 640): 5,
        (10240, 1280): 6,
    },
    "text_encoder": {(1024, 1024): 92, (4096, 1024): 23, (1024, 4096): 23},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="an eighth of the layers")
    quick = parser.parse_args().quick
    jax.config.update("jax_enable_compilation_cache", False)  # cold means cold
    before = _resident_bytes()
    weights, num_removed = _layers(8 if quick else 1)
    num_bytes = sum(w.nbytes for w in weights.values())
    num_weights = num_bytes // 4
    print(f"{len(weights)} layers, {num_weights:,} float32 weights, {num_bytes / 1e9:.2f} GB")

    floor = min(_seconds(lambda: _read_twice_write_mask(weights)) for _ in range(3))
    print(f"read twice, write a mask (numpy, 2 threads): {floor:.2f} s")

    with _Peak() as peak:
        cold = _seconds(lambda: _prune(weights, num_removed))
        zeros = _zeros(weights)
        warm = []
        for _ in range(5):
            _draw(weights)
            warm.append(_seconds(lambda: _prune(weights, num_removed)))
    typical = statistics.median(warm)  # torch is timed once, so the best of ours would flatter
    print(f"select and zero: first use {cold:.2f} s, then {typical:.2f} s (all: {_join(warm)})")
    print(f"{typical / floor:.1f} times the floor")
    for component, count in zeros.items():
        expected = sum(n for name, n in num_removed.items() if name.startswith(component))
        print(f"zeros {component}: {count:,}, expected {expected:,}")
        assert count == expected
    print(
        f"peak memory {peak.num_bytes / 1e9:.2f} GB, less {before / 1e9:.2f} GB of the process "
        f"before: {(peak.num_bytes - before) / num_bytes:.2f} times the weights"
    )

    _draw(weights)
    spent, done = _torch_seconds(weights, num_removed)
    whole = spent * num_weights / done
    how = "measured" if done == num_weights else f"scaled from {done / num_weights:.0%} of weights"
    print(f"torch.sort: {whole:.1f} s ({how}); ratio {whole / typical:.1f}")


def _layers(stride: int) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    shapes = {
        f"{component}.{shape}.{i}": shape
        for component, layers in LAYERS.items()
        for shape, count in layers.items()
        for i in range(count)
    }
    weights = {name: np.empty(shapes[name], np.float32) for name in list(shapes)[::stride]}
    _draw(weights)
    num_removed = {}
    for component, sparsity in SPARSITY.items():
        sizes = {name: w.size for name, w in weights.items() if name.startswith(component)}
        num_removed |= allocate.uniform(sizes, sparsity)
    return weights, num_removed


def _prune(weights: dict[str, np.ndarray], num_removed: dict[str, int]) -> None:
    """What the stage does to every layer; it also looks up each threshold."""
    for name, k in num_removed.items():
        keep = masks.lowest_of_rows(weights[name].reshape(1, -1), k)
        masks.zero(weights[name], keep.reshape(weights[name].shape))


def _draw(weights: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    for w in weights.values():
        rng.standard_normal(out=w, dtype=np.float32)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _read_twice_write_mask(weights: dict[str, np.ndarray]) -> None:
    keep = np.ones(max(w.size for w in weights.values()), bool)

    def one(w: np.ndarray) -> None:
        w.max()
        w.max()
        keep[: w.size] = True

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, weights.values()))


def _zeros(weights: dict[str, np.ndarray]) -> dict[str, int]:
    zeros = dict.fromkeys(SPARSITY, 0)
    for name, w in weights.items():
        zeros[name.split(".")[0]] += w.size - int(np.count_nonzero(w))
    return zeros


def _torch_seconds(
    weights: dict[str, np.ndarray], num_removed: dict[str, int]
) -> tuple[float, int]:
    """Seconds spent and weights done; layers in random order until the time is up."""
    import torch  # after ours, whose memory is measured

    names = list(weights)
    random.Random(0).shuffle(names)
    spent, done = 0.0, 0
    for name in names:
        w = torch.from_numpy(weights[name])

        def prune(w: torch.Tensor = w, k: int = num_removed[name]) -> None:
            magnitude = w.abs()
            threshold = torch.sort(magnitude.flatten()).values[k - 1]
            w.masked_fill_(magnitude <= threshold, 0)

        spent += _seconds(prune)
        done += w.numel()
        if spent > TORCH_SECONDS:
            break
    return spent, done


class _Peak:
    """Largest resident memory while entered, sampled every 5 ms."""

    def __enter__(self) -> "_Peak":
        self.num_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.num_bytes = max(self.num_bytes, _resident_bytes())


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _join(seconds: list[float]) -> str:
    return ", ".join(f"{s:.2f}" for s in seconds)


if __name__ == "__main__":
    main()
