"""Every way to prune a component, on two layers whose statistics are made up."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruning_golden import W, X, digits

from sdprune_jax import config
from sdprune_jax.config import checks
from sdprune_jax.files import convert
from sdprune_jax.pruning import request, scores, selection
from sdprune_jax.pruning.component import prune_component
from sdprune_jax.pruning.methods import (
    ALPS,
    STATISTIC,
    Magnitude,
    Method,
    Override,
    Random,
    SparseGPT,
    Taylor,
    Wanda,
)
from sdprune_jax.scoring import obs
from sdprune_jax.scoring.recorder import LayerStats

_RNG = np.random.default_rng(0)
_SHAPES = {"layers.0.fc1.kernel": (16, 6), "conv.kernel": (3, 3, 4, 5)}
_KERNELS = {p: _RNG.normal(size=shape).astype(np.float32) for p, shape in _SHAPES.items()}
_KERNELS["conv.kernel"] *= 10  # of another scale


def _inputs(path):
    n_in = np.prod(_SHAPES[path][:-1])
    return np.random.default_rng(int(n_in)).normal(size=(200, n_in)) @ np.diag(
        np.linspace(0.1, 3, n_in)
    )


def _stats(statistic):
    found = {}
    for path in _SHAPES:
        x = _inputs(path)
        moment = np.mean(x**2, axis=0) * len(x) if statistic == "moments" else x.T @ x
        found[path] = LayerStats(jnp.asarray(moment, jnp.float32), jnp.float32(len(x)))
    return found


def _prune(**settings):
    method = Method(**{"method": "magnitude"} | settings)
    request.check(_KERNELS, method)
    stats = _stats(STATISTIC[method.method] or "moments")
    removed = selection.removed_of_each(_KERNELS, method, stats)
    found = selection.prune(_KERNELS, method, removed, stats, jax.random.key(0))
    return removed, dict(found)


@pytest.mark.parametrize(
    ("settings", "removed"),
    [
        ({}, ["01001101", "00110110", "00101011"]),  # a tie goes to the lower index in torch
        ({"threshold": "rz"}, ["01001101", "10110110", "00101011"]),  # the tie goes too
        ({"group": "output"}, ["01001101", "00110110", "00101011"]),
        ({"method": "wanda"}, ["11000110", "10010011", "10001011"]),
    ],
)
def test_the_golden_matrix_loses_what_its_torch_weight_would(settings, removed):
    method = Method(**{"method": "magnitude"} | settings)
    kernels = {"a.kernel": np.ascontiguousarray(W.T)}
    moment = jnp.asarray((X**2).sum(axis=0), jnp.float32)
    stats = {"a.kernel": LayerStats(moment, jnp.float32(3))}
    found = selection.removed_of_each(kernels, method, stats)
    ((_, pruned),) = selection.prune(kernels, method, found, stats, jax.random.key(0))
    assert digits(pruned.keep.T) == removed


def test_ties_in_a_convolution_go_by_index_of_its_torch_weight():
    kernels = {"conv.kernel": np.ones((3, 3, 4, 5), np.float32)}
    method = Magnitude(0.5)
    found = selection.removed_of_each(kernels, method, {})
    ((path, pruned),) = selection.prune(kernels, method, found, {}, jax.random.key(0))
    assert found == {"conv.kernel": 90}
    np.testing.assert_array_equal(convert.to_torch(path, pruned.keep).ravel(), np.arange(180) >= 90)


_EVERY_WAY = [
    Random(),
    Magnitude(),
    Magnitude(threshold="rz"),
    Magnitude(group="output"),
    Magnitude(group="component"),
    Magnitude(group="normalised"),
    Magnitude(allocation="owl", owl_multiple=1.5),
    Wanda(),
    Taylor(),
    SparseGPT(),
    ALPS(),
]


def _component(kernels, method, sparsity=0.5, seed=0):
    """The kernels as pruned, and the record."""
    method = dataclasses.replace(method, scope="linear+conv", sparsity=sparsity)
    if method.method == "taylor":
        rng = np.random.default_rng(seed)
        stats = {p: rng.normal(size=x.shape).astype(np.float32) for p, x in kernels.items()}
    else:
        stats = _stats(STATISTIC[method.method] or "moments")
    calibrate = lambda _, layers, __: [(layers, stats)]
    return prune_component(kernels, "unet", method, calibrate, seed=seed)


@pytest.mark.parametrize("method", _EVERY_WAY, ids=str)
def test_a_sparsity_of_zero_or_below_one_weight_changes_no_bit(method):
    kernels = {path: kernel.copy() for path, kernel in _KERNELS.items()}
    kernels["conv.kernel"][0, 0, 0, 0] = -0.0
    for sparsity in (0.0, 0.003):  # of 276 weights
        flat, done = _component(kernels, method, sparsity)
        for path, kernel in kernels.items():
            assert flat[path].tobytes() == kernel.tobytes()
        assert done.zeros == 1  # as before


@pytest.mark.parametrize("method", _EVERY_WAY[:-1], ids=str)  # not alps, which fits all anew
def test_what_is_sparse_already_is_pruned_to_itself_and_recorded_as_it_is(method):
    once, _ = _component(_KERNELS, method)
    for sparsity in (0.5, 0.3):  # a lower one revives nothing
        again, done = _component(once, method, sparsity, seed=1)
        for path, kernel in once.items():
            np.testing.assert_array_equal(again[path], kernel)
        assert done.requested == sparsity
        zeros = sum(int((kernel == 0).sum()) for kernel in once.values())
        assert done.zeros == done.zeros_before == zeros
        assert done.of_prunable == pytest.approx(zeros / 276)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("solver", [SparseGPT, ALPS])
def test_solvers_give_no_weight_back_to_what_is_sparse_already(solver, pattern):
    sparse, rng = {}, np.random.default_rng(3)
    for path, kernel in _KERNELS.items():
        sparse[path] = np.where(rng.random(kernel.shape) < 0.6, 0, kernel)
        sparse[path][..., 0] = 0  # more than any share of it
    again, done = _component(sparse, solver(pattern=pattern))
    for path, kernel in sparse.items():
        assert np.isfinite(again[path]).all()
        assert not again[path][kernel == 0].any()
    assert done.zeros >= done.zeros_before > 0.55 * 276


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("allocation", ["uniform", "owl"])
def test_layers_together_lose_exactly_what_was_asked(method, allocation):
    group = None if method == "sparsegpt" else "layer"
    removed, found = _prune(
        sparsity=0.45, method=method, allocation=allocation, group=group, owl_multiple=1.5
    )
    assert sum(removed.values()) == int(0.45 * (16 * 6 + 9 * 4 * 5))
    assert {path: int((~pruned.keep).sum()) for path, pruned in found.items()} == removed
    assert (allocation == "owl") == (removed["layers.0.fc1.kernel"] != int(0.45 * 96))


def test_wanda_removes_the_same_share_of_every_output():
    _, found = _prune(sparsity=0.4, method="wanda")
    for path, pruned in found.items():
        n_in = _KERNELS[path][..., 0].size
        removed = (~pruned.keep).reshape(n_in, -1).sum(axis=0)
        assert (removed == int(0.4 * n_in)).all()


def test_a_component_shares_one_threshold_and_norms_even_its_layers_out():
    _, found = _prune(sparsity=0.3, group="component")
    magnitudes = np.concatenate([abs(_KERNELS[p][~found[p].keep]) for p in _SHAPES])
    kept = np.concatenate([abs(_KERNELS[p][found[p].keep]) for p in _SHAPES])
    assert magnitudes.max() <= kept.min()
    share = lambda found: np.mean(~found["conv.kernel"].keep)
    _, normalised = _prune(sparsity=0.3, group="normalised")
    assert share(found) < 0.15 < share(normalised)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_a_pattern_leaves_two_of_four_inputs(method):
    _, found = _prune(sparsity=0.5, method=method, pattern="2:4")
    runs = found["layers.0.fc1.kernel"].keep.reshape(4, 4, 6)
    assert (runs.sum(axis=1) == 2).all()
    assert (found["conv.kernel"].keep.sum(axis=2) == 2).all()  # of the 4 channels of a tap


def _error(path, pruned):
    kernel = _KERNELS[path] if pruned.kernel is None else pruned.kernel
    change = (_KERNELS[path] - kernel * pruned.keep).reshape(-1, kernel.shape[-1])
    return float(np.sum((_inputs(path) @ change) ** 2))


def test_compensation_beats_wanda_and_wanda_magnitude_in_the_outputs_of_layers():
    errors = {
        method: _prune(sparsity=0.5, method=method)[1]
        for method in ("magnitude", "wanda", "sparsegpt", "alps")
    }
    for path in _SHAPES:
        magnitude, wanda, sparsegpt, alps = (_error(path, found[path]) for found in errors.values())
        assert max(sparsegpt, alps) < wanda < magnitude
        reported = errors["sparsegpt"][path].loss
        assert reported == pytest.approx(sparsegpt / 200, rel=0.1)  # but for the damping


def test_the_record_says_what_was_asked_and_what_the_outputs_lost():
    own = (Override("conv", 0.1),)
    method = SparseGPT(0.25, scope="linear+conv", overrides=own)
    parts = [([path], {path: stats}) for path, stats in _stats("gram").items()]
    flat, done = prune_component(_KERNELS, "unet", method, lambda *_: parts)
    assert done.overrides == own
    assert done.zeros == 69
    assert done.band is None
    for path, row in zip(flat, done.layers, strict=True):
        x, n_out = _inputs(path), _SHAPES[path][-1]
        before, after = (x @ kernels[path].reshape(-1, n_out) for kernels in (_KERNELS, flat))
        want = np.sum((before - after) ** 2) / np.sum(before**2)
        assert row.output_error == pytest.approx(want, rel=1e-4)
        assert row.zeros == {"layers.0.fc1": 51, "conv": 18}[row.name]


def test_a_sparsity_in_percent_of_some_layers_gets_the_fraction():
    part = config.PruneComponent(overrides=(config.Override("*.ff.*", 35.0),))
    with pytest.raises(ValueError, match=r"overrides\[0\]\.sparsity is 35.*so 35 % is 0\.35"):
        checks.check(config.Run(prune=config.Prune(unet=part)))


def test_a_gram_matrix_without_a_factor_falls_back_to_magnitude(monkeypatch, caplog):
    monkeypatch.setattr(obs, "factorise", lambda stats, _: _hopeless(stats))
    with caplog.at_level(logging.WARNING, "absl"):
        _, done = _component(_KERNELS, SparseGPT())
    assert [row.loss for row in done.layers] == [None, None]
    assert [row.damping for row in done.layers] == [1.0, 1.0]
    assert [message.split(":")[0] for message in caplog.messages] == list(_KERNELS)
    assert all("damping 1, so by magnitude" in message for message in caplog.messages)
    _, found = _prune(sparsity=0.5, method="sparsegpt")
    _, want = _prune(sparsity=0.5)
    for path, pruned in found.items():
        assert np.isnan(pruned.loss)
        assert (~pruned.keep).sum() == (~want[path].keep).sum()
        assert abs(_KERNELS[path][~pruned.keep]).max() < abs(_KERNELS[path][pruned.keep]).min()


def _hopeless(stats):
    n_in = len(stats.moment)
    return obs.Factor(jnp.full((n_in, n_in), jnp.nan), jnp.zeros(n_in, bool), 1.0, False)


def test_layers_with_a_sparsity_of_their_own_leave_the_rest_to_the_others():
    own = (Override("conv", 0.1), Override("*", 0.6))
    with pytest.raises(
        ValueError, match=r"0\.2717 is the lowest .* and 0\.2717 more than the high"
    ):
        _prune(sparsity=0.45, overrides=own)  # 18 and 57 of 276
    for method in ("magnitude", "wanda", "sparsegpt"):
        removed, found = _prune(sparsity=0.25, method=method, group=None, overrides=own[:1])
        assert removed == {"layers.0.fc1.kernel": 69 - 18, "conv.kernel": 18}
        if method != "wanda":  # which rounds every output down
            assert {path: int((~x.keep).sum()) for path, x in found.items()} == removed
    removed, _ = _prune(
        sparsity=0.25, allocation="owl", owl_multiple=1.5, overrides=(Override("layers*"),)
    )
    assert removed == {"layers.0.fc1.kernel": 0, "conv.kernel": 69}


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_a_layer_left_alone_stays_as_it_is_and_follows_no_pattern(name):
    own = (Override("conv"),)  # whose 4 channels make no run of 8
    method = Method(name, pattern="4:8", overrides=own)
    request.check(_KERNELS, method)
    stats = _stats(STATISTIC[name] or "moments")
    removed = selection.removed_of_each(_KERNELS, method, stats)
    found = dict(selection.prune(_KERNELS, method, removed, stats, jax.random.key(0)))
    assert found["conv.kernel"].keep.all()
    assert found["conv.kernel"].kernel is None
    runs = found["layers.0.fc1.kernel"].keep.reshape(2, 8, 6)
    assert (runs.sum(axis=1) == 4).all()
    sizes = {path: kernel.size for path, kernel in _KERNELS.items()}
    assert request.num_removed(sizes, method) == 48


def test_overrides_hold_for_layers_that_are_pruned_in_parts():
    method = Magnitude(0.25, overrides=(Override("conv", 0.1),))
    sizes = {path: kernel.size for path, kernel in _KERNELS.items()}
    for path in _SHAPES:
        part = {path: _KERNELS[path]}
        removed = selection.removed_of_each(part, method, {}, sizes)
        assert removed == {path: {"layers.0.fc1.kernel": 51, "conv.kernel": 18}[path]}


def test_a_band_removes_what_lies_between_two_quantiles_of_layers_or_of_outputs():
    _, found = _prune(sparsity=0.3, band=(0.5, 0.8))
    for path, pruned in found.items():
        order = np.argsort(np.abs(_KERNELS[path]), axis=None)
        n = order.size
        gone = np.flatnonzero(~pruned.keep)
        assert set(gone) == set(order[int(0.5 * n) : n * 8 // 10])
    _, found = _prune(sparsity=0.25, method="wanda", band=(0.75, 1.0))
    stats = _stats("moments")
    for path, pruned in found.items():
        score = scores.wanda(_KERNELS[path], np.asarray(stats[path].moment))
        rows = convert.to_torch(path, score).reshape(score.shape[-1], -1)
        keep = convert.to_torch(path, pruned.keep).reshape(rows.shape)
        assert ((~keep).sum(axis=1) == rows.shape[1] // 4).all()
        assert (
            np.min(rows, axis=1, where=~keep, initial=np.inf)
            >= np.max(rows, axis=1, where=keep, initial=0)
        ).all()


def test_the_error_of_a_solver_is_that_of_the_outputs_it_changes():
    for method in ("sparsegpt", "alps"):
        _, found = _prune(sparsity=0.5, method=method)
        for path, pruned in found.items():
            kernel = _KERNELS[path].reshape(-1, _SHAPES[path][-1])
            whole = np.sum((_inputs(path) @ kernel) ** 2)
            assert pruned.output_error == pytest.approx(_error(path, pruned) / whole, rel=1e-4)
    zero = np.zeros((16, 6), np.float32)
    assert obs.relative_error(zero, zero, _stats("gram")["layers.0.fc1.kernel"]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "row"}, "group is 'row', expected one of"),
        ({"method": "sparsegpt", "group": "output"}, "has its own blocks"),
        ({"method": "wanda", "threshold": "rz"}, "layer-wise magnitude only"),
        ({"allocation": "owl", "threshold": "rz"}, "uniform layer-wise magnitude only"),
        ({"allocation": "owl", "group": "component"}, "its own sparsity"),
        ({"pattern": "2:4", "sparsity": 0.4}, "set sparsity to that"),
        ({"pattern": "4:8"}, r"conv\.weight"),  # 4 channels
        ({"overrides": (Override("cnov"),)}, "cnov matches none of the 2 .* did you mean conv"),
        ({"overrides": (Override("conv"),), "group": "component"}, "give layers their own"),
        ({"overrides": (Override("conv"),), "threshold": "rz"}, "uniform layer-wise magnitude"),
        ({"overrides": (Override("conv"),)}, "0.5 is out of reach: 1 of 2 layers"),
        ({"band": (0.4, 0.2)}, r"band=\(0.4, 0.2\) is no \(low, high\)"),
        ({"band": (0.0, 1.0)}, "less than all"),
        ({"band": (0.3,)}, r"is no \(low, high\)"),
        ({"band": (0.8, 0.9)}, "removes 0.1; set sparsity to that"),
        ({"band": (0.2, 0.7), "method": "alps"}, "alps, which has no scores"),
        ({"band": (0.2, 0.7), "group": "component"}, "group=component compares layers"),
        ({"band": (0.2, 0.7), "pattern": "2:4"}, "no pattern, allocation or overrides"),
    ],
)
def test_what_cannot_go_together_is_refused(settings, message):
    method = Magnitude()
    for name, value in settings.items():  # unlike the constructor, without a check of types
        object.__setattr__(method, name, value)
    with pytest.raises(ValueError, match=message):
        request.check(_KERNELS, method)
