"""The walk from noise to image on which the UNet is calibrated, and how much each call counts."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from sdprune_jax import UserError

# From 0 to 1 over the calls, given their numbers 1 to T (the noisiest is first) and T.
_RISES: Mapping[str, Callable[[Any, int], Any]] = {
    "linear_increasing": lambda call, num: (call - 1) / (num - 1),
    "linear_decreasing": lambda call, num: (num - call) / (num - 1),
    "log_increasing": lambda call, num: np.log(call) / math.log(num),
    "log_decreasing": lambda call, num: np.log(num - call + 1) / math.log(num),
}
TIMESTEP_WEIGHTS = ("uniform", *_RISES)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """How the UNet is calibrated. The defaults are OBS-Diff's, but for the convolutions.

    Attributes:
        sampler: one of `samplers.SAMPLERS`; None for what the model's scheduler says.
        num_steps: of the sampler. PNDM calls the UNet once more, and calls are what is weighted.
        guidance_scale: above 1, the UNet also runs on the negative prompt, and both halves count.
        batch_size: prompts at once, a multiple of the devices.
        latent_size: height and width; None for the model's own.
        timestep_weights: one of `TIMESTEP_WEIGHTS`.
        weight_range: lowest and highest weight of a call.
        position_fraction: of an image, read by the Gram matrix of a convolution; in (0, 1].
    """

    sampler: str | None = None
    num_steps: int = 25
    guidance_scale: float = 7.0
    batch_size: int = 4
    latent_size: tuple[int, int] | None = None
    timestep_weights: str = "log_decreasing"
    weight_range: tuple[float, float] = (0.8, 1.2)
    position_fraction: float = 0.125

    def weights(self, num_calls: int) -> Float32[np.ndarray, " calls"]:
        """Of each call, from the noisiest to the last."""
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
