"""What sections are made of: fields with their legal values, and what several stages share."""

import dataclasses
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def of(default: Any, *legal: Any) -> Any:
    """A field with a default and a closed set of legal values."""
    return dataclasses.field(default=default, metadata={"legal": legal})


def within(default: Any, low: int | float, high: int | float) -> Any:
    """A field with a default and a range, both ends included, for it or for each of a tuple."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


@dataclasses.dataclass
class Mesh:
    """Devices along each axis, and the processes that they belong to."""

    data: int = within(-1, -1, 2**20)  # devices; -1: all that fsdp leaves
    fsdp: int = within(1, 1, 2**20)  # devices
    # Devices to make of a CPU: one a core trains 1.4 times as fast as one of all cores.
    cpu_devices: int = within(1, 1, 1024)
    # Where the processes of a run find each other. Empty: there is one. `auto`: as Cloud TPU,
    # Slurm, Open MPI or Kubernetes says. Else HOST:PORT of the first, with the two fields below.
    coordinator: str = ""
    num_processes: int = within(0, 0, 2**20)  # 0: as the coordinator says
    process_id: int = within(0, 0, 2**20)  # of this process


@dataclasses.dataclass
class Training:
    """One training: AdamW, linear warm-up, cosine decay to zero, once or in equal cycles."""

    num_steps: int = within(1000, 1, 10**9)
    batch_size: int = within(64, 1, 2**20)  # samples over all devices
    learning_rate: float = within(1e-3, 0.0, 1.0)  # at the end of the warm-up
    warmup_steps: int = within(100, 0, 10**9)  # of every cycle
    cycles: int = within(1, 1, 1000)
    weight_decay: float = within(0.01, 0.0, 10.0)
    clip_norm: float = within(1.0, 0.0, 1e6)  # of the global gradient
    ema_decay: float = within(0.999, 0.0, 1.0)
    log_every: int = within(50, 1, 10**9)  # steps
    save_every: int = within(500, 1, 10**9)  # steps
    num_evals: int = within(8, 1, 10**6)  # of the averaged parameters, the last one at the end
