"""The figures of a training, step by step: on the screen, in a file and for TensorBoard."""

import json
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX
from absl import logging
from tqdm import tqdm

SKIPPED = "skipped"  # metric: whether a step was skipped; figure of the log: how many were


class Log:
    """Appends figures to `metrics.jsonl` and to TensorBoard; drops what a resumed run repeats."""

    def __init__(self, directory: pathlib.Path, start: int):
        self._name, self._start, self._since = directory.name, start, time.monotonic()
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._events = tensorboardX.SummaryWriter(str(directory), purge_step=start + 1)

    def write(self, step: int, num_steps: int, figures: dict[str, float]) -> None:
        if not self._writes:
            return
        seconds = time.monotonic() - self._since
        left = seconds / max(step - self._start, 1) * (num_steps - step)
        self._file.write(json.dumps({"step": step, "seconds": round(seconds, 1)} | figures) + "\n")
        self._file.flush()
        for key, value in figures.items():
            self._events.add_scalar(key, value, step)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
        tqdm.write(f"{self._name} {step}/{num_steps}  {shown}  {left / 60:.1f} min left")

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._events.close()


class Recent:
    """Metrics of the steps since the last line of the log, on the device until fetched."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, Mapping[str, Any]]] = []
        self._fetched: list[Mapping[str, Any]] = []
        self._in_a_row = 0

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._pending.append((step, metrics))

    def fetch(self) -> tuple[int, list[str]]:
        """Waits for the steps.

        Returns:
            The largest number of steps in a row that were skipped, and the names of the metrics
            that were not finite in the last of them.
        """
        most, bad = 0, []
        for step, metrics in jax.device_get(self._pending):
            self._fetched.append(metrics)
            if not metrics[SKIPPED]:
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            bad = [key for key, value in metrics.items() if not math.isfinite(value)]
            most = max(most, self._in_a_row)
            logging.warning("step %d is skipped: %s not finite", step, ", ".join(bad))
        self._pending = []
        return most, bad

    def means(self) -> dict[str, float]:
        """Averages the steps that were not skipped; `skipped` says how many were, if any."""
        kept = [metrics for metrics in self._fetched if not metrics[SKIPPED]]
        skipped = len(self._fetched) - len(kept)
        self._fetched = []
        names = [key for key in kept[0] if key != SKIPPED] if kept else []
        figures = {key: float(np.mean([metrics[key] for metrics in kept])) for key in names}
        return figures | ({SKIPPED: float(skipped)} if skipped else {})
