"""Statistics by interception against stored activations."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stored_inputs

from sdprune_jax import convert
from sdprune_jax.models import layers
from sdprune_jax.pruning import recorder


class _Layers(nn.Module):
    """A layer of every kind that is calibrated."""

    @nn.compact
    def __call__(self, x, tokens):
        x = layers.conv(6, 3, name="padded")(x)
        x = layers.conv(5, 3, stride=2, padding=[(0, 1), (0, 1)], name="uneven")(nn.silu(x))
        x = nn.Conv(4, (3, 2), strides=(2, 1), padding="SAME", name="same")(x)
        x = nn.Conv(3, (2, 2), padding="VALID", name="valid")(x)
        x = layers.conv(7, 1, name="shortcut")(x)
        tokens = nn.Dense(4, name="tokens")(tokens)
        return x, nn.Dense(2, use_bias=False, name="rows")(tokens[:, 0])


SHAPES = {  # kernel, stride, padding
    "padded": ((3, 3, 4, 6), (1, 1), ((1, 1), (1, 1))),
    "uneven": ((3, 3, 6, 5), (2, 2), ((0, 1), (0, 1))),
    "same": ((3, 2, 5, 4), (2, 1), ((1, 1), (0, 1))),  # by hand, of a 3 x 4 input
    "valid": ((2, 2, 4, 3), (1, 1), ((0, 0), (0, 0))),
    "shortcut": ((1, 1, 3, 7), (1, 1), ((0, 0), (0, 0))),
    "tokens": ((5, 4), None, None),
    "rows": ((4, 2), None, None),
}


def _layers(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    scaled = lambda shape: draw(*shape) / np.float32(math.prod(shape[:-1]) ** 0.5)
    params = {name: {"kernel": scaled(shape)} for name, (shape, _, _) in SHAPES.items()}
    for name in set(SHAPES) - {"rows"}:
        params[name]["bias"] = draw(SHAPES[name][0][-1])
    return params, (draw(3, 6, 9, 4), draw(3, 7, 5)), jnp.array([1.0, 0.25, 0.0])


@pytest.mark.parametrize("statistic", recorder.STATISTICS)
def test_statistics_equal_those_of_stored_activations(statistic):
    params, args, weight = _layers()
    model = _Layers()
    want_out, stored = stored_inputs.stored(model.apply, params, *args)
    paths = [f"{name}.kernel" for name in SHAPES]
    record = jax.jit(
        lambda: recorder.apply_and_record(model.apply, params, args, paths, statistic, weight)
    )
    out, stats = record()
    jax.tree.map(stored_inputs.assert_close, out, want_out)
    assert set(stats) == set(paths)
    for name, (kernel, stride, padding) in SHAPES.items():
        x = np.asarray(stored[f"{name}.kernel"])
        rows = x if stride is None else stored_inputs.patches(x, kernel, stride, padding)
        if name == "padded":  # the rows are what the kernel multiplies
            product = rows @ params[name]["kernel"].reshape(-1, 6) + params[name]["bias"]
            stored_inputs.assert_close(
                nn.silu(product).reshape(3, 6, 9, 6), stored["uneven.kernel"]
            )
        want = stored_inputs.gram(rows, weight)
        got = stats[f"{name}.kernel"]
        stored_inputs.assert_close(got.moment, want if statistic == "gram" else np.diag(want), name)
        num_rows = np.prod(rows.shape[1:-1])
        np.testing.assert_allclose(got.weight, 1.25 * num_rows)
        stored_inputs.assert_close(
            recorder.mean_square(got), np.diag(want) / (1.25 * num_rows), name
        )


def test_only_the_layers_asked_for_are_recorded():
    params, args, weight = _layers()
    record = lambda paths: recorder.apply_and_record(
        _Layers().apply, params, args, paths, "moments", weight
    )
    assert list(record(["uneven.kernel"])[1]) == ["uneven.kernel"]
    with pytest.raises(ValueError, match=r"(?s)never calls.*a\.kernel\n  b\.kernel"):
        record(["b.kernel", "rows.kernel", "a.kernel"])


def test_features_of_a_convolution_can_be_put_in_the_order_of_torch():
    kernel = np.random.default_rng(0).normal(size=(3, 2, 5, 4))
    torch_weight = convert.to_torch("conv.kernel", kernel)
    ours = kernel.reshape(-1, 4)[recorder.torch_order(kernel.shape)]
    np.testing.assert_array_equal(ours.T, torch_weight.reshape(4, -1))


def test_a_draw_of_positions_has_no_bias_and_follows_its_key():
    params, args, weight = _layers()

    def gram(key, fraction=0.3):
        run = recorder.apply_and_record
        paths = ["padded.kernel", "uneven.kernel"]
        return run(_Layers().apply, params, args, paths, "gram", weight, fraction, key)[1]

    full = gram(None, 1.0)["padded.kernel"]
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = jax.jit(jax.vmap(gram))(keys)["padded.kernel"]
    np.testing.assert_allclose(drawn.weight, full.weight)
    spread = np.asarray(drawn.moment).std(axis=0)
    assert spread.max() > 0.1 * np.abs(full.moment).max()
    off = np.abs(np.asarray(drawn.moment).mean(axis=0) - full.moment)
    assert np.all(off <= 5 * spread / 2000**0.5 + 1e-3)
    np.testing.assert_array_equal(drawn.moment[0], jax.jit(gram)(keys[0])["padded.kernel"].moment)
