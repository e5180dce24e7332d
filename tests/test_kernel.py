import golden_metrics
import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from sdprune_jax import sharding
from sdprune_jax.metrics import kernel


def _mesh(num_devices):
    axes, types = ("data", "fsdp"), (AxisType.Auto,) * 2
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((num_devices, 1), axes, axis_types=types, devices=devices)


def _direct_cmmd(x, y, sigma=10.0):
    """The definition in float64, by differences."""

    def mean(a, b):
        squared = np.array([np.sum((b - row) ** 2, axis=1) for row in a])
        return np.expm1(-squared / (2 * sigma**2)).mean()

    x, y = x.astype(np.float64), y.astype(np.float64)
    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_kid_is_that_of_torch_fidelity_with_the_same_subsets():
    found = kernel.kid(
        *golden_metrics.features("tall"),
        num_subsets=golden_metrics.KID_SUBSETS,
        subset_size=golden_metrics.KID_SIZE,
        seed=golden_metrics.KID_SEED,
    )
    np.testing.assert_allclose(found, golden_metrics.golden()["kid"], rtol=1e-11)


def test_kid_of_whole_sets_is_that_of_torchmetrics():
    x, y = golden_metrics.sorted_features("tall")
    mean, std = kernel.kid(x[:250], y, num_subsets=2, subset_size=1000)
    np.testing.assert_allclose(mean, golden_metrics.golden()["kid_whole"], rtol=1e-11)
    assert std < 1e-12  # both subsets hold all images


def test_kid_of_two_images_is_by_hand():
    x, y = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [2.0, 0.0]])
    # Products over 2, plus 1: within x 1, within y 2; across 1.5, 2, 2, 1; cubed.
    want = 1 + 8 - 2 * (1.5**3 + 8 + 8 + 1) / 4
    np.testing.assert_allclose(kernel.kid(x, y, num_subsets=1)[0], want, rtol=1e-14)


def test_kid_depends_on_the_seed_but_not_on_the_order_of_images():
    x, y = golden_metrics.features("tall")
    kid = lambda x, y, seed: kernel.kid(x, y, num_subsets=3, subset_size=50, seed=seed)
    order = np.random.default_rng(0).permutation(len(x))
    assert kid(x[order], y[::-1], 1) == kid(x, y, 1)
    assert kid(x, y, 2) != kid(x, y, 1)


def test_kid_of_one_distribution_is_zero_on_average():
    sets = np.random.default_rng(0).normal(size=(60, 2, 40, 4))
    found = [kernel.kid(*pair, num_subsets=1)[0] for pair in sets]
    assert abs(np.mean(found)) < 3 * np.std(found) / 60**0.5  # the biased estimate is 25 of them


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_cmmd_is_that_of_both_published_codes_on_any_mesh(num_devices):
    x, y = golden_metrics.near_unit_vectors()
    found = kernel.cmmd(x, y, _mesh(num_devices))
    want = golden_metrics.golden()["cmmd"]
    assert want.keys() == {"torch", "jax"}
    for value in want.values():
        np.testing.assert_allclose(found, value, rtol=1e-9)


def test_cmmd_is_right_where_sets_hardly_differ():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(700, 24)) + 2
    y = x + 0.05 * rng.normal(size=x.shape)
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    want = _direct_cmmd(x, y)
    assert 0 < want < 5e-6  # float32 tells values of the kernel apart by 6e-5 of this unit
    np.testing.assert_allclose(kernel.cmmd(x, y, _mesh(2)), want, rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
def test_cmmd_of_narrow_kernels_is_right(sigma):
    x, y = golden_metrics.near_unit_vectors()
    found = kernel.cmmd(x, y, _mesh(1), sigma=sigma)
    np.testing.assert_allclose(found, _direct_cmmd(x, y, sigma), rtol=1e-6)


def test_cmmd_does_not_depend_on_the_order_of_images():
    x, y = golden_metrics.near_unit_vectors()
    orders = (np.random.default_rng(i).permutation(len(v)) for i, v in enumerate((x, y)))
    shuffled = [v[order] for v, order in zip((x, y), orders, strict=True)]
    mesh = _mesh(1)
    np.testing.assert_allclose(kernel.cmmd(*shuffled, mesh), kernel.cmmd(x, y, mesh), rtol=1e-9)


def test_a_set_has_no_cmmd_to_itself():
    x, _ = golden_metrics.near_unit_vectors()
    assert abs(kernel.cmmd(x, x, sharding.make_mesh())) < 1e-9


@pytest.mark.parametrize("distance", [kernel.kid, lambda x, y: kernel.cmmd(x, y, _mesh(1))])
def test_sets_that_cannot_be_compared_are_refused_with_all_reasons(distance):
    x, y = np.ones((1, 3)), np.full((4, 2), np.nan)
    message = "x has 1 images.*y is not finite.*3 features and y 2"
    with pytest.raises(ValueError, match=message):
        distance(x, y)


def test_impossible_subsets_and_widths_are_refused():
    x, y = golden_metrics.near_unit_vectors()
    with pytest.raises(ValueError, match="num_subsets=0 and subset_size=1"):
        kernel.kid(x, y, num_subsets=0, subset_size=1)
    with pytest.raises(ValueError, match="above 0, got 0"):
        kernel.cmmd(x, y, _mesh(1), sigma=0.0)
    with pytest.raises(ValueError, match="too narrow"):
        kernel.cmmd(x, y, _mesh(1), sigma=0.01)
