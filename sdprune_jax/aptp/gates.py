"""Gates from logits: noise, width gates, ordered depth gates, and their hard values.

Source: APTP, ICLR 2025 (https://arxiv.org/abs/2406.12042) and its authors' code.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from sdprune_jax.aptp.layout import Layout

TEMPERATURE, OFFSET = 0.4, 3.0  # the offset opens all gates at first
# The noise that half of all draws exceed: with it, a gate is open iff noise opens it at least as
# often as not.
MEDIAN_NOISE = -math.log(math.log(2))

# "soft" is what the published code trains with, and "hard" what its experts are.
FORWARD_GATES = ("soft", "hard")


def gumbel(uniform: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """Turns uniform numbers in [0, 1) into the noise of gates."""
    return -jnp.log(-jnp.log(uniform + 1e-20) + 1e-20)


def published_noise(num_rows: int, layout: Layout) -> Float[np.ndarray, "rows d"]:
    """Returns the noise that the published code adds in evaluation: PyTorch's, of seed 0.

    Sites that have equally many gates share it. A row has other noise than the next.
    """
    widths = (*layout.units, len(layout.depth))
    raw = np.frombuffer(np.random.RandomState(0).bytes(4 * num_rows * max(widths)), "<u4")
    stream = (raw & 0xFFFFFF).astype(np.float32) / np.float32(2**24)
    uniform = [stream[: num_rows * n].reshape(num_rows, n) for n in widths]
    return np.asarray(gumbel(np.concatenate(uniform, axis=1)))


def soft_gates(
    logits: Float[Array, "n d"], noise: Float[ArrayLike, "..."], layout: Layout
) -> Float[Array, "n d"]:
    """Returns gates in (0, 1), of which 0.5 and more count as open.

    Args:
        logits: one row an architecture vector.
        noise: draws of `gumbel` for every logit, or `MEDIAN_NOISE` for all of them.
        layout: where the gates lie in a vector.
    """
    noise = jnp.broadcast_to(noise, logits.shape)
    split = layout.num_width
    width = width_gates(logits[:, :split], noise[:, :split], layout)
    depth = depth_gates(logits[:, split:], noise[:, split:], layout)
    return jnp.concatenate([width, depth], axis=-1)


def width_gates(
    logits: Float[Array, "n w"], noise: Float[Array, "n w"], layout: Layout
) -> Float[Array, "n w"]:
    """Gumbel-sigmoid; the first gate of a site is lifted by 0.5 if none of its gates is open."""
    gates = nn.sigmoid((logits + noise + OFFSET) / TEMPERATURE)
    num_open = sum_by_site((gates >= 0.5).astype(gates.dtype), layout)
    return gates.at[:, layout.starts].add(0.5 * (num_open == 0))


def depth_gates(
    logits: Float[Array, "n k"], noise: Float[Array, "n k"], layout: Layout
) -> Float[Array, "n k"]:
    """Returns gates that open in the order of `layout.depth_order`, but for their noise.

    The logits say how many blocks stay rather than which: their softmax is that of the number of
    blocks removed, and the gate of rank r has the probability that at least r stay. Noise is given
    by rank.
    """
    at_least = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)[:, ::-1]
    at_least = jnp.minimum(at_least, 1)  # sums round up
    ranked = jnp.log(at_least + 1e-6) - jnp.log1p(1e-6 - at_least)
    ranked = nn.sigmoid((ranked + noise + OFFSET) / TEMPERATURE)
    return ranked[:, np.argsort(layout.depth_order)]


def hard(gates: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns 1 for an open gate and 0 for a closed one, with the gradient of the soft gate."""
    is_open = (gates >= 0.5).astype(gates.dtype)
    return is_open + (gates - jax.lax.stop_gradient(gates))


def forward_gates(gates: Float[Array, "b d"], kind: str) -> Float[Array, "b d"]:
    """Returns what the UNet multiplies by in training; `kind` is one of `FORWARD_GATES`."""
    assert kind in FORWARD_GATES, kind
    return hard(gates) if kind == "hard" else gates


def sum_by_site(gates: Float[Array, "n w"], layout: Layout) -> Float[Array, "n sites"]:
    """Sums the width gates of every site, without rounding if they are 0 or 1."""
    member = np.repeat(np.eye(len(layout.units), dtype=gates.dtype), layout.units, axis=0)
    return jnp.matmul(gates, member, precision="highest")
