import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pruning_golden import W, X, digits

from sdprune_jax.pruning import scores
from sdprune_jax.scoring import masks

NORMS = [0.863655, 3.482959, 8.756375, 2.036934, 4.38738, 6.809141, 0.760723, 3.433366]
MOMENTS = [0.248633, 4.043667, 25.558033, 1.383033, 6.416367, 15.4548, 0.1929, 3.929333]
CRITERIA = {  # every criterion, of a kernel [in, out] and inputs or gradients drawn for it
    "random": lambda w, _: scores.random(jax.random.key(0), "layer", w),
    "magnitude": lambda w, _: scores.magnitude(w),
    "normalised": lambda w, _: scores.normalised(w),
    "wanda": lambda w, rng: scores.wanda(w, rng.random(len(w), np.float32)),
    "taylor": lambda w, rng: scores.taylor(w, rng.standard_normal(w.shape, np.float32)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_magnitude_is_the_stored_value_without_its_sign_in_float32(dtype):
    kernel = jnp.array([[-1.5, 0.1], [-0.0, 3e-5]], dtype)
    score = scores.magnitude(kernel)
    assert score.dtype == jnp.float32
    np.testing.assert_array_equal(score, np.abs(np.asarray(kernel).astype(np.float32)))


def test_wanda_has_the_golden_scores_and_mask():
    squares = np.sum(X**2, axis=0)
    np.testing.assert_allclose(np.sqrt(squares), NORMS, rtol=0, atol=1e-6)
    np.testing.assert_allclose(squares / 3, MOMENTS, rtol=0, atol=1e-6)
    score = scores.wanda(W.T, squares.astype(np.float32)).T
    first = [0.77729, 0.348296, 3.50255, 1.425854, 0.877476, 0.340457, 0.456434, 1.03001]
    np.testing.assert_allclose(score[0], first, rtol=0, atol=1e-6)
    removed = ["11000110", "10010011", "10001011"]
    assert digits(masks.lowest_of_rows(score, 4)) == removed
    per_sample = scores.wanda(jnp.asarray(W.T), jnp.asarray(squares / 3, jnp.float32)).T
    assert digits(masks.lowest_of_rows(np.asarray(per_sample), 4)) == removed


def test_wanda_of_a_convolution_takes_the_inputs_of_its_flattened_kernel():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 4, 5), np.float32)
    moment = rng.random(36, np.float32)
    flat = scores.wanda(kernel.reshape(36, 5), moment)
    np.testing.assert_array_equal(scores.wanda(kernel, moment), flat.reshape(kernel.shape))
    by_hand = abs(kernel[2, 1, 3, 4]) * np.sqrt(moment[(2 * 3 + 1) * 4 + 3])
    np.testing.assert_allclose(scores.wanda(kernel, moment)[2, 1, 3, 4], by_hand, rtol=1e-6)


def test_inputs_that_are_always_zero_are_the_first_to_go():
    moment = np.ones(6, np.float32)
    moment[[1, 4]] = 0
    score = scores.wanda(np.random.default_rng(0).standard_normal((6, 5), np.float32), moment)
    keep = masks.lowest_of_rows(score.T, 2)
    np.testing.assert_array_equal(keep, np.broadcast_to(moment > 0, (5, 6)))


def test_taylor_is_the_change_of_a_linear_loss():
    kernel, gradient = np.float32([[2, -3], [0.5, 0]]), np.float32([[-1, 2], [4, 7]])
    np.testing.assert_array_equal(scores.taylor(kernel, gradient), [[2, 6], [2, 0]])
    half = scores.taylor(jnp.asarray(kernel, jnp.float16), jnp.asarray(gradient, jnp.float16))
    assert half.dtype == jnp.float32
    # Summed over timesteps first: what one adds, another may take away.
    np.testing.assert_array_equal(scores.taylor(kernel, gradient - gradient), 0)


def test_normalised_layers_have_norm_one_whatever_their_scale():
    rng = np.random.default_rng(0)
    for shape, scale in [((40, 30), 1e-3), ((3, 3, 8, 9), 50.0)]:
        kernel = (scale * rng.standard_normal(shape)).astype(np.float32)
        score = scores.normalised(kernel)
        np.testing.assert_allclose(np.sum(score.astype(np.float64) ** 2), 1, rtol=1e-6)
        np.testing.assert_array_equal(np.argsort(score, axis=None), np.argsort(abs(kernel), None))
    np.testing.assert_array_equal(scores.normalised(np.zeros((3, 4), np.float32)), 0)


def test_random_scores_are_uniform_and_differ_between_layers_and_keys():
    kernel = np.ones((200, 300), np.float32)
    draw = lambda seed, name: np.asarray(scores.random(jax.random.key(seed), name, kernel))
    first = draw(0, "a")
    assert first.min() > 0
    assert first.max() <= 1
    np.testing.assert_allclose(first.mean(), 0.5, atol=5e-3)
    np.testing.assert_allclose(np.sort(first, None)[::600], np.linspace(0, 1, 100), atol=0.02)
    np.testing.assert_array_equal(draw(0, "a"), first)
    for other in (draw(0, "b"), draw(1, "a")):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.02


def test_a_weight_that_draws_zero_still_ranks_above_a_zero_weight(monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda _, shape: jnp.zeros(shape))
    score = scores.random(jax.random.key(0), "a", np.float32([0, 2]))
    np.testing.assert_array_equal(score, [0, 1])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_starts_from_the_zeros_that_are_there(criterion):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((40, 30), np.float32)
    kernel[rng.random(kernel.shape) < 0.3] = 0
    score = np.asarray(CRITERIA[criterion](kernel, rng))
    assert score.dtype == np.float32
    assert np.all(score >= 0)
    keep = np.asarray(masks.lowest(jnp.asarray(score), 600))
    assert not np.any(keep & (kernel == 0))
    pruned = np.where(keep, kernel, 0)
    assert np.count_nonzero(pruned) == 600
    again = np.asarray(masks.lowest(jnp.asarray(CRITERIA[criterion](pruned, rng)), 600))
    np.testing.assert_array_equal(np.where(again, pruned, 0), pruned)


@pytest.mark.parametrize("criterion", ["random", "magnitude", "wanda", "taylor"])
def test_sharded_kernels_have_the_scores_of_one_device(criterion):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    kernel = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    of = lambda w: CRITERIA[criterion](w, np.random.default_rng(1))
    for spec in (PartitionSpec("fsdp"), PartitionSpec("data", "fsdp")):
        sharded = jax.device_put(kernel, NamedSharding(mesh, spec))
        np.testing.assert_array_equal(of(sharded), of(jnp.asarray(kernel)))
