"""The router: from the embedding of a prompt to gates of the UNet, and to one of K codes.

An architecture predictor gives the logits of all gates, for each prompt; a codebook holds those of
K experts. Noise makes soft gates of either, in (0, 1). A prompt goes to the code whose gates
resemble its own most, balanced over the batch. In the published method, which is what the defaults
give, the UNet takes the gates of the prompt itself while the predictor warms up, and those of its
code from then on. So the codes learn from the UNet and the budget, and the predictor, after its
warm-up, from the contrastive loss alone.

Source: APTP, ICLR 2025 (https://arxiv.org/abs/2406.12042) and its authors' code.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key

from sdprune_jax.aptp.gates import MEDIAN_NOISE, gumbel, hard, soft_gates
from sdprune_jax.aptp.layout import Layout

EPSILON, ITERATIONS = 0.05, 3  # the published balance: softness of the plan, and its rounds


class ArchitecturePredictor(nn.Module):
    """A linear head for every width site, and one for all depth gates, side by side.

    The heads share their input, so that they are the columns of one matrix, in the vector's order.
    """

    size: int

    @nn.compact
    def __call__(self, embeddings: Float[Array, "b n"]) -> Float[Array, "b d"]:
        return nn.Dense(self.size, precision="highest", name="heads")(embeddings)


class Routing(NamedTuple):
    """How the prompts of a batch are routed; all gates are soft."""

    # What the UNet takes: the gates of the prompt itself, or those of its code.
    gates: Float[Array, "b d"]
    prompt_gates: Float[Array, "b d"]  # the gates that the predictor gives each prompt
    code_gates: Float[Array, "k d"]  # the gates of every code
    # Cosine of each prompt's gates with each code's; no gradient passes.
    similarity: Float[Array, "b k"]
    assignment: Int[Array, " b"]  # code of each prompt


def init_params(layout: Layout, embedding_dim: int, num_codes: int, seed: int) -> dict[str, Any]:
    """Makes a new router: every head orthogonal on its own, the codes orthonormal, biases 0."""
    rng = np.random.default_rng(seed)
    widths = (*layout.units, len(layout.depth))
    kernel = np.concatenate([_orthogonal(rng, embedding_dim, n) for n in widths], axis=1)
    heads = {"kernel": kernel, "bias": np.zeros(layout.size, np.float32)}
    codes = _orthogonal(rng, num_codes, layout.size)
    return {"predictor": {"heads": heads}, "codes": codes}


def route(
    params: Mapping[str, Any],
    embeddings: Float[Array, "b n"],
    key: Key[Array, ""],
    layout: Layout,
    *,
    warms_up: ArrayLike,
    optimal_transport: bool = True,
    epsilon: float = EPSILON,
) -> Routing:
    """Routes the prompts of a training batch.

    The balance is over the whole batch, however it is sharded, when a jitted function calls this.

    Args:
        params: from `init_params`.
        embeddings: prompts as their encoder pools them, not normalised.
        key: draws the noise. Matching draws its own, apart from that of `prompt_gates`.
        layout: where the UNet's gates lie in a vector.
        warms_up: bool, may be traced: whether prompts still lend their own gates.
        optimal_transport: balance the assignment, or give each prompt its nearest code.
        epsilon: softness of the balanced plan; see `sinkhorn`.
    """
    keys = jax.random.split(key, 3)
    logits = predict(params, embeddings, layout)
    codes = params["codes"]

    def draw(key: Key[Array, ""], logits: Float[Array, "n d"]) -> Float[Array, "n d"]:
        uniform = jax.random.uniform(key, logits.shape, logits.dtype)
        return soft_gates(logits, gumbel(uniform), layout)

    prompt_gates, code_gates = draw(keys[0], logits), draw(keys[1], codes)
    similarity = jax.lax.stop_gradient(cosines(draw(keys[2], logits), code_gates, layout))
    plan = sinkhorn(similarity, epsilon) if optimal_transport else similarity
    assignment = jnp.argmax(plan, axis=-1)
    gates = jnp.where(warms_up, prompt_gates, code_gates[assignment])
    return Routing(gates, prompt_gates, code_gates, similarity, assignment)


def match(
    params: Mapping[str, Any],
    embeddings: Float[Array, "b n"],
    layout: Layout,
    *,
    code_gates: Float[Array, "k d"] | None = None,
    noise: Float[ArrayLike, "..."] = MEDIAN_NOISE,
) -> Float[Array, "b k"]:
    """Compares prompts with codes without chance: the largest of a row is the prompt's expert.

    By default a prompt's row depends on nothing but the prompt. The published code adds noise that
    depends on the row a prompt has in its batch, and compares with the codes' gates of its last
    training step.

    Args:
        params: from `init_params`.
        embeddings: prompts as their encoder pools them.
        layout: where the UNet's gates lie in a vector.
        code_gates: soft gates of the codes; None computes them without noise.
        noise: added to the logits of prompts; `gates.published_noise` is the published one.
    """
    gates = soft_gates(predict(params, embeddings, layout), noise, layout)
    if code_gates is None:
        code_gates = soft_gates(params["codes"], MEDIAN_NOISE, layout)
    return cosines(gates, code_gates, layout)


def predict(
    params: Mapping[str, Any], embeddings: Float[Array, "b n"], layout: Layout
) -> Float[Array, "b d"]:
    """Returns the logits of all gates of each prompt."""
    apply: Any = ArchitecturePredictor(layout.size).apply
    return apply({"params": params["predictor"]}, embeddings)


def features(gates: Float[Array, "n d"], layout: Layout) -> Float[Array, "n d"]:
    """Returns the vectors in which architectures are compared.

    Gates are hard, but for those inside a block that can be removed: these are soft, times the soft
    gate of the block. Every site weighs the same whatever its number of gates.
    """
    owner = np.repeat(layout.depth_of, layout.units)
    split = layout.num_width
    open_or_not = hard(gates)
    in_block = gates[:, :split] * gates[:, split:][:, np.maximum(owner, 0)]
    width = jnp.where(owner[None] >= 0, in_block, open_or_not[:, :split])
    scale = np.repeat(np.array(layout.units, gates.dtype) ** -0.5, layout.units)
    return jnp.concatenate([width * scale[None], open_or_not[:, split:]], axis=-1)


def cosines(
    gates: Float[Array, "b d"], code_gates: Float[Array, "k d"], layout: Layout
) -> Float[Array, "b k"]:
    """Cosine similarity of the features of prompts and codes."""
    prompts, codes = (normalise(features(part, layout)) for part in (gates, code_gates))
    return jnp.matmul(prompts, codes.T, precision="highest")


def normalise(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def sinkhorn(
    similarity: Float[Array, "b k"], epsilon: float = EPSILON, iterations: int = ITERATIONS
) -> Float[Array, "b k"]:
    """Shares each prompt among the codes, so that all codes get about equally much.

    Rows sum to 1. So few iterations leave the codes uneven, and the largest share of each row even
    more so.

    Source: SwAV, NeurIPS 2020, section 3.1 (https://arxiv.org/abs/2006.09882).
    """
    return jax.nn.softmax(similarity / epsilon + potentials(similarity, epsilon, iterations)[None])


def potentials(
    similarity: Float[Array, "b k"], epsilon: float = EPSILON, iterations: int = ITERATIONS
) -> Float[Array, " k"]:
    """Returns what `sinkhorn` adds to the logits `similarity / epsilon` of each code.

    Potentials of many prompts balance the assignment of others, one by one.
    """
    logits = similarity / epsilon
    of_prompts = jnp.zeros_like(logits[:, 0])
    of_codes = jnp.zeros_like(logits[0])
    for _ in range(iterations):
        of_codes = -jax.nn.logsumexp(logits + of_prompts[:, None], axis=0)
        of_prompts = -jax.nn.logsumexp(logits + of_codes[None], axis=1)
    return of_codes


def _orthogonal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random, with orthonormal columns, or rows where these are fewer."""
    draw = rng.normal(size=(max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(draw)
    q = (q * np.sign(np.diag(r))[None]).astype(np.float32)
    return q if rows >= columns else np.ascontiguousarray(q.T)
