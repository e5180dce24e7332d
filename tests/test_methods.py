"""Every way to prune a component, on two layers whose statistics are made up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax import config
from sdprune_jax.pruning import methods, obs
from sdprune_jax.pruning.recorder import LayerStats

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
    section = config.PruneComponent(**settings)
    methods.check(_KERNELS, section)
    stats = _stats(methods.STATISTIC[section.method] or "moments")
    removed = methods.removed_of_each(_KERNELS, section, stats)
    found = methods.prune(_KERNELS, section, removed, stats, jax.random.key(0))
    return removed, dict(found)


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


def test_a_gram_matrix_without_a_factor_falls_back_to_magnitude(monkeypatch):
    monkeypatch.setattr(obs, "factorise", lambda stats, _: _hopeless(stats))
    _, found = _prune(sparsity=0.5, method="sparsegpt")
    _, want = _prune(sparsity=0.5)
    for path, pruned in found.items():
        assert np.isnan(pruned.loss)
        assert (~pruned.keep).sum() == (~want[path].keep).sum()
        assert abs(_KERNELS[path][~pruned.keep]).max() < abs(_KERNELS[path][pruned.keep]).min()


def _hopeless(stats):
    n_in = len(stats.moment)
    return obs.Factor(jnp.full((n_in, n_in), jnp.nan), jnp.zeros(n_in, bool), 1.0, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sparsegpt", "group": "output"}, "has its own blocks"),
        ({"method": "wanda", "threshold": "rz"}, "layer-wise magnitude only"),
        ({"allocation": "owl", "threshold": "rz"}, "uniform layer-wise magnitude only"),
        ({"allocation": "owl", "group": "component"}, "its own sparsity"),
        ({"pattern": "2:4", "sparsity": 0.4}, "set sparsity to that"),
        ({"pattern": "4:8"}, r"conv\.weight"),  # 4 channels
    ],
)
def test_what_cannot_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        methods.check(_KERNELS, config.PruneComponent(**settings))
