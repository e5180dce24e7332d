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
    """The noise of a gate, from a number in [0, 1)."""
    return -jnp.log(-jnp.log(uniform + 1e-20) + 1e-20)


def published_noise(num_rows: int, layout: Layout) -> Float[np.ndarray, "rows d"]:
    """The noise that the published code adds in evaluation: PyTorch's, seeded 0, for every site.

    Sites of as many gates share it, and a row has another than the next.
    """
    widths = (*layout.units, len(layout.depth))
    raw = np.frombuffer(np.random.RandomState(0).bytes(4 * num_rows * max(widths)), "<u4")
    stream = (raw & 0xFFFFFF).astype(np.float32) / np.float32(2**24)
    uniform = [stream[: num_rows * n].reshape(num_rows, n) for n in widths]
    return np.asarray(gumbel(np.concatenate(uniform, axis=1)))


def soft_gates(
    logits: Float[Array, "n d"],
    noise: Float[ArrayLike, "..."],
    layout: Layout,
    temperature: float = TEMPERATURE,
    offset: float = OFFSET,
) -> Float[Array, "n d"]:
    """Gates in (0, 1), of which 0.5 and more count as open.

    Args:
        logits: of the architecture vector.
        noise: of `gumbel`, of the shape of the logits, or `MEDIAN_NOISE`.
        layout: of the vector.
        temperature: of the sigmoid.
        offset: added to the logits.
    """
    noise = jnp.broadcast_to(noise, logits.shape)
    split = layout.num_width
    width = width_gates(logits[:, :split], noise[:, :split], layout, temperature, offset)
    depth = depth_gates(logits[:, split:], noise[:, split:], layout, temperature, offset)
    return jnp.concatenate([width, depth], axis=-1)


def width_gates(
    logits: Float[Array, "n w"],
    noise: Float[Array, "n w"],
    layout: Layout,
    temperature: float = TEMPERATURE,
    offset: float = OFFSET,
) -> Float[Array, "n w"]:
    """Gumbel-sigmoid; the first gate of a site is lifted by 0.5 if none of them is open."""
    gates = nn.sigmoid((logits + noise + offset) / temperature)
    num_open = sum_by_site((gates >= 0.5).astype(gates.dtype), layout)
    return gates.at[:, layout.starts].add(0.5 * (num_open == 0))


def depth_gates(
    logits: Float[Array, "n k"],
    noise: Float[Array, "n k"],
    layout: Layout,
    temperature: float = TEMPERATURE,
    offset: float = OFFSET,
) -> Float[Array, "n k"]:
    """Gates that open in the order of `layout.depth_order`, but for their noise.

    The logits say how many blocks stay rather than which: their softmax is that of the number of
    blocks removed, and the gate of rank r has the probability that at least r stay.

    Args:
        logits: of the numbers of blocks.
        noise: by rank.
        layout: has the order.
        temperature: of the sigmoid.
        offset: added to the logits.
    """
    at_least = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)[:, ::-1]
    at_least = jnp.minimum(at_least, 1)  # sums round up
    ranked = jnp.log(at_least + 1e-6) - jnp.log1p(1e-6 - at_least)
    ranked = nn.sigmoid((ranked + noise + offset) / temperature)
    return ranked[:, np.argsort(layout.depth_order)]


def hard(gates: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 for an open gate and 0 for a closed one, with the gradient of the soft gate."""
    is_open = (gates >= 0.5).astype(gates.dtype)
    return is_open + (gates - jax.lax.stop_gradient(gates))


def forward_gates(gates: Float[Array, "b d"], kind: str) -> Float[Array, "b d"]:
    """What the UNet multiplies by in training: one of `FORWARD_GATES`."""
    assert kind in FORWARD_GATES, kind
    return hard(gates) if kind == "hard" else gates


def sum_by_site(gates: Float[Array, "n w"], layout: Layout) -> Float[Array, "n sites"]:
    """Sums of width gates; site by site, without rounding if they are 0 or 1."""
    member = np.repeat(np.eye(len(layout.units), dtype=gates.dtype), layout.units, axis=0)
    return jnp.matmul(gates, member, precision="highest")
