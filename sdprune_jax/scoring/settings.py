"""What a calibration runs: prompts at once, sampler, guidance, and how much each call counts."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float32, Float64

from sdprune_jax import UserError

TimestepWeights = Literal[
    "uniform", "linear_increasing", "linear_decreasing", "log_increasing", "log_decreasing"
]

# From 0 to 1 over the calls, given their numbers 1 to T (the noisiest is first) and T.
_RISES: Mapping[str, Callable[[Any, int], Any]] = {
    "linear_increasing": lambda call, num: (call - 1) / (num - 1),
    "linear_decreasing": lambda call, num: (num - call) / (num - 1),
    "log_increasing": lambda call, num: np.log(call) / math.log(num),
    "log_decreasing": lambda call, num: np.log(num - call + 1) / math.log(num),
}
TIMESTEP_WEIGHTS = get_args(TimestepWeights)


@dataclasses.dataclass(frozen=True)
class GradientSettings:
    """Which gradients of the denoising loss are summed: the same pictures at several timesteps.

    Attributes:
        num_images: embedded training pictures, drawn by the seed.
        batch_size: pictures at once, a multiple of the devices.
        num_timesteps: evenly spaced, the least noise first.
        loss_threshold: the first timestep whose loss is below this share of the largest so far
            ends the sum.
    """

    num_images: int = 64
    batch_size: int = 16
    num_timesteps: int = 100
    loss_threshold: float = 0.05


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """How a component is calibrated. The defaults are OBS-Diff's, but for the convolutions.

    Attributes:
        batch_size: prompts at once, a multiple of the devices.
        num_steps: steps of the sampler. PNDM calls the UNet once more, and calls are weighted.
        guidance_scale: above 1, the UNet also runs on the negative prompt, and both halves count.
        timestep_weights: how the weight of a call rises or falls from the noisiest on.
        weight_range: lowest and highest weight of a call.
        position_fraction: share of the positions of an image that the Gram matrix of a convolution
            reads, in (0, 1].
        mask_pads: leave out what follows the end of a text. Ramesh and Zhao count it, and most of
            the 77 tokens of a caption are such.
        max_gigabytes: the most that statistics may take at once. What needs more is done in parts,
            each on the model that those before it left.
        sampler: one of `samplers.SAMPLERS`; None for what the model's scheduler says.
        gradients: for the methods that read gradients in place of inputs.
    """

    batch_size: int = 4
    num_steps: int = 25
    guidance_scale: float = 7.0
    timestep_weights: TimestepWeights = "log_decreasing"
    weight_range: tuple[float, float] = (0.8, 1.2)
    position_fraction: float = 0.125
    mask_pads: bool = True
    max_gigabytes: float = 8.0
    sampler: str | None = None
    gradients: GradientSettings = GradientSettings()

    def call_weights(self, num_calls: int) -> Float32[np.ndarray, " calls"]:
        """The weight of each call of the UNet, from the noisiest to the last."""
        low, high = self.weight_range
        return timestep_weights(num_calls, self.timestep_weights, low, high).astype(np.float32)


def timestep_weights(
    num_calls: int, kind: str, low: float = 0.8, high: float = 1.2
) -> Float64[np.ndarray, " calls"]:
    """Weights of the calls of the UNet, from the noisiest to the last.

    They are 1 if uniform, else from `low` to `high`; a single call has `high`.

    Raises:
        ValueError: if the kind is unknown, or the range is not positive and ascending.

    Source: OBS-Diff, timestep-aware Hessian (https://arxiv.org/abs/2510.06751).
    """
    problems = []
    if kind not in TIMESTEP_WEIGHTS:
        problems.append(f"timestep weights are {kind!r}, expected one of {TIMESTEP_WEIGHTS}")
    if not 0 < low <= high:
        problems.append(f"their range must satisfy 0 < low <= high, got {low} and {high}")
    if problems:
        raise UserError("cannot weight the calls: " + "; ".join(problems))
    if kind == "uniform":
        return np.ones(num_calls)
    rise = _RISES[kind](np.arange(1, num_calls + 1), num_calls) if num_calls > 1 else np.ones(1)
    return low + (high - low) * rise
