"""The forms for a CPU compute what the plain ones do, and so do their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax.models import products


def _draw(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def _agree(form, plain, inputs, like, tolerance=2e-6):
    """Outputs and gradients of every input, by a relative error of the whole array."""
    for calls in (lambda f: f(*inputs), lambda f: jax.vjp(f, *inputs)[1](like)):
        found, expected = (
            jax.tree.leaves(jax.jit(calls, static_argnums=0)(f)) for f in (form, plain)
        )
        for x, y in zip(found, expected, strict=True):
            error = jnp.linalg.norm((x - y).ravel()) / jnp.linalg.norm(y.ravel())
            assert error < tolerance


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_by_product(stride):
    padding = [(1, 1)] * 2 if stride == 1 else [(0, 1)] * 2
    plain = lambda x, kernel: jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    by_product = lambda x, kernel: products.conv_by_product(x, kernel, stride, padding)
    like = _draw(2, 4 // stride, 4 // stride, 5)
    _agree(by_product, plain, (_draw(2, 4, 4, 3), _draw(3, 3, 3, 5)), like)


def test_attention_by_products():
    keys = 30 * _draw(2, 7, 3, 4)  # so that exp of the logits overflows
    inputs = (_draw(2, 5, 3, 4), keys, _draw(2, 7, 3, 4))
    both = products.attention_by_products, jax.nn.dot_product_attention
    _agree(*both, inputs, _draw(2, 5, 3, 4), tolerance=1e-4)
    low = [x.astype(jnp.bfloat16) for x in inputs]
    found, expected = (attend(*low) for attend in both)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, expected)), atol=0.03)


def test_a_dense_layer_of_many_axes():
    layer, x = products.dense(6), _draw(2, 3, 4, 5)
    params = layer.init(jax.random.key(0), x)
    plain = lambda x, kernel: x @ kernel
    own = lambda x, kernel: layer.apply({"params": params["params"] | {"kernel": kernel}}, x)
    _agree(own, plain, (x, params["params"]["kernel"]), _draw(2, 3, 4, 6))
