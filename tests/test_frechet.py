import golden_metrics
import numpy as np
import pytest

from sdprune_jax.metrics import frechet

_RNG = np.random.default_rng(0)


def _fit(features):
    return frechet.gaussian(frechet.moments([features]))


def _orthogonal(size):
    return np.linalg.qr(np.random.default_rng(size).normal(size=(size, size)))[0]


@pytest.mark.parametrize(("kind", "rtol"), [("tall", 1e-12), ("wide", 1e-7)])
@pytest.mark.parametrize("package", ["torch_fidelity", "torchmetrics"])
def test_distance_is_that_of_the_torch_packages(kind, rtol, package):
    # With fewer images than features they take roots of rounding errors, which moves them by 5e-8.
    x, y = golden_metrics.features(kind)
    want = golden_metrics.golden()[f"fid_{kind}"][package]
    np.testing.assert_allclose(frechet.frechet_distance(_fit(x), _fit(y)), want, rtol=rtol)


@pytest.mark.parametrize("kind", ["tall", "wide", "repeated"])
def test_distance_is_that_of_the_singular_values_of_all_products_between_images(kind):
    x, y = golden_metrics.features("tall" if kind == "repeated" else kind)
    if kind == "repeated":  # singular, though there are more images than features
        x, y = np.tile(x, 3), np.tile(y, 3)
    x, y = x.astype(np.float64), y.astype(np.float64)
    spread = [(part - part.mean(axis=0)) / np.sqrt(len(part) - 1) for part in (x, y)]
    shared = np.linalg.svd(spread[0] @ spread[1].T, compute_uv=False).sum()
    apart = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2)
    want = apart + np.sum(spread[0] ** 2) + np.sum(spread[1] ** 2) - 2 * shared
    np.testing.assert_allclose(frechet.frechet_distance(_fit(x), _fit(y)), want, rtol=1e-12)


def test_distance_of_shifted_and_scaled_gaussians_is_the_closed_form():
    turn, deviations = _orthogonal(6), np.array([3.0, 2.0, 1.0, 0.5, 0.1, 1e-4])
    a = frechet.Gaussian(np.zeros(6), turn @ np.diag(deviations**2) @ turn.T)
    shift, scales = np.arange(6.0), np.array([2.0, 1.0, 0.5, 3.0, 1.0, 0.0])
    b = frechet.Gaussian(shift, turn @ np.diag((scales * deviations) ** 2) @ turn.T)
    want = np.sum(shift**2) + np.sum((deviations * (1 - scales)) ** 2)
    np.testing.assert_allclose(frechet.frechet_distance(a, b), want, rtol=1e-12)
    np.testing.assert_allclose(frechet.frechet_distance(b, a), want, rtol=1e-12)


def test_distance_of_gaussians_that_do_not_commute_is_by_hand():
    # 2 x 2: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), M the product of the covariances.
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    want = 2 + np.trace(a) + np.trace(b) - 2 * root
    fitted = [frechet.Gaussian(np.full(2, m), s) for m, s in ((1.0, a), (2.0, b))]
    np.testing.assert_allclose(frechet.frechet_distance(*fitted), want, rtol=1e-13)


@pytest.mark.parametrize("num", [12, 40, 300])
def test_a_set_has_no_distance_to_itself_nor_to_its_images_in_another_order(num):
    x = _RNG.normal(size=(num, 32)).astype(np.float32) ** 2
    fitted, other = _fit(x), _fit(x[np.random.default_rng(1).permutation(num)])
    trace = np.trace(fitted.covariance)
    for distance in (frechet.frechet_distance(fitted, f) for f in (fitted, other)):
        assert 0 <= distance <= 1e-13 * trace


def test_order_of_the_images_leaves_distances_where_features_outnumber_images():
    x, y = golden_metrics.features("wide")
    distances = [
        frechet.frechet_distance(_fit(x[np.random.default_rng(seed).permutation(len(x))]), _fit(y))
        for seed in range(4)
    ]
    np.testing.assert_allclose(distances, distances[0], rtol=1e-12)


def test_a_distance_is_never_negative():
    x = _RNG.normal(size=(5, 40))
    shifted = x + 1e-12
    assert 0 <= frechet.frechet_distance(_fit(x), _fit(shifted)) <= 1e-12


def test_equal_images_have_a_distance_though_their_covariance_is_zero():
    same = np.ones((4, 3), np.float32)
    assert frechet.frechet_distance(_fit(same), _fit(same)) == 0
    assert frechet.frechet_distance(_fit(same), _fit(same + 2)) == 12


def test_moments_have_the_same_bits_in_any_batches():
    x = _RNG.normal(size=(1300, 8)).astype(np.float32)
    whole = frechet.moments([x])
    for cuts in ([1], [512], [3, 511, 512, 513, 1299], range(1, 1300, 7)):
        parts = frechet.moments(np.split(x, cuts))
        assert parts.num == 1300
        assert parts.mean.tobytes() == whole.mean.tobytes()
        assert parts.scatter.tobytes() == whole.scatter.tobytes()


def test_moments_are_those_of_numpy():
    x = _RNG.normal(size=(1300, 8)).astype(np.float32)
    found = frechet.gaussian(frechet.moments([x]))
    np.testing.assert_allclose(found.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-12, atol=1e-15)
    covariance = np.cov(x.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-12, atol=1e-15)


def test_merged_moments_are_those_of_both_sets_also_far_from_zero():
    x = _RNG.normal(size=(900, 5)) + 1e6  # sums about zero would leave 4 digits
    merged = frechet.merge(frechet.moments([x[:7]]), frechet.moments([x[7:]]))
    centred = x - x.mean(axis=0)
    assert merged.num == 900
    np.testing.assert_allclose(merged.mean, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(merged.scatter, centred.T @ centred, rtol=1e-8, atol=1e-6)


def test_fewer_than_two_images_have_no_covariance():
    with pytest.raises(ValueError, match="1 images have no covariance: give 2"):
        _fit(np.ones((1, 3)))
    with pytest.raises(ValueError, match="no image to take moments of"):
        frechet.moments([])


def test_few_images_warn_and_say_whether_the_covariance_is_singular(caplog):
    _fit(_RNG.normal(size=(2048, 2)))
    assert not caplog.messages
    _fit(_RNG.normal(size=(2047, 2)))
    assert "2047 images bias" in caplog.messages[0]
    assert "full rank" not in caplog.messages[0]
    _fit(_RNG.normal(size=(8, 8)))
    assert "covariance of 8 features has not full rank" in caplog.messages[1]


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="moments of 2 images are not finite"):
        frechet.gaussian(frechet.Moments(2, np.array([1.0, np.inf]), np.eye(2)))


def test_sets_of_two_networks_are_not_compared():
    with pytest.raises(ValueError, match="cannot compare 3 features with 4"):
        frechet.frechet_distance(_fit(np.eye(5)[:, :3]), _fit(np.eye(5)[:, :4]))


def test_reference_statistics_give_the_distance_of_their_images(tmp_path):
    x, y = golden_metrics.features("tall")
    y = y.astype(np.float64)
    np.savez(tmp_path / "reference.npz", mu=y.mean(axis=0), sigma=np.cov(y, rowvar=False))
    reference = frechet.read_gaussian(tmp_path / "reference.npz", 16)
    want = frechet.frechet_distance(_fit(x), _fit(y))
    np.testing.assert_allclose(frechet.frechet_distance(_fit(x), reference), want, rtol=1e-12)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "sigma is missing"),
        ({"mu": np.zeros(4), "sigma": np.eye(2)}, r"mu has shape \(4,\).*sigma has shape \(2, 2\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "mu is not finite"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "sigma is not symmetric"),
        ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "mu is int64, expected floats"),
        ({"mu": np.array([None] * 3), "sigma": np.eye(3)}, "no .npz of plain arrays"),
    ],
)
def test_broken_reference_statistics_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        frechet.read_gaussian(tmp_path / "reference.npz", 3)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut off", b"<html>not found</html>"])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "reference.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"reference\.npz"):
        frechet.read_gaussian(tmp_path / "reference.npz", 3)
