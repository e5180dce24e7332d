"""The noise schedule of a diffusers scheduler, and what training needs from it.

Conventions: `alpha_cumprod` is the share of signal variance left at a timestep, so that
`noisy = sqrt(alpha_cumprod) * x0 + sqrt(1 - alpha_cumprod) * noise`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from sdprune_jax import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")

# Scheduler classes we read, each with the settings it has in diffusers that must hold exactly one
# value here. Classes with an empty entry lend their betas and prediction type only: whoever
# samples from such a schedule names the sampler.
_SETTINGS: dict[str, dict[str, Any]] = {
    "PNDMScheduler": {"skip_prk_steps": True},
    "DDIMScheduler": {"clip_sample": False, "thresholding": False},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "final_sigmas_type": "zero",
        "thresholding": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
    },
    "DDPMScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "UniPCMultistepScheduler": {},
}
# What diffusers assumes where a file leaves a key out and that is not our default.
_ABSENT = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "steps_offset": 0,
    "set_alpha_to_one": None,
    "skip_prk_steps": False,
    "clip_sample": True,
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A `scheduler_config.json`, under its keys; the defaults are Stable Diffusion 2.1-base's.

    Attributes:
        class_name: `_class_name` in the file.
        beta_start: variance of the noise added at timestep 0, in (0, 1).
        beta_end: the same at the last timestep, before any rescaling.
        beta_schedule: "linear" in the betas, or "scaled_linear": linear in their square roots.
        prediction_type: "epsilon" or "v_prediction".
        steps_offset: added to every timestep of "leading" spacing.
        set_alpha_to_one: whether the last sampler step ends at no noise rather than at the
            noise of timestep 0; None means the default of the sampler.
        timestep_spacing: "leading", "trailing" or "linspace"; None as above.
        rescale_betas_zero_snr: whether the last timestep is pure noise.
        extra: keys that change nothing here, kept to be written back.

    Raises:
        ValueError: listing every value this package does not support.
    """

    class_name: str = "PNDMScheduler"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    steps_offset: int = 1
    set_alpha_to_one: bool | None = False
    timestep_spacing: str | None = None
    rescale_betas_zero_snr: bool = False
    extra: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"clip_sample": False, "skip_prk_steps": True}, hash=False
    )

    def __post_init__(self):
        if problems := _problems(self):
            raise UserError(
                "scheduler/scheduler_config.json is not supported:\n  " + "\n  ".join(problems)
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Schedule":
        """Reads the values of a diffusers `scheduler/scheduler_config.json`.

        Raises:
            ValueError: listing every value this package does not support.
        """
        names = {field.name for field in dataclasses.fields(cls)} - {"class_name", "extra"}
        found: dict[str, Any] = {k: v for k, v in _ABSENT.items() if k in names} | dict(values)
        class_name = str(found.pop("_class_name", None))
        known = {key: value for key, value in found.items() if key in names}
        extra = {key: value for key, value in found.items() if key not in names}
        return cls(class_name=class_name, extra=extra, **known)

    def to_json(self) -> dict[str, Any]:
        """The values `from_json` read, but with those it found absent spelled out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        class_name, extra = values.pop("class_name"), values.pop("extra")
        if not self.rescale_betas_zero_snr:
            del values["rescale_betas_zero_snr"]  # half of the classes do not know it
        values = {key: value for key, value in values.items() if value is not None} | extra
        return {"_class_name": class_name} | dict(sorted(values.items()))


def alphas_cumprod(schedule: Schedule) -> Float64[np.ndarray, " timesteps"]:
    """Computes the share of signal variance left at every timestep, on the host.

    Returns:
        Strictly decreasing, in (0, 1); the last is exactly 0 with `rescale_betas_zero_snr`.

    Source: DDPM, NeurIPS 2020, section 2 (https://arxiv.org/abs/2006.11239); zero terminal SNR:
        Lin et al., WACV 2024, algorithm 1 (https://arxiv.org/abs/2305.08891).
    """
    power = {"linear": 1, "scaled_linear": 2}[schedule.beta_schedule]
    start, end = schedule.beta_start ** (1 / power), schedule.beta_end ** (1 / power)
    betas = np.linspace(start, end, schedule.num_train_timesteps) ** power
    alphas = np.cumprod(1 - betas)
    if schedule.rescale_betas_zero_snr:
        signal = np.sqrt(alphas)  # the first stays, the last becomes 0
        alphas = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
    return alphas


def add_noise(
    x0: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    alpha_cumprod: Float[Array, " b"],
) -> Float[Array, "b h w c"]:
    """Noises each example to its own timestep's `alpha_cumprod`."""
    signal_std, noise_std = _stds(alpha_cumprod)
    return signal_std * x0 + noise_std * noise


def training_target(
    x0: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    alpha_cumprod: Float[Array, " b"],
    prediction_type: str,
) -> Float[Array, "b h w c"]:
    """What the UNet should predict: the noise, or the velocity.

    Source: Salimans & Ho, ICLR 2022, appendix D (https://arxiv.org/abs/2202.00512).
    """
    assert prediction_type in PREDICTION_TYPES, prediction_type
    if prediction_type == "epsilon":
        return noise
    signal_std, noise_std = _stds(alpha_cumprod)
    return signal_std * noise - noise_std * x0


def min_snr_weight(
    snr: Float[Array, " b"], gamma: float, prediction_type: str
) -> Float[Array, " b"]:
    """Weighs each example's loss so that no timestep counts more than `gamma` in terms of x0.

    The released code of APTP weighs velocities otherwise: `min(snr + 1, gamma) / (snr + 1)`,
    which is `min_snr_weight(snr + 1, gamma, "epsilon")`.

    Args:
        snr: `alpha_cumprod / (1 - alpha_cumprod)`, in [0, inf).
        gamma: the largest weight in terms of x0; 5 in the paper.
        prediction_type: what the loss compares, "epsilon" or "v_prediction".

    Returns:
        In [0, 1] for "epsilon", in [0, gamma / (gamma + 1)] for "v_prediction".

    Source: Hang et al., ICCV 2023, section 3.4 (https://arxiv.org/abs/2303.09556).
    """
    assert prediction_type in PREDICTION_TYPES, prediction_type
    if prediction_type == "epsilon":
        return gamma / jnp.maximum(snr, gamma)  # min(snr, gamma) / snr, and 1 where snr is 0
    return jnp.minimum(snr, gamma) / (snr + 1)


def _stds(
    alpha_cumprod: Float[Array, " b"],
) -> tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]:
    """Standard deviations of signal and noise."""
    alpha = alpha_cumprod[:, None, None, None]
    return jnp.sqrt(alpha), jnp.sqrt(1 - alpha)


def _problems(schedule: Schedule) -> list[str]:
    choices = {
        "class_name": tuple(_SETTINGS),
        "beta_schedule": ("linear", "scaled_linear"),
        "prediction_type": PREDICTION_TYPES,
        "timestep_spacing": (None, *TIMESTEP_SPACINGS),
    }
    problems = [
        f"{key} must be one of {allowed}, got {getattr(schedule, key)!r}"
        for key, allowed in choices.items()
        if getattr(schedule, key) not in allowed
    ]
    settings = {"trained_betas": None} | _SETTINGS.get(schedule.class_name, {})
    for key, needed in settings.items():
        value = schedule.extra.get(key, _ABSENT.get(key, needed))
        if value != needed:
            absent = "" if key in schedule.extra else " (the default where the key is absent)"
            problems.append(f"{key} must be {needed!r}, got {value!r}{absent}")
    if not 0 < schedule.beta_start <= schedule.beta_end < 1:
        problems.append(
            "betas must satisfy 0 < beta_start <= beta_end < 1, "
            f"got {schedule.beta_start} and {schedule.beta_end}"
        )
    if schedule.num_train_timesteps < 2:
        problems.append(
            f"num_train_timesteps must be 2 or more, got {schedule.num_train_timesteps}"
        )
    if schedule.steps_offset < 0:
        problems.append(f"steps_offset must be 0 or more, got {schedule.steps_offset}")
    if schedule.rescale_betas_zero_snr and schedule.prediction_type == "epsilon":
        problems.append(
            "rescale_betas_zero_snr needs prediction_type 'v_prediction': "
            "the noise in pure noise says nothing about the image"
        )
    if schedule.rescale_betas_zero_snr and schedule.class_name == "PNDMScheduler":
        problems.append("rescale_betas_zero_snr needs another class: PNDMScheduler ignores it")
    return problems
