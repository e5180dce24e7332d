import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax.models import noise_schedule, samplers
from sdprune_jax.models.noise_schedule import Schedule

# diffusers' DPM-Solver++ hands a torch tensor to numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CLASSES = {name: class_name for class_name, name in samplers.SAMPLERS.items()}
PREDICTIONS = noise_schedule.PREDICTION_TYPES
SPACINGS = noise_schedule.TIMESTEP_SPACINGS
BOUND = 1e-5  # of the largest latent, after every step
SHAPE = (2, 3, 4, 2)

_rng = np.random.default_rng(0)
NOISE = _rng.normal(size=SHAPE).astype(np.float32)
MIX = _rng.normal(size=(24, 24)).astype(np.float32) / 24**0.5
_step = jax.jit(samplers.step)


def _model(x, timestep):
    """Cheap, nonlinear, and different at every timestep."""
    return np.tanh(x.reshape(2, -1) @ MIX + timestep / np.float32(1000)).reshape(SHAPE)


def _rows(table):
    return [samplers.Timetable(*row) for row in zip(*table, strict=True)]


def _reference(schedule, num_steps):
    pytest.importorskip("torch")  # of which a scheduler of diffusers is made
    import diffusers

    scheduler = getattr(diffusers, schedule.class_name).from_config(schedule.to_json())
    scheduler.set_timesteps(num_steps)
    return scheduler


def _assert_same_path(schedule, num_steps):
    torch = pytest.importorskip("torch")
    scheduler = _reference(schedule, num_steps)
    table = samplers.timetable(schedule, None, num_steps)
    np.testing.assert_array_equal(table.timestep, scheduler.timesteps.numpy())
    state, want = samplers.start(jnp.asarray(NOISE)), torch.from_numpy(NOISE)
    for row, timestep in zip(_rows(table), scheduler.timesteps, strict=True):
        state = _step(state, row, jnp.asarray(_model(np.asarray(state.x), row.timestep)))
        output = torch.from_numpy(_model(want.numpy(), timestep.numpy()))
        want = scheduler.step(output, timestep, want).prev_sample
        bound = BOUND * want.abs().max().item()
        np.testing.assert_allclose(state.x, want.numpy(), rtol=0, atol=bound)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 10, 25, 50])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("sampler", CLASSES)
def test_every_step_matches_diffusers(sampler, prediction_type, num_steps):
    schedule = Schedule(class_name=CLASSES[sampler], prediction_type=prediction_type)
    _assert_same_path(schedule, num_steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", CLASSES)
def test_every_spacing_matches_diffusers(sampler, spacing):
    schedule = Schedule(class_name=CLASSES[sampler], timestep_spacing=spacing)
    _assert_same_path(schedule, 7)
    for num_steps in (*range(1, 50), 96, 144, 250, 500):
        want = _reference(schedule, num_steps).timesteps.numpy()
        got = samplers.timetable(schedule, None, num_steps).timestep
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("ends_clean", [False, True, None])
@pytest.mark.parametrize("sampler", ["pndm", "ddim"])
def test_the_last_step_ends_where_diffusers_ends(sampler, ends_clean):
    _assert_same_path(Schedule(class_name=CLASSES[sampler], set_alpha_to_one=ends_clean), 10)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_zero_terminal_snr_matches_diffusers(sampler, spacing):
    schedule = Schedule(
        class_name=CLASSES[sampler],
        prediction_type="v_prediction",
        timestep_spacing=spacing,
        rescale_betas_zero_snr=True,
    )
    _assert_same_path(schedule, 10)


@pytest.mark.parametrize("num_steps", [1, 2, 6, 30])
@pytest.mark.parametrize(
    ("sampler", "prediction_type"),
    [  # PNDM adds up velocities of different timesteps, which is not exact
        ("pndm", "epsilon"),
        *[
            (sampler, prediction_type)
            for sampler in ("ddim", "dpm++")
            for prediction_type in PREDICTIONS
        ],
    ],
)
def test_a_perfect_model_leads_to_its_image(sampler, num_steps, prediction_type):
    schedule = Schedule(prediction_type=prediction_type, set_alpha_to_one=True)
    alphas = noise_schedule.alphas_cumprod(schedule)
    table = samplers.timetable(schedule, sampler, num_steps)
    image, noise = NOISE[::-1], NOISE
    signal_std, noise_std = alphas[table.timestep[0]] ** 0.5, (1 - alphas[table.timestep[0]]) ** 0.5
    state = samplers.start(jnp.asarray(signal_std * image + noise_std * noise))
    for row in _rows(table):
        alpha = alphas[row.timestep]
        estimate = (np.asarray(state.x) - alpha**0.5 * image) / (1 - alpha) ** 0.5
        velocity = alpha**0.5 * estimate - (1 - alpha) ** 0.5 * image
        output = estimate if prediction_type == "epsilon" else velocity
        state = _step(state, row, jnp.asarray(output, jnp.float32))
    np.testing.assert_allclose(state.x, image, rtol=0, atol=2e-5)


def test_timesteps_of_sd2():
    base = Schedule()
    pndm = samplers.timetable(base, None, 25).timestep
    np.testing.assert_array_equal(pndm, [961, 921, *range(921, 0, -40)])
    assert len(pndm) == 26
    assert len(samplers.timetable(base, "pndm", 50).timestep) == 51
    ddim = samplers.timetable(base, "ddim", 25).timestep
    np.testing.assert_array_equal(ddim, range(961, 0, -40))
    trailing = dataclasses.replace(base, timestep_spacing="trailing")
    ddim = samplers.timetable(trailing, "ddim", 25).timestep
    np.testing.assert_array_equal(ddim, range(999, 0, -40))
    dpm = samplers.timetable(base, "dpm++", 20).timestep
    np.testing.assert_array_equal(dpm, [*range(999, 500, -50), *range(500, 0, -50)])
    assert dpm.dtype == np.int32


def test_trailing_makes_no_step_too_many():
    schedule = Schedule(timestep_spacing="trailing")  # diffusers adds timestep -1 to these 61
    timestep = samplers.timetable(schedule, "ddim", 61).timestep
    assert len(timestep) == 61
    assert timestep[-1] == 15


def test_scan_takes_the_same_path_and_stays_in_float32():
    table = samplers.timetable(Schedule(), "pndm", 10)
    noise = jnp.asarray(NOISE, jnp.bfloat16)
    outputs = jnp.asarray(np.random.default_rng(1).normal(size=(11, *SHAPE)), jnp.bfloat16)

    @jax.jit
    def sample(noise):
        body = lambda state, call: (samplers.step(state, *call), None)
        return jax.lax.scan(body, samplers.start(noise), (table, outputs))[0]

    state = samplers.start(noise)
    for row, output in zip(_rows(table), outputs, strict=True):
        state = _step(state, row, output)
    got = sample(noise)
    assert got.x.dtype == got.history.dtype == state.x.dtype == jnp.float32
    np.testing.assert_allclose(got.x, state.x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "sampler", "num_steps", "problem"),
    [
        ({}, "euler", 0, "no sampler 'euler'; 0 steps, must be 1 to 1000"),
        ({}, None, 1001, "1001 steps, must be 1 to 1000"),
        ({}, None, 1000, "1000 steps do not fit into 1000 timesteps with steps_offset 1"),
        ({"class_name": "EulerDiscreteScheduler"}, None, 10, "EulerDiscreteScheduler is not one"),
        ({"timestep_spacing": "leading"}, "dpm++", 1000, "do not fit"),
        (
            {
                "class_name": "DDIMScheduler",
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
            },
            "pndm",
            10,
            "PNDM cannot start at zero SNR",
        ),
    ],
)
def test_impossible_runs_are_refused(changes, sampler, num_steps, problem):
    with pytest.raises(ValueError, match=problem):
        samplers.timetable(Schedule(**changes), sampler, num_steps)
