"""The cliff finder, on curves whose cliff is known."""

import functools
import itertools
import math

import numpy as np
import pytest

from sdprune_jax.metrics import clip_score, paired
from sdprune_jax.sweep import cliff


def _counted(curve):
    asked = []

    def evaluate(sparsity):
        asked.append(sparsity)
        return curve(sparsity)

    return evaluate, asked


@pytest.mark.parametrize("edge", [0.05, 0.31, 0.6180339, 0.9])
def test_a_step_is_found_within_the_tolerance_in_as_few_steps_as_bisection_takes(edge):
    evaluate, asked = _counted(lambda sparsity: float(sparsity >= edge))
    found = cliff.bisect(evaluate, 0.0, 1.0, 1 / 64)
    assert found.whole < edge <= found.broken
    assert 0 < found.broken - found.whole <= 1 / 64
    assert len(asked) == 2 + 6  # both ends, and 64 = 2^6
    assert all(sparsity == round(sparsity, 6) for sparsity in asked)


def test_a_smooth_curve_breaks_where_it_crosses_the_limit():
    found = cliff.bisect(lambda sparsity: sparsity**2, 0.0, 1.0, 1e-4, limit=0.25)
    assert found.whole == pytest.approx(0.5, abs=1e-4)
    assert cliff.bisect(lambda s: s, 0.0, 1.0, 1e-5).whole == 0.5  # at the limit is not above it


def test_a_curve_that_crosses_thrice_still_gives_a_crossing():
    curve = lambda s: float(0.2 < s < 0.3 or s > 0.77)
    found = cliff.bisect(curve, 0.0, 1.0, 1e-3)
    assert curve(found.whole) < 0.5 < curve(found.broken)
    assert found.broken - found.whole <= 1e-3


@pytest.mark.parametrize(
    ("share", "low", "high", "tolerance", "message"),
    [
        (0.0, 0.1, 0.9, 0.01, "no break between sparsity 0.1 and 0.9: 0.9 is whole still"),
        (1.0, 0.1, 0.9, 0.01, "no break between sparsity 0.1 and 0.9: 0.1 is broken already"),
        (math.nan, 0.1, 0.9, 0.01, "quality at sparsity 0.1 is no number"),
        (0.0, 0.9, 0.1, 0.01, "expected low < high"),
        (0.0, 0.1, 0.9, 0.0, "tolerance is 0, expected more than 0"),
    ],
)
def test_no_break_is_an_error(share, low, high, tolerance, message):
    with pytest.raises(ValueError, match=message):
        cliff.bisect(lambda _: share, low, high, tolerance)


def test_an_unreachable_tolerance_ends_at_the_last_decimal():
    found = cliff.bisect(lambda s: float(s > 0.3), 0.0, 1.0, 1e-12)
    assert (found.whole, found.broken) == (0.3, 0.300001)


def test_the_bracket_is_at_the_first_break_of_what_was_tried():
    shares = {0.6: 0.9, 0.0: 0.0, 0.2: 0.1, 0.3: 0.7, 0.4: 0.2}
    assert cliff.bracket(shares, 0.5) == (0.2, 0.3)
    assert cliff.bracket(shares, 0.8) == (0.4, 0.6)
    assert cliff.bracket(shares, 0.95) == (0.6, None)
    with pytest.raises(cliff.NoBreakError, match=r"lowest sparsity, 0\.2, is broken"):
        cliff.bracket({0.2: 0.6, 0.3: 0.1}, 0.5)


def test_the_way_to_chance_does_not_mind_which_way_is_better():
    agreement = functools.partial(cliff.way_to_chance, higher_is_better=True)
    distance = functools.partial(cliff.way_to_chance, higher_is_better=False)
    assert agreement(0.25, 0.3, 0.2) == pytest.approx(0.5)
    assert agreement(0.32, 0.3, 0.2) == pytest.approx(-0.2)  # better than dense
    assert distance(0.5, 0.0, 2.0) == 0.25
    for dense, chance in ((0.2, 0.2), (0.2, 0.3)):
        with pytest.raises(cliff.NoBreakError, match="no quality to lose"):
            agreement(0.1, dense, chance)
    with pytest.raises(ValueError, match="not finite"):
        distance(0.1, 0.2, math.nan)


def test_spread_is_half_the_distance_of_all_pairs():
    x = np.random.default_rng(0).normal(1, 2, (7, 2, 3, 4)).astype(np.float32)
    pairs = [paired.mse(x[[i]], x[[j]])[0] for i, j in itertools.combinations(range(7), 2)]
    assert cliff.spread([x[:4], x[4:]]) == pytest.approx(np.mean(pairs) / 2, rel=1e-9)


def test_mismatched_agreement_is_that_of_all_pairs():
    x, y = np.random.default_rng(0).normal(size=(2, 5, 8))
    cosines = x @ y.T
    want = cosines[~np.eye(5, dtype=bool)].mean()
    assert clip_score.mismatched(x, y) == pytest.approx(want, rel=1e-12)
