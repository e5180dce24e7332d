import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax.pruning import scores


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_magnitude_is_the_stored_value_without_its_sign_in_float32(dtype):
    kernel = jnp.array([[-1.5, 0.1], [-0.0, 3e-5]], dtype)
    score = scores.magnitude(kernel)
    assert score.dtype == jnp.float32
    np.testing.assert_array_equal(score, np.abs(np.asarray(kernel).astype(np.float32)))
