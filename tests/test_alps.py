"""ALPS against SparseGPT, and against least squares on its own choice."""

import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax.pruning import alps
from sdprune_jax.scoring import obs
from sdprune_jax.scoring.recorder import LayerStats


def _random_layer(seed, n_in=32, n_out=24):
    """A kernel, and inputs of unequal sizes that depend on each other."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(n_in, n_in)) * np.exp(rng.normal(size=n_in))
    rows = rng.normal(size=(4 * n_in, n_in)) @ mix
    gram = jnp.asarray(rows.T @ rows, jnp.float32)
    return jnp.asarray(rng.normal(size=(n_in, n_out)), jnp.float32), LayerStats(
        gram, jnp.float32(4 * n_in)
    )


def test_it_loses_less_than_sparsegpt():
    ratios = []
    for seed in range(10):
        kernel, stats = _random_layer(seed)
        num_removed = round(0.7 * kernel.size)
        ours = alps.remove(kernel, stats, num_removed)
        theirs = obs.remove(kernel, obs.factorise(stats), num_removed, block_size=8)
        assert np.count_nonzero(~ours.keep) == np.count_nonzero(ours.kernel == 0) == num_removed
        assert ours.method == "alps"
        ratios.append(float(ours.loss / theirs.loss))
    assert np.max(ratios) < 1, ratios
    assert np.median(ratios) < 0.8, ratios


def test_what_is_kept_solves_least_squares():
    kernel, stats = _random_layer(11)
    got = alps.remove(kernel, stats, kernel.size // 2)
    w = np.asarray(kernel, np.float64)
    hessian = 2 * np.asarray(stats.moment, np.float64) / float(stats.weight)
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(len(w))
    best = np.zeros_like(w)
    for column, keep in enumerate(np.asarray(got.keep).T):
        inner = hessian[np.ix_(keep, keep)]
        best[keep, column] = np.linalg.solve(inner, hessian[keep] @ w[:, column])
    loss = lambda x: np.sum((x - w) * (hessian @ (x - w))) / 2
    np.testing.assert_allclose(got.loss, loss(np.asarray(got.kernel, np.float64)), rtol=1e-4)
    assert got.loss <= 1.0001 * loss(best)  # the search alone leaves 0.6 % more


def test_runs_of_inputs_lose_their_number():
    kernel, stats = _random_layer(12)
    got = alps.remove(kernel, stats, 3, 4)
    np.testing.assert_array_equal((~got.keep).reshape(8, 4, 24).sum(axis=1), 3)
    theirs = obs.remove(kernel, obs.factorise(stats), 3, 4, block_size=8)
    assert got.loss < theirs.loss


def test_a_choice_that_needs_no_search_is_kept():
    rng = np.random.default_rng(0)
    size = np.exp(rng.normal(size=32))
    stats = LayerStats(jnp.diag(jnp.asarray(size**2, jnp.float32)), jnp.float32(1))
    kernel, _ = _random_layer(13)
    got = alps.remove(kernel, stats, 300)  # inputs are independent: nothing compensates
    root = np.sqrt(size**2 + 0.01 * np.mean(size**2))[:, None]
    score = np.abs(np.asarray(kernel)) * root
    keep = score >= np.sort(score, axis=None)[300]
    np.testing.assert_array_equal(got.keep, keep)
    np.testing.assert_allclose(got.kernel, np.where(keep, kernel, 0), atol=1e-5)


def test_what_cannot_be_asked_is_refused():
    kernel, stats = _random_layer(0)
    with pytest.raises(ValueError, match="remove 768 of 768"):
        alps.remove(kernel, stats, 768)
    with pytest.raises(ValueError, match="pattern 1:5 does not fit 32 inputs"):
        alps.remove(kernel, stats, 1, 5)


def test_half_of_the_weights_removed_twice_is_half_of_them():
    kernel, stats = _random_layer(0)
    once = alps.remove(kernel, stats, kernel.size // 2)
    again = alps.remove(once.kernel, stats, kernel.size // 2)  # no start moves
    np.testing.assert_array_equal(again.keep, once.keep)
    np.testing.assert_allclose(again.kernel, once.kernel, rtol=1e-3, atol=1e-4)


def test_dead_inputs_leave_the_others_finite():
    kernel, stats = _random_layer(1)
    gram = stats.moment.at[:8].set(0).at[:, :8].set(0)
    got = alps.remove(kernel, LayerStats(gram, stats.weight), 8 * 24 + 1)
    assert np.isfinite(got.kernel).all()
    assert not got.keep[:8].any()
    assert np.count_nonzero(~got.keep) == 8 * 24 + 1


@pytest.mark.parametrize(("eigenvalue", "damping"), [(-0.1, 1.0), (-30.0, 1.0)])
def test_without_a_positive_gram_matrix_more_is_damped_or_magnitude_decides(eigenvalue, damping):
    rng = np.random.default_rng(2)
    vectors = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    values = np.r_[eigenvalue, np.ones(31)]
    gram = jnp.asarray(vectors * values @ vectors.T, jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(32, 24)), jnp.float32)
    got = alps.remove(kernel, LayerStats(gram, jnp.float32(2)), 384)
    assert np.count_nonzero(~got.keep) == 384
    assert got.damping == damping
    if eigenvalue > -1:
        assert (got.method, np.abs(got.kernel).max() < 20) == ("alps", True)
    else:
        assert got.method == "magnitude"
        np.testing.assert_array_equal(got.kernel[got.keep], kernel[got.keep])
