"""The figures of a training, step by step: on the screen, in a file and for TensorBoard."""

import json
import pathlib
import time

import jax
import tensorboardX
from tqdm import tqdm


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
