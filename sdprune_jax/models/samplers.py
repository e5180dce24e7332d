"""PNDM, DDIM and DPM-Solver++(2M) as one linear multistep method.

All three are the same recursion, with other coefficients at every model call:

    estimate = from_x * x + from_output * output
    x        = carry * x + sum over j of weights[j] * (estimate of j calls ago)

So a sampler is a table of coefficients, made once on the host in float64, and sampling is

    state, _ = jax.lax.scan(body, start(noise), timetable(schedule, None, num_steps))

where `body` calls the UNet at `row.timestep` on `state.x` and then `step`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from sdprune_jax import UserError
from sdprune_jax.models.noise_schedule import Schedule, alphas_cumprod

SAMPLERS = {  # by the scheduler class that stands for it in a diffusers directory
    "PNDMScheduler": "pndm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm++",
}

# How PNDM combines the outputs of its first five calls and of all later ones, newest first.
# Adams-Bashforth of rising order; call 1 repeats the first step as Heun's method, and its
# output is left out afterwards, hence the zeros.
_PLMS: Float64[np.ndarray, "calls history"] = np.array(
    [
        [1, 0, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0, 0],
        [3 / 2, 0, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 0, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, 0, -9 / 24],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24, 0],
    ]
)
_HISTORY = _PLMS.shape[1]  # estimates kept, the newest included; the others need 1 and 2

_Alphas = Float64[np.ndarray, " calls"]  # shares of signal variance, in [0, 1]


class Timetable(NamedTuple):
    """Coefficients of every model call (axis `calls`) or, as a row, of one (no such axis).

    `timestep` is what the UNet is given, in [0, num_train_timesteps); newest first in `weights`.
    """

    timestep: Int[Array, "*calls"] | Int[np.ndarray, "*calls"]
    from_x: Float[Array, "*calls"] | Float[np.ndarray, "*calls"]
    from_output: Float[Array, "*calls"] | Float[np.ndarray, "*calls"]
    carry: Float[Array, "*calls"] | Float[np.ndarray, "*calls"]
    weights: Float[Array, "*calls history"] | Float[np.ndarray, "*calls history"]


class SamplerState(NamedTuple):
    """What one sampler step hands to the next."""

    x: Float[Array, "b h w c"]  # the noisy latents; after the last step, the result
    history: Float[Array, "history b h w c"]  # estimates of the latest calls, newest first


def timetable(schedule: Schedule, sampler: str | None, num_steps: int) -> Timetable:
    """Computes the coefficients of every model call.

    Args:
        schedule: the noise schedule the UNet was trained with.
        sampler: "pndm", "ddim" (eta 0) or "dpm++" (2M, midpoint); None for the one that
            the schedule's class names.
        num_steps: 1 or more. PNDM makes one model call more than this, but for a single step.

    Returns:
        Host arrays, int32 and float32; `timestep` equals `scheduler.timesteps` in diffusers.

    Raises:
        ValueError: if the sampler is unknown or cannot use the schedule, or if there are more
            steps than distinct timesteps.

    Source: PNDM, ICLR 2022, equations 9 and 12 (https://arxiv.org/abs/2202.09778); DDIM, ICLR
        2021, equation 12 (https://arxiv.org/abs/2010.02502); DPM-Solver++, algorithm 2
        (https://arxiv.org/abs/2211.01095). Where published code differs, as in diffusers 0.42.
    """
    sampler = SAMPLERS.get(schedule.class_name) if sampler is None else sampler
    timesteps = _checked_timesteps(schedule, sampler, num_steps)
    timestep, alpha, next_alpha = _calls(schedule, sampler, timesteps)
    from_x, from_output = _x0_from(alpha, schedule.prediction_type)
    carry, gain = _first_order(alpha, next_alpha)
    if sampler == "dpm++":
        weights = gain[:, None] * _second_order(alpha)
    else:  # these two combine the outputs themselves, not predictions of x0
        carry, gain = carry + gain * from_x, gain * from_output
        from_x, from_output = np.zeros_like(alpha), np.ones_like(alpha)
        order = np.minimum(np.arange(len(alpha)), len(_PLMS) - 1) if sampler == "pndm" else [0]
        weights = gain[:, None] * _PLMS[order]
    if sampler == "pndm" and num_steps > 1:
        # Call 1 starts again from the first x. No need to keep that: it is linear in the present
        # x and the first output, (x - weights[0, 0] * output) / carry[0].
        weights[1, 1] -= carry[1] * weights[0, 0] / carry[0]
        carry[1] /= carry[0]
    coefficients = (from_x, from_output, carry, weights)
    return Timetable(timestep.astype(np.int32), *(c.astype(np.float32) for c in coefficients))


def start(noise: Float[Array, "b h w c"]) -> SamplerState:
    """Begins from unit Gaussian noise, which none of these samplers scales."""
    x = noise.astype(jnp.float32)
    return SamplerState(x, jnp.zeros((_HISTORY, *x.shape), jnp.float32))


def step(
    state: SamplerState, row: Timetable, model_output: Float[Array, "b h w c"]
) -> SamplerState:
    """Advances by one model call.

    Args:
        state: `state.x` is what the UNet was given.
        row: one row of the timetable.
        model_output: the UNet's, of the schedule's prediction type, after guidance.
    """
    estimate = state.x * row.from_x + model_output * row.from_output
    history = jnp.concatenate([estimate[None], state.history[:-1]])
    combined = jnp.einsum("k,k...->...", row.weights, history, precision="highest")
    return SamplerState(state.x * row.carry + combined, history)


def _calls(
    schedule: Schedule, sampler: str | None, timesteps: Int[np.ndarray, " steps"]
) -> tuple[Int[np.ndarray, " calls"], _Alphas, _Alphas]:
    """What the UNet is given at each call, and where the step of that call begins and ends."""
    alphas = alphas_cumprod(schedule)
    if sampler == "dpm++":
        if schedule.rescale_betas_zero_snr:
            alphas[-1] = 2.0**-24  # its log-SNR must be finite
        return timesteps, alphas[timesteps], np.append(alphas[timesteps[1:]], 1.0)
    # One stride down, also where "linspace" and "trailing" put the next timestep a little off
    # that: so do the published samplers.
    stride = schedule.num_train_timesteps // len(timesteps)
    begin, end = timesteps, timesteps - stride
    if sampler == "pndm":  # call 1 repeats the first step, from the far end of it
        second = timesteps[1:2]  # none in a run of one step
        timesteps = np.insert(timesteps, 1, second)
        begin, end = np.insert(begin, 1, second + stride), np.insert(end, 1, second)
    ends_clean = schedule.set_alpha_to_one
    ends_clean = sampler == "ddim" if ends_clean is None else ends_clean
    final_alpha = 1.0 if ends_clean else alphas[0]
    return timesteps, alphas[begin], np.where(end >= 0, alphas[end], final_alpha)


def _x0_from(alpha: _Alphas, prediction_type: str) -> tuple[_Alphas, _Alphas]:
    """Factors of x and of the output in the prediction of x0."""
    signal, noise = np.sqrt(alpha), np.sqrt(1 - alpha)
    return (signal, -noise) if prediction_type == "v_prediction" else (1 / signal, -noise / signal)


def _first_order(alpha: _Alphas, next_alpha: _Alphas) -> tuple[_Alphas, _Alphas]:
    """Factors of x and of the prediction of x0 in a DDIM step.

    DDIM keeps the noise in x and changes its share; DPM-Solver++ of first order is the same.
    """
    carry = np.sqrt((1 - next_alpha) / (1 - alpha))
    return carry, np.sqrt(next_alpha) - np.sqrt(alpha) * carry


def _second_order(alpha: _Alphas) -> Float64[np.ndarray, "calls history"]:
    """Extrapolates x0 to the middle of each step, in log-SNR, from the latest two predictions."""
    combine = np.zeros((len(alpha), _HISTORY))
    combine[:, 0] = 1  # first order on the first call, and on the last, which ends at infinity
    log_snr = np.log(alpha / (1 - alpha)) / 2
    strides = np.diff(log_snr)
    half = strides[1:] / strides[:-1] / 2
    combine[1:-1, 0] += half
    combine[1:-1, 1] -= half
    return combine


def _checked_timesteps(
    schedule: Schedule, sampler: str | None, num_steps: int
) -> Int[np.ndarray, " steps"]:
    """The timesteps of a run, descending, without PNDM's repetition; raises what is wrong."""
    problems = []
    if sampler is None:
        problems.append(f"{schedule.class_name} is not one of ours: name a sampler")
    elif sampler not in SAMPLERS.values():
        problems.append(f"no sampler {sampler!r}")
    if sampler == "pndm" and schedule.rescale_betas_zero_snr:
        problems.append("PNDM cannot start at zero SNR (rescale_betas_zero_snr)")
    if not 1 <= num_steps <= schedule.num_train_timesteps:
        problems.append(f"{num_steps} steps, must be 1 to {schedule.num_train_timesteps}")
    timesteps = np.zeros(0, np.int64)
    if not problems:
        timesteps = _timesteps(schedule, sampler == "dpm++", num_steps)
        if timesteps[0] >= schedule.num_train_timesteps or np.any(np.diff(timesteps) >= 0):
            problems.append(
                f"{num_steps} steps do not fit into {schedule.num_train_timesteps} timesteps "
                f"with steps_offset {schedule.steps_offset}: take fewer"
            )
    if problems:
        names = ", ".join(SAMPLERS.values())
        raise UserError("cannot sample: " + "; ".join(problems) + f" (samplers: {names})")
    return timesteps


def _timesteps(schedule: Schedule, is_dpm: bool, num_steps: int) -> Int[np.ndarray, " steps"]:
    total = schedule.num_train_timesteps
    spacing = schedule.timestep_spacing or ("linspace" if is_dpm else "leading")
    if spacing == "trailing":
        descending = np.arange(total, 0, -total / num_steps)[:num_steps]  # rounding may add a 0
        return np.round(descending).astype(np.int64) - 1
    # DPM-Solver++ lays out one timestep more and leaves out the lowest: it ends at no noise.
    num_laid_out = num_steps + is_dpm
    if spacing == "linspace":
        ascending = np.round(np.linspace(0, total - 1, num_laid_out)).astype(np.int64)
    else:
        stride = total // num_laid_out
        ascending = np.arange(num_laid_out) * stride + schedule.steps_offset
    return ascending[::-1][:num_steps]
