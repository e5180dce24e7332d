"""The compensating solver against golden numbers, a slow definition, and least squares."""

import jax.numpy as jnp
import numpy as np
import pytest
from pruning_golden import W, X

from sdprune_jax.scoring import masks, obs
from sdprune_jax.scoring.recorder import LayerStats
from sdprune_jax.slicing import units

# Checked against the authors' implementations, which remove one weight a block beyond the half.
SPARSEGPT = [  # half of the weights, in one block
    [0, 0, 0.440627, -0.587355, 0, 0, 0, 0.30915],
    [0, 0.839495, -0.220465, 0, -0.466106, 0.233925, 0, -0.409303],
    [0, -0.596077, 0, 0.419153, 0, 0.69993, 0, 0],
]
GOLDEN = {  # kernel, loss, squared error of the outputs
    "one block": (SPARSEGPT, 1.025162, 2.7290),
    "two blocks": (
        [*SPARSEGPT[:2], [0, -0.596077, 0, 0, 0, 0.652708, 0, 0]],
        1.258067,
        3.3470,
    ),
    "2:4": (
        [
            [0, 0, 0.440627, -0.587355, 0.153813, 0, 0, 0.264438],
            [0, 0.839495, -0.220465, 0, -0.466106, 0.233925, 0, 0],
            [0, -0.596077, 0, 0.419153, 0, 0.69993, 0.371699, 0],
        ],
        1.488613,
        4.0194,
    ),
}
KERNEL = jnp.asarray(W.T, jnp.float32)


def _stats(rows, weight):
    rows = np.asarray(rows, np.float64)
    return LayerStats(jnp.asarray(rows.T @ rows, jnp.float32), jnp.float32(weight))


def _solve(case):
    factor = obs.factorise(_stats(X, 3))
    if case == "2:4":
        return obs.remove(KERNEL, factor, 2, 4, block_size=8)
    size, num_removed = {"one block": (128, 13), "two blocks": (4, 14)}[case]
    return obs.remove(KERNEL, factor, num_removed, block_size=size)


@pytest.mark.parametrize("case", GOLDEN)
def test_sparsegpt_gives_the_golden_kernels(case):
    kernel, loss, error = GOLDEN[case]
    got = _solve(case)
    np.testing.assert_allclose(got.kernel.T, kernel, atol=1e-6)
    np.testing.assert_array_equal(got.keep.T, np.array(kernel) != 0)
    np.testing.assert_allclose(got.loss, loss, atol=1e-6)
    got_error = obs.output_error(KERNEL, got.kernel, _stats(X, 3))
    np.testing.assert_allclose(got_error, error, atol=5.1e-5)
    assert (got.method, got.damping) == ("obs", 0.01)


def test_the_factor_is_the_golden_one():
    upper = obs.factorise(_stats(X, 3)).upper
    diagonal = [1.623161, 0.40007, 0.184145, 0.756311, 0.303475, 0.188531, 1.375104, 0.353515]
    np.testing.assert_allclose(np.diag(upper), diagonal, atol=1e-6)
    np.testing.assert_array_equal(np.tril(upper, -1), 0)


def test_obs_diff_weighs_timesteps_as_in_the_golden_kernel():
    alphas = np.array([1.2, 1.0523719014, 0.8])  # of three calls
    rows = np.sqrt(np.repeat(alphas, 4))[:, None] * X
    got = obs.remove(KERNEL, obs.factorise(_stats(rows, alphas.sum())), 13)
    want = [
        [0, 0, 0.443026, -0.566233, 0, 0, 0, 0.319928],
        [0, 0.839965, -0.221514, 0, -0.466114, 0.231659, 0, -0.412384],
        [0, -0.596626, 0, 0.444829, 0, 0.704548, 0, 0],
    ]
    np.testing.assert_allclose(got.kernel.T, want, atol=1e-6)
    np.testing.assert_allclose(got.loss, 1.088269, atol=1e-6)


def test_the_errors_of_other_methods_are_the_golden_ones():
    for removed, error in [
        ("01001101 00110110 00101011", 8.9055),  # magnitude
        ("11000110 10010011 10001011", 3.1613),  # Wanda
        ("01101100 00110110 10101001", 21.5499),  # magnitude, 2:4
        ("11000110 10010011 10100011", 4.2384),  # Wanda, 2:4
    ]:
        keep = np.array([[digit == "0" for digit in row] for row in removed.split()]).T
        got = obs.output_error(KERNEL, jnp.where(keep, KERNEL, 0), _stats(X, 3))
        np.testing.assert_allclose(got, error, atol=5.1e-5)


def test_one_input_is_removed_as_in_the_golden_kernel():
    got = units.remove(KERNEL, obs.factorise(_stats(X, 3)), 1, 1)
    want = [
        [0.762071, -0.164073, 0.391015, -0.723686, 0.206844, 0.021022, 0, 0.282661],
        [-0.277012, 0.810679, -0.198502, 0.153948, -0.501141, 0.25483, 0, -0.44711],
        [0.299426, -0.573494, 0.116705, 0.641315, -0.07749, 0.739375, 0, 0.013642],
    ]
    np.testing.assert_allclose(got.kernel.T, want, atol=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(~np.asarray(got.keep)), [6])
    np.testing.assert_allclose(got.loss, 0.140145 / 2, atol=1e-6)


def test_removing_each_input_costs_its_golden_score():
    factor = obs.factorise(_stats(X, 3))
    want = [0.388097, 4.630117, 4.502737, 1.25522, 1.969781, 10.842472, 0.140145, 1.701311]
    for i, score in enumerate(want):
        others = np.where(np.arange(8) == i, 1, 100)  # dearer, so that this one goes
        got = units.remove(KERNEL * others[:, None].astype(np.float32), factor, 1, 1)
        np.testing.assert_array_equal(np.flatnonzero(~np.asarray(got.keep)), [i])
        np.testing.assert_allclose(2 * got.loss, score, rtol=1e-6, atol=5e-7)  # as written


def _random_layer(seed, n_in=20, n_out=6):
    """A kernel, and inputs of unequal sizes that depend on each other."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(n_in, n_in)) * np.exp(rng.normal(size=n_in))
    rows = rng.normal(size=(4 * n_in, n_in)) @ mix
    return jnp.asarray(rng.normal(size=(n_in, n_out)), jnp.float32), _stats(rows, len(rows))


def _slow(kernel, stats, per_block, size, n_of_m=None):
    """SparseGPT by its formulas, in float64: the explicit inverse, one column after another."""
    w, gram = np.asarray(kernel, np.float64).T.copy(), np.asarray(stats.moment, np.float64)
    hessian = 2 * gram / float(stats.weight)
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    keep, loss = np.ones(w.shape, bool), 0.0
    for j in range(w.shape[1]):
        if n_of_m is None and j % size == 0:
            score = w[:, j : j + size] ** 2 / np.diag(upper)[j : j + size] ** 2
            order = np.argsort(score, axis=None)[: per_block[j // size]]
            keep[:, j : j + size][np.unravel_index(order, score.shape)] = False
        elif n_of_m is not None and j % n_of_m[1] == 0:
            n, m = n_of_m
            score = w[:, j : j + m] ** 2 / np.diag(upper)[j : j + m] ** 2
            for row, order in zip(keep, np.argsort(score, axis=1), strict=True):
                row[j + order[:n]] = False
        error = np.where(keep[:, j], 0, w[:, j]) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
        loss += (error**2).sum() / 2
    return np.where(keep, w, 0).T, keep.T, loss


def test_blocks_and_what_is_left_over_agree_with_the_slow_definition():
    kernel, stats = _random_layer(0)  # 20 inputs: blocks of 8, 8 and 4
    got = obs.remove(kernel, obs.factorise(stats), 61, block_size=8)
    want, keep, loss = _slow(kernel, stats, [24, 24, 13], 8)
    np.testing.assert_array_equal(got.keep, keep)
    np.testing.assert_allclose(got.kernel, want, atol=2e-5)
    np.testing.assert_allclose(got.loss, loss, rtol=1e-4)


def test_runs_of_inputs_agree_with_the_slow_definition():
    kernel, stats = _random_layer(1)
    got = obs.remove(kernel, obs.factorise(stats), 3, 4, block_size=8)
    want, keep, loss = _slow(kernel, stats, None, 8, (3, 4))
    np.testing.assert_array_equal(got.keep, keep)
    np.testing.assert_allclose(got.kernel, want, atol=2e-5)
    np.testing.assert_allclose(got.loss, loss, rtol=1e-4)


@pytest.mark.parametrize("num_removed", [0, 1, 60, 61, 119])
def test_exactly_as_many_weights_go_as_asked(num_removed):
    kernel, stats = _random_layer(2)
    got = obs.remove(kernel, obs.factorise(stats), num_removed, block_size=8)
    assert np.count_nonzero(got.kernel == 0) == np.count_nonzero(~got.keep) == num_removed


def test_compensation_beats_wanda_and_wanda_beats_magnitude():
    ordered, ratios = [], []
    for seed in range(20):
        kernel, stats = _random_layer(seed, 64, 32)
        root = jnp.sqrt(jnp.diagonal(stats.moment))[:, None]
        magnitude = jnp.where(masks.lowest(jnp.abs(kernel), 1024), kernel, 0)
        rank = jnp.argsort(jnp.argsort(jnp.abs(kernel) * root, axis=0), axis=0)
        wanda = jnp.where(rank >= 32, kernel, 0)
        sparsegpt = obs.remove(kernel, obs.factorise(stats), 1024, block_size=16).kernel
        errors = [float(obs.output_error(kernel, x, stats)) for x in (sparsegpt, wanda, magnitude)]
        ordered.append(errors == sorted(errors))
        ratios.append(errors[0] / errors[1])
    assert np.mean(ordered) >= 0.9, ordered
    assert np.median(ratios) < 0.7, ratios


def test_dead_inputs_lose_their_weights_first_and_disturb_nothing():
    kernel, stats = _random_layer(3)
    alive = np.setdiff1d(np.arange(20), [0, 9])
    dead = stats.moment.at[jnp.array([0, 9])].set(0).at[:, jnp.array([0, 9])].set(0)
    factor = obs.factorise(stats._replace(moment=dead))
    np.testing.assert_array_equal(np.flatnonzero(factor.dead), [0, 9])
    got = obs.remove(kernel, factor, 42, block_size=32)
    assert np.count_nonzero(~got.keep) == 42
    np.testing.assert_array_equal(got.kernel[jnp.array([0, 9])], 0)
    few = obs.remove(kernel, factor, 5, block_size=32)
    np.testing.assert_array_equal(few.keep, np.isin(np.arange(20), alive)[:, None] & few.keep)
    np.testing.assert_array_equal(few.kernel[alive], kernel[alive])
    unit = units.remove(kernel, factor, 5, 1)
    np.testing.assert_array_equal(unit.kernel[jnp.array([0, 9])], 0)
    silent = obs.factorise(stats._replace(moment=jnp.zeros((20, 20))))
    assert silent.is_positive
    np.testing.assert_array_equal(obs.remove(kernel, silent, 5).kernel, 0)


def test_zeros_are_preserved_and_counted():
    kernel, stats = _random_layer(4)
    factor = obs.factorise(stats)
    first = obs.remove(kernel, factor, 30, block_size=8)
    more = obs.remove(first.kernel, factor, 70, block_size=8)
    assert np.count_nonzero(~more.keep) == 70
    assert not np.any(more.keep & ~first.keep)
    again = obs.remove(first.kernel, factor, 10, block_size=8)
    np.testing.assert_array_equal(again.keep, first.keep)
    np.testing.assert_allclose(again.kernel, first.kernel, atol=1e-6)
    runs = obs.remove(first.kernel, factor, 2, 4, block_size=8)
    assert not np.any(runs.keep & ~first.keep)
    assert np.all((~runs.keep).reshape(5, 4, 6).sum(axis=1) >= 2)


def test_damping_rises_until_the_matrix_can_be_factorised_and_says_so():
    kernel, _ = _random_layer(5)
    values = np.linspace(1, 3, 20)
    values[3] = -0.1  # a tenth is needed
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 20)))[0]
    gram = lambda values: jnp.asarray(basis * values @ basis.T, jnp.float32)
    raised = obs.factorise(LayerStats(gram(values), jnp.float32(1)))
    assert raised.is_positive
    np.testing.assert_allclose(raised.damping, 0.1)
    assert obs.remove(kernel, raised, 60).damping == raised.damping

    values[3] = -30  # more than its diagonal can bear
    useless = obs.factorise(LayerStats(gram(values), jnp.float32(1)))
    assert not useless.is_positive
    assert useless.damping == 1
    got = obs.remove(kernel, useless, 60)
    assert got.method == "magnitude"
    assert np.isnan(got.loss)
    keep = masks.lowest(jnp.abs(kernel), 60)
    np.testing.assert_array_equal(got.kernel, jnp.where(keep, kernel, 0))
    runs = obs.remove(kernel, useless, 2, 4)
    order = np.argsort(np.abs(kernel).reshape(5, 4, 6), axis=1)
    assert not np.any(np.take_along_axis(np.asarray(runs.keep).reshape(5, 4, 6), order, 1)[:, :2])
    assert np.count_nonzero(runs.keep) == 60
    unit = units.remove(kernel, useless, 4, 2)
    norms = (np.asarray(kernel).reshape(5, -1) ** 2).sum(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(~unit.keep), np.sort(np.argsort(norms)[:2]))
    assert unit.method == "magnitude"


def test_one_sample_is_enough():
    kernel, _ = _random_layer(6)
    stats = _stats(np.random.default_rng(0).normal(size=(1, 20)), 1)
    got = obs.remove(kernel, obs.factorise(stats), 60, block_size=8)
    assert got.method == "obs"
    magnitude = jnp.where(masks.lowest(jnp.abs(kernel), 60), kernel, 0)
    error = obs.output_error(kernel, got.kernel, stats)
    assert float(error) < 0.1 * float(obs.output_error(kernel, magnitude, stats))


def test_units_go_in_the_order_of_their_true_cost_and_the_rest_is_least_squares():
    kernel, stats = _random_layer(7)
    w = np.asarray(kernel, np.float64)
    hessian = 2 * np.asarray(stats.moment, np.float64) / float(stats.weight)
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(20)

    def without(removed):
        """The best kernel whose rows of these units are 0, and half its squared error."""
        gone = np.repeat(np.isin(np.arange(5), removed), 4)
        best = np.zeros_like(w)
        inner = hessian[np.ix_(~gone, ~gone)]
        best[~gone] = w[~gone] + np.linalg.solve(inner, hessian[np.ix_(~gone, gone)] @ w[gone])
        change = best - w
        return best, np.sum(change * (hessian @ change)) / 2

    removed = []
    for count in (1, 2, 3):
        losses = {u: without([*removed, u])[1] for u in range(5) if u not in removed}
        removed.append(min(losses, key=losses.__getitem__))
        got = units.remove(kernel, obs.factorise(stats), 4, count)
        np.testing.assert_array_equal(np.flatnonzero(~got.keep), sorted(removed))
        want, loss = without(removed)
        np.testing.assert_allclose(got.kernel, want, atol=1e-4)
        np.testing.assert_allclose(got.loss, loss, rtol=1e-4)


def test_what_cannot_be_asked_is_refused():
    kernel, stats = _random_layer(0)
    factor = obs.factorise(stats)
    with pytest.raises(ValueError, match=r"remove 120 of 120"):
        obs.remove(kernel, factor, 120)
    with pytest.raises(ValueError, match=r"pattern 1:3 does not fit 20 inputs"):
        obs.remove(kernel, factor, 1, 3)
    with pytest.raises(ValueError, match=r"pattern 4:4 does not fit"):
        obs.remove(kernel, factor, 4, 4)
    with pytest.raises(ValueError, match=r"remove 5 units of 4 from 20 inputs"):
        units.remove(kernel, factor, 4, 5)
    with pytest.raises(ValueError, match=r"remove 1 units of 3 from 20 inputs"):
        units.remove(kernel, factor, 3, 1)
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 0"):
        obs.factorise(stats, 0.0)
    with pytest.raises(ValueError, match="statistic `gram`"):
        obs.factorise(LayerStats(jnp.ones(20), jnp.float32(1)))
