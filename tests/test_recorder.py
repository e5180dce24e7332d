"""Statistics by interception against stored activations."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stored_inputs
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pruning_golden import X

from sdprune_jax.models import products
from sdprune_jax.scoring import recorder, settings


class _Layers(nn.Module):
    """A layer of every kind that is calibrated."""

    @nn.compact
    def __call__(self, x, tokens):
        x = products.conv(6, 3, name="padded")(x)
        x = products.conv(5, 3, stride=2, padding=[(0, 1), (0, 1)], name="uneven")(nn.silu(x))
        x = nn.Conv(4, (3, 2), strides=(2, 1), padding="SAME", name="same")(x)
        x = nn.Conv(3, (2, 2), padding="VALID", name="valid")(x)
        x = products.conv(7, 1, name="shortcut")(x)
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


@pytest.mark.parametrize("statistic", ["moments", "gram"])
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


def test_the_golden_layer_has_the_golden_moments():
    apply, path = nn.Sequential([nn.Dense(3)]).apply, "layers_0.kernel"
    params = {"layers_0": {"kernel": np.zeros((8, 3)), "bias": np.zeros(3)}}
    x = X.reshape(3, 4, 8).astype(np.float32)

    def moment(statistic, weight):
        weight = jnp.asarray(weight, jnp.float32)
        found = recorder.apply_and_record(apply, params, (x,), [path], statistic, weight)[1]
        return np.asarray(found[path].moment)

    uniform = [0.497267, 8.087333, 51.116067, 2.766067, 12.832733, 30.9096, 0.3858, 7.858667]
    later_less = [0.52946, 8.011347, 49.049039, 2.865103, 13.886137, 30.117548, 0.383989, 8.103367]
    alphas = settings.timestep_weights(3, "log_decreasing")  # every sample is a call
    for weight, want in [(np.ones(3), uniform), (alphas, later_less)]:
        gram, squares = (moment(statistic, weight) for statistic in ("gram", "moments"))
        for found in (np.diag(gram), squares):
            np.testing.assert_allclose(2 / weight.sum() * found, want, rtol=1e-6, atol=5e-7)
        want = 2 / weight.sum() * stored_inputs.gram(x, weight)
        np.testing.assert_allclose(2 / weight.sum() * gram, want, rtol=0, atol=1e-5)


class _Apart(nn.Module):
    """Layers that all read the inputs of the model."""

    @nn.compact
    def __call__(self, image, tokens):
        products.conv(6, 3, name="padded")(image)
        products.conv(5, 3, stride=2, padding=[(0, 1), (0, 1)], name="uneven")(image)
        nn.Conv(4, (3, 2), strides=(2, 1), padding="SAME", name="same")(image)
        return nn.Dense(4, name="tokens")(tokens)


@pytest.mark.parametrize("statistic", ["moments", "gram"])
def test_statistics_of_whole_numbers_have_the_same_bits_on_one_device_and_on_eight(statistic):
    rng = np.random.default_rng(0)  # sums of whole numbers do not round, in whatever order
    args = tuple(
        rng.integers(-9, 10, shape).astype(np.float32) for shape in ((8, 6, 9, 4), (8, 7, 5))
    )
    weight = np.float32([1, 4, 0, 9, 1, 4, 16, 1])  # whose roots are whole too
    shapes = {
        "padded": (3, 3, 4, 6),
        "uneven": (3, 3, 4, 5),
        "same": (3, 2, 4, 4),
        "tokens": (5, 4),
    }
    params = {name: {"kernel": np.ones(x), "bias": np.zeros(x[-1])} for name, x in shapes.items()}

    def stats(num_devices):
        mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",))
        placed = jax.device_put((args, weight), NamedSharding(mesh, PartitionSpec("data")))
        paths = [f"{name}.kernel" for name in shapes]
        run = recorder.apply_and_record
        return jax.jit(
            lambda args, weight: run(_Apart().apply, params, args, paths, statistic, weight)[1]
        )(*placed)

    one, eight = stats(1), stats(8)
    for name in shapes:
        path = f"{name}.kernel"
        np.testing.assert_array_equal(eight[path].moment, one[path].moment, err_msg=name)
        assert float(eight[path].weight) == float(one[path].weight)
    want = stored_inputs.gram(args[1], weight)
    want = want if statistic == "gram" else np.diag(want)
    np.testing.assert_array_equal(eight["tokens.kernel"].moment, want)


def test_layers_that_read_nothing_or_what_is_not_finite_are_all_named():
    good = recorder.LayerStats(jnp.ones(3), jnp.float32(2))
    stats = {"fine": good, "silent": good._replace(weight=jnp.float32(0))}
    stats["infinite"] = good._replace(moment=jnp.array([1, np.inf, 1]))
    stats["gram"] = good._replace(moment=jnp.diag(jnp.array([1, np.nan, 1])))
    with pytest.raises(ValueError, match="calibration failed") as error:
        recorder.checked(stats)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "gram read values that are not finite",
        "infinite read values that are not finite",
        "silent read nothing",
    ]
    dead = {"dead": good._replace(moment=jnp.zeros(3))}
    assert recorder.checked(dead) is dead  # an input may always be 0


def test_only_the_layers_asked_for_are_recorded():
    params, args, weight = _layers()
    record = lambda paths: recorder.apply_and_record(
        _Layers().apply, params, args, paths, "moments", weight
    )
    assert list(record(["uneven.kernel"])[1]) == ["uneven.kernel"]
    with pytest.raises(ValueError, match=r"(?s)never calls.*a\.kernel\n  b\.kernel"):
        record(["b.kernel", "rows.kernel", "a.kernel"])


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
