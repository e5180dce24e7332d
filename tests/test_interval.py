import numpy as np
import pytest

from sdprune_jax.metrics import frechet, interval


def _reference(size):
    return frechet.Gaussian(np.zeros(size), np.diag(np.linspace(0.5, 1.5, size)))


def _distance(features, reference):
    return frechet.frechet_distance(frechet.gaussian(frechet.moments([features])), reference)


def test_interval_of_a_mean_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(3, 2, size=2000)
    low, high = interval.of_mean(values, num_resamples=4000, level=0.9)
    half = 1.6449 * values.std() / 2000**0.5
    np.testing.assert_allclose(
        (low, high), values.mean() + np.array([-half, half]), atol=0.05 * half
    )


def test_interval_of_a_mean_holds_it_as_often_as_its_level_says():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        low, high = interval.of_mean(
            rng.exponential(size=200), num_resamples=200, level=0.8, seed=seed
        )
        held += low <= 1 <= high
    assert abs(held / 200 - 0.8) < 0.07  # 2.5 standard errors


def test_interval_of_equal_values_is_a_point():
    assert interval.of_mean(np.full(5, 0.25), num_resamples=10) == (0.25, 0.25)


def test_intervals_repeat_with_their_seed():
    x = np.random.default_rng(0).normal(size=(50, 3))
    for find in (
        lambda seed: interval.of_mean(x[:, 0], num_resamples=20, seed=seed),
        lambda seed: interval.of_frechet_distance(x, _reference(3), num_resamples=20, seed=seed),
    ):
        assert find(1) == find(1) != find(2)


@pytest.mark.parametrize("size", [3, 40])
def test_a_resample_has_the_distance_of_its_own_features(size):
    """The interval from distances of the resampled features themselves."""
    x = np.random.default_rng(0).normal(0.2, 1.1, size=(30, size))
    reference = _reference(size)
    rng = np.random.default_rng(7)
    drawn = [_distance(x[rng.integers(30, size=30)], reference) for _ in range(12)]
    low, high = _distance(x, reference) - np.quantile(drawn, [0.95, 0.05]) + np.mean(drawn)
    found = interval.of_frechet_distance(x, reference, num_resamples=12, level=0.9, seed=7)
    np.testing.assert_allclose(found, (low, high), rtol=1e-7)


def test_interval_of_a_distance_holds_its_average_over_sets_of_as_many_images():
    reference = _reference(6)
    draw = lambda rng: rng.normal(0.3, 1.0, size=(300, 6))
    rng = np.random.default_rng(0)
    average = np.mean([_distance(draw(rng), reference) for _ in range(400)])
    held = 0
    for seed in range(100):
        x = draw(rng)
        low, high = interval.of_frechet_distance(
            x, reference, num_resamples=100, level=0.8, seed=seed
        )
        held += low <= average <= high
        assert low < _distance(x, reference) < high
    assert abs(held / 100 - 0.8) < 0.1  # 2.5 standard errors


def test_what_cannot_be_bootstrapped_is_refused_with_all_reasons():
    message = "1 images, expected 2.*not finite.*num_resamples=0.*level=95"
    with pytest.raises(ValueError, match=message):
        interval.of_mean(np.array([np.nan]), num_resamples=0, level=95.0)
    features = np.full((1, 2), np.nan)
    with pytest.raises(ValueError, match=message):
        interval.of_frechet_distance(features, _reference(2), num_resamples=0, level=95.0)
