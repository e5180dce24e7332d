"""One threshold over all layers, against sorting them laid end to end."""

import tracemalloc

import numpy as np
import pytest
from pruning_golden import W, digits

from sdprune_jax.pruning import global_threshold, scores

W2 = np.array([[0.02, -0.03, 0.01, 0.04], [0.05, -0.06, 0.9, 0.07]], np.float32)


def _stable_lowest(layers, k):
    laid = np.concatenate([x.ravel() for x in layers.values()])
    keep = np.ones(laid.size, bool)
    keep[np.argsort(laid, kind="stable")[:k]] = False
    ends = np.cumsum([x.size for x in layers.values()])
    parts = np.split(keep, ends[:-1])
    return {name: p.reshape(x.shape) for (name, x), p in zip(layers.items(), parts, strict=True)}


def _layers():
    rng = np.random.default_rng(0)
    draw = lambda *shape: abs(rng.standard_normal(shape).astype(np.float32))
    return {
        "matrix": draw(70, 50),
        "transposed": draw(50, 40).T,
        "conv": draw(3, 3, 8, 5).transpose(3, 2, 0, 1),
        "small": draw(20, 30) * 1e-12,
        "levels": np.round(draw(60, 60) * 4),
        "more_levels": np.round(draw(40, 30) * 4).T,
        "zero": np.zeros((9, 11), np.float32),
        "negative_zero": -np.zeros((9, 11), np.float32),
        "one": draw(1, 1),
    }


def test_golden_layers_share_a_threshold():
    layers = {"W": W, "W2": W2}
    for score in (scores.magnitude, scores.normalised):
        of = lambda name, score=score: score(layers[name])
        keep = dict(global_threshold.lowest(of, list(layers), 16))
        assert [int((~x).sum()) for x in keep.values()] == [9, 7]
        highest = max(of(name)[~x].max() for name, x in keep.items())
        threshold = {scores.magnitude: 0.2, scores.normalised: 0.091674}[score]
        np.testing.assert_allclose(highest, threshold, rtol=0, atol=1e-6)
        assert digits(keep["W2"]) == ["1111", "1101"]


@pytest.mark.parametrize("chunk", [2**20, 37])
def test_all_layers_together_lose_exactly_the_lowest(chunk, monkeypatch):
    monkeypatch.setattr(global_threshold, "_CHUNK", chunk)
    layers = _layers()
    size = sum(x.size for x in layers.values())
    for k in (0, 1, 150, 750, size // 3, size // 2, size - 1):  # 150 and most fall among ties
        keep = dict(global_threshold.lowest(layers.__getitem__, list(layers), k))
        assert list(keep) == list(layers)
        for name, expected in _stable_lowest(layers, k).items():
            np.testing.assert_array_equal(keep[name], expected, err_msg=f"{name} {k}")


def test_ties_go_by_index_whatever_the_order_in_memory():
    layers = {name: _layers()["more_levels"] for name in ("a", "b")}
    assert not layers["a"].flags.c_contiguous
    for k in (500, 1500, 2000):  # in the first layer, and twice in the second
        expected = _stable_lowest(layers, k)
        for name, keep in global_threshold.lowest(layers.__getitem__, list(layers), k):
            np.testing.assert_array_equal(keep, expected[name])


def test_half_precision_scores_rank_as_their_values():
    layers = {name: x.astype(np.float16) for name, x in _layers().items()}
    keep = dict(global_threshold.lowest(layers.__getitem__, list(layers), 5000))
    for name, expected in _stable_lowest(layers, 5000).items():
        np.testing.assert_array_equal(keep[name], expected)


def test_memory_does_not_grow_with_the_number_of_layers():
    def score(name):
        return np.random.default_rng(int(name)).random((512, 512), np.float32)  # 1 MiB

    names = [str(i) for i in range(40)]
    list(global_threshold.lowest(score, names[:2], 100))
    tracemalloc.start()
    zeros = sum(int((~keep).sum()) for _, keep in global_threshold.lowest(score, names, 10**6))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert zeros == 10**6
    assert peak < 10 * 2**20  # bytes; the scores are 40 MiB


def test_numbers_out_of_range_are_refused():
    for k in (-1, 24):
        with pytest.raises(ValueError, match=f"cannot remove {k} of 24"):
            list(global_threshold.lowest(lambda _: abs(W), ["a"], k))
