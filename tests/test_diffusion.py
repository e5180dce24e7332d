import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax.models import noise_schedule
from sdprune_jax.models.noise_schedule import Schedule

# stabilityai/stable-diffusion-2-1-base, and what differs in stable-diffusion-2-1
SD21_BASE = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.10.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD21 = SD21_BASE | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


def test_alphas_cumprod_of_sd2():
    alphas = noise_schedule.alphas_cumprod(Schedule.from_json(SD21_BASE))
    assert alphas.shape == (1000,)
    want = [0.99914998, 0.99829602, 0.27633247, 0.00466010]  # diffusers, in float32
    np.testing.assert_allclose(alphas[[0, 1, 500, 999]], want, rtol=1e-6)
    np.testing.assert_allclose(((1 - alphas[-1]) / alphas[-1]) ** 0.5, 14.61465, rtol=1e-6)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alphas_cumprod_match_diffusers(beta_schedule, zero_snr):
    pytest.importorskip("torch")  # of which a scheduler of diffusers is made
    import diffusers

    values = SD21 | {"beta_schedule": beta_schedule, "rescale_betas_zero_snr": zero_snr}
    want = diffusers.DDIMScheduler.from_config(values).alphas_cumprod.numpy()
    got = noise_schedule.alphas_cumprod(Schedule.from_json(values))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-7)


def test_zero_snr_keeps_the_first_timestep_and_empties_the_last():
    schedule = Schedule.from_json(SD21)
    rescaled = dataclasses.replace(schedule, rescale_betas_zero_snr=True)
    before, after = noise_schedule.alphas_cumprod(schedule), noise_schedule.alphas_cumprod(rescaled)
    assert after[-1] == 0
    assert (np.diff(after) < 0).all()
    np.testing.assert_allclose(after[0], before[0], rtol=1e-12)


@pytest.mark.parametrize("values", [SD21_BASE, SD21])
def test_released_files_survive_a_round_trip(values):
    assert Schedule.from_json(values).to_json() == values


def test_unknown_harmless_keys_are_written_back():
    values = SD21 | {"sample_max_value": 1.0, "timestep_spacing": "trailing", "_note": [1, 2]}
    schedule = Schedule.from_json(values)
    assert schedule.timestep_spacing == "trailing"
    assert schedule.to_json() == values


def test_default_schedule_is_sd2_base():
    schedule = Schedule.from_json(SD21_BASE)
    assert dataclasses.replace(schedule, extra=Schedule().extra) == Schedule()


def test_absent_keys_mean_what_they_mean_to_diffusers():
    pytest.importorskip("torch")  # of which a scheduler of diffusers is made
    import diffusers

    values = {"_class_name": "DDIMScheduler", "clip_sample": False}
    schedule = Schedule.from_json(values)
    config = diffusers.DDIMScheduler.from_config(values).config
    for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"):
        assert getattr(schedule, key) == config[key]
    assert (schedule.prediction_type, schedule.steps_offset) == ("epsilon", config.steps_offset)
    assert schedule.set_alpha_to_one is None


def test_every_problem_is_named_at_once():
    values = {
        "_class_name": "PNDMScheduler",  # no skip_prk_steps: diffusers would run Runge-Kutta
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "sample",
        "timestep_spacing": "karras",
        "trained_betas": [0.1],
        "beta_start": 0.03,
        "num_train_timesteps": 1,
        "steps_offset": -1,
        "rescale_betas_zero_snr": True,
    }
    with pytest.raises(ValueError, match=r"scheduler_config\.json") as error:
        Schedule.from_json(values)
    message = str(error.value)
    assert "skip_prk_steps must be True, got False (the default" in message
    assert "trained_betas must be None, got [0.1]\n" in message
    assert "PNDMScheduler ignores it" in message
    for key in values.keys() - {"_class_name"}:
        assert key in message, key


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"_class_name": "DDIMScheduler"}, "clip_sample must be False, got True"),
        (SD21 | {"thresholding": True}, "thresholding must be False"),
        (SD21 | {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "class_name must be one of"),
        ({}, "class_name must be one of"),
        (SD21 | {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "pure noise"),
    ],
)
def test_unsupported_schedules_are_refused(values, problem):
    with pytest.raises(ValueError, match=problem):
        Schedule.from_json(values)


def test_every_variant_of_dpm_solver_but_2m_is_refused():
    variant = {
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
        "solver_type": "heun",
        "final_sigmas_type": "sigma_min",
        "thresholding": True,
        "use_karras_sigmas": True,
        "use_exponential_sigmas": True,
        "use_beta_sigmas": True,
        "use_lu_lambdas": True,
        "use_flow_sigmas": True,
    }
    with pytest.raises(ValueError, match="is not supported") as error:
        Schedule.from_json(SD21 | {"_class_name": "DPMSolverMultistepScheduler"} | variant)
    for key, value in variant.items():
        assert f"{key} must be" in str(error.value)
        assert f"got {value!r}" in str(error.value)


def test_schedules_of_other_samplers_lend_their_betas():
    euler = Schedule.from_json(SD21 | {"_class_name": "EulerDiscreteScheduler"})
    want = noise_schedule.alphas_cumprod(Schedule.from_json(SD21))
    np.testing.assert_array_equal(noise_schedule.alphas_cumprod(euler), want)


def _images(*values):
    return jnp.array(values, jnp.float32)[:, None, None, None]


def test_noise_and_velocity_by_hand():
    x0, noise, alpha = _images(1, 3), _images(2, -1), jnp.array([0.64, 1.0])
    noisy = noise_schedule.add_noise(x0, noise, alpha)
    np.testing.assert_allclose(noisy, _images(0.8 * 1 + 0.6 * 2, 3), rtol=1e-6)
    velocity = noise_schedule.training_target(x0, noise, alpha, "v_prediction")
    np.testing.assert_allclose(velocity, _images(0.8 * 2 - 0.6 * 1, -1), rtol=1e-6)
    np.testing.assert_array_equal(
        noise_schedule.training_target(x0, noise, alpha, "epsilon"), noise
    )


def test_min_snr_weights_by_hand():
    snr = jnp.array([0.0, 2.0, 5.0, 20.0])
    got = noise_schedule.min_snr_weight(snr, 5.0, "epsilon")
    np.testing.assert_allclose(got, [1, 1, 1, 0.25], rtol=1e-6)
    got = noise_schedule.min_snr_weight(snr, 5.0, "v_prediction")
    np.testing.assert_allclose(got, [0, 2 / 3, 5 / 6, 5 / 21], rtol=1e-6)


def test_min_snr_weights_of_aptp():
    alphas = noise_schedule.alphas_cumprod(Schedule())[[0, 100, 250, 500, 999]]
    snr = jnp.asarray(alphas / (1 - alphas), jnp.float32)
    np.testing.assert_allclose(
        snr, [1175.470588, 8.453894, 2.065535, 0.381850, 0.004682], rtol=1e-4
    )
    got = noise_schedule.min_snr_weight(snr + 1, 5.0, "epsilon")
    np.testing.assert_allclose(got, [0.00425, 0.52888261, 1, 1, 1], rtol=1e-6)
