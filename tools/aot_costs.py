"""What one call of a compiled program costs a chip, and many calls in hours of chips."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

_NUM_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"

_Result = tuple[str, tuple[int, ...]]  # dtype, shape


class Chip(NamedTuple):
    """What one chip can do.

    Source: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and
        https://www.nvidia.com/en-us/data-center/a100/, but for the memory.
    """

    memory: float  # GiB that the compiler leaves to programs
    flops: float  # bfloat16 operations a second
    bandwidth: float  # bytes a second to and from the memory
    network: float  # bytes a second to other chips of a slice


CHIPS = {
    "v4": Chip(30.75, 275e12, 1.23e12, 0.300e12),
    "v5e": Chip(15.75, 197e12, 0.82e12, 0.200e12),
    "v5p": Chip(95.74, 459e12, 2.77e12, 0.600e12),
    "v6e": Chip(31.25, 918e12, 1.64e12, 0.448e12),
}
_A100, _NUM_A100 = Chip(80, 312e12, 2.04e12, 0.300e12), 16


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Counts the collectives of a compiled program by kind, and the bytes of their results."""
    counts: dict[str, tuple[int, int]] = {}
    for kind, results in each_collective(text):
        count, total = counts.get(kind, (0, 0))
        counts[kind] = (count + 1, total + sum(map(_num_bytes, results)))
    return counts


def each_collective(text: str) -> Iterator[tuple[str, list[_Result]]]:
    """Yields the kind of each collective of a program, and dtypes and shapes of its results."""
    for line in text.splitlines():
        # `-start` begins one that `-done` only waits for.
        if match := re.search(rf"= (.*?) ({_KINDS})(-start)?\(", line):
            results = [
                (kind, tuple(int(n) for n in shape.split(",") if n))
                for kind, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", match[1])
            ]
            # What begins has its operands beside its results.
            yield match[2], [max(results, key=_num_bytes)] if match[3] else results


def _num_bytes(result: _Result) -> int:
    return _NUM_BYTES.get(result[0], 0) * math.prod(result[1])


class Work(NamedTuple):
    """What one chip does in one call, by the compiler's count, which takes loops once."""

    flops: float  # operations
    moved: float  # bytes to and from the chip's memory
    sent: dict[str, tuple[int, int]]  # number of collectives and bytes of their results, by kind

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Returns the least time that each takes."""
        sent = sum(num_bytes for _, num_bytes in self.sent.values())
        return {
            "work": self.flops / chip.flops,
            "memory": self.moved / chip.bandwidth,
            "network": sent / chip.network,
        }


def work_of(compiled: jax.stages.Compiled) -> Work:
    cost: Any = compiled.cost_analysis() or {}
    flops, moved = cost.get("flops", math.nan), cost.get("bytes accessed", math.nan)
    return Work(flops, moved, collectives(compiled.as_text() or ""))


def scaling(
    work: Work, kind: str, chip: Chip, num_chips: int, num_steps: int, utilization: float
) -> str:
    """Says how many hours many calls take on these chips, and the same FLOPs on 16 A100s.

    Chip-hours, times the price of the day, are the cost.

    Args:
        work: what one chip does in one call.
        kind: name of the chip.
        chip: what it can do.
        num_chips: chips that share a call.
        num_steps: number of calls.
        utilization: share of the roofline that a real run reaches, in (0, 1].
    """
    here = np.nan_to_num(list(work.seconds(chip).values())).max()
    there = work.flops * num_chips / _NUM_A100 / _A100.flops
    rows = ((kind, num_chips, here), ("A100", _NUM_A100, there))
    lines = [f"{num_steps} steps, all else (data, checkpoints, evaluation, restarts) left out:"]
    for name, count, seconds in rows:
        hours = num_steps * seconds / 3600
        real = hours / utilization
        lines.append(
            f"{count:4} {name:4}  {hours:.1f} h, {hours * count:,.0f} chip-hours at the roofline;"
            f" {real:.1f} h, {real * count:,.0f} chip-hours at {utilization:.0%} of it"
        )
    lines.append("A100: the same FLOPs at its bfloat16 peak, neither memory nor network counted")
    return "\n".join(lines)
