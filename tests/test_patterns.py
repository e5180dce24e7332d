import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pruning_golden import W, X, digits

from sdprune_jax.files import convert
from sdprune_jax.pruning import patterns, scores


def _slow(rows, n, m):
    """The definition, on torch's `[out, in]`: sort each run, ties by index, drop the first n."""
    keep = np.ones(rows.shape, bool)
    for row, kept in zip(rows, keep, strict=True):
        for start in range(0, len(row), m):
            kept[start + np.argsort(row[start : start + m], kind="stable")[:n]] = False
    return keep


def _conv(shape):
    return np.round(abs(np.random.default_rng(0).standard_normal(shape) * 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("criterion", "n", "m", "removed"),
    [
        ("magnitude", 2, 4, ["01101100", "00110110", "10101001"]),
        ("wanda", 2, 4, ["11000110", "10010011", "10100011"]),
        ("magnitude", 4, 8, ["01001101", "00110110", "00101011"]),
    ],
)
def test_golden_matrix_loses_n_of_every_m_inputs(criterion, n, m, removed):
    kernel, moment = jnp.asarray(W.T), jnp.asarray((X**2).sum(axis=0), jnp.float32)
    score = scores.wanda(kernel, moment) if criterion == "wanda" else scores.magnitude(kernel)
    assert digits(patterns.n_of_m(score, n, m).T) == removed


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (5, 8), (1, 3)])
def test_runs_of_a_convolution_are_along_the_channels_of_a_tap(n, m):
    score = _conv((3, 3, 24, 5))
    torch = convert.to_torch("a.kernel", score)  # [out, in, kh, kw]
    keep = convert.to_torch("a.kernel", np.asarray(patterns.n_of_m(score, n, m)))
    for row in range(3):
        for column in range(3):
            tap = torch[:, :, row, column]
            np.testing.assert_array_equal(keep[:, :, row, column], _slow(tap, n, m))


def test_ties_in_a_run_go_by_index():
    for value in (0.0, 0.5):
        keep = patterns.n_of_m(jnp.full((8, 3), value), 2, 4)
        assert digits(keep.T) == ["11001100"] * 3


def test_a_sharded_kernel_gets_the_pattern_of_one_device():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    score = _conv((3, 3, 16, 8))
    expected = patterns.n_of_m(score, 2, 4)
    for spec in ((None, None, "fsdp"), (None, None, "data", "fsdp"), (None, None, None, "fsdp")):
        sharded = jax.device_put(score, NamedSharding(mesh, PartitionSpec(*spec)))
        np.testing.assert_array_equal(patterns.n_of_m(sharded, 2, 4), expected)


def test_a_pattern_on_its_own_result_changes_nothing():
    kernel = jnp.asarray(_conv((3, 3, 8, 5)))
    once = jnp.where(patterns.n_of_m(kernel, 2, 4), kernel, 0)
    for n in (2, 1):  # fewer revive nothing
        again = jnp.where(patterns.n_of_m(once, n, 4), once, 0)
        np.testing.assert_array_equal(again, once)


def test_layers_whose_inputs_do_not_fill_runs_are_all_named():
    shapes = {"fine": (8, 3), "conv_in": (3, 3, 4, 320), "to_k": (10, 4), "narrow": (3, 3, 3, 8)}
    with pytest.raises(ValueError, match=r"2:4 .* multiple of 4.*: to_k \(10\), narrow \(3\)$"):
        patterns.refuse_indivisible(shapes, 2, 4)
    patterns.refuse_indivisible({"conv_in": (3, 3, 4, 320)}, 2, 4)
    with pytest.raises(ValueError, match=r"the kernel \(10\)"):
        patterns.n_of_m(jnp.ones((10, 4)), 2, 4)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 4)])
def test_removing_none_or_all_of_a_run_is_refused(n, m):
    with pytest.raises(ValueError, match=f"0 < n < m, got {n}:{m}"):
        patterns.n_of_m(jnp.ones((8, 4)), n, m)


def test_a_band_removes_the_ranks_between_its_quantiles():
    score = np.random.default_rng(0).permutation(20).astype(np.float32)[None]
    for low, high, gone in [
        (0.0, 0.35, range(7)),
        (0.35, 0.6, range(7, 12)),
        (0.9, 1.0, range(18, 20)),
        (0.5, 0.5, range(0)),
        (0.0, 0.0, range(0)),
        (0.99, 1.0, range(19, 20)),
    ]:
        removed = score[~patterns.band(score, low, high)]
        assert sorted(removed) == list(gone), (low, high)
    tied = patterns.band(np.ones((2, 5), np.float32), 0.2, 0.6)
    assert digits(tied) == ["01100", "01100"]


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.4), (-0.1, 0.5), (0.5, 1.1), (0.0, 1.0)])
def test_an_impossible_band_is_refused(low, high):
    with pytest.raises(ValueError, match="a band of quantiles"):
        patterns.band(np.ones((4, 4), np.float32), low, high)
