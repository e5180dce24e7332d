"""The codes of a router: where they start, and when they learn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sdprune_jax.aptp import router
from sdprune_jax.aptp.gates import MEDIAN_NOISE, soft_gates
from sdprune_jax.aptp.layout import Layout

Seeds = Callable[[Any], Float[Array, "k d"]]  # from the parameters of the predictor to codes
_SEEDING_ROUNDS = 10


class OptimizerState(NamedTuple):
    """Steps done, and Adam's moments of both parts, which count the steps that a part learned."""

    count: Int[Array, ""]
    predictor: optax.OptState
    codes: optax.OptState


def make_optimizer(
    learning_rate: float,
    ramp_steps: int,
    warmup_steps: int,
    seeds: Seeds | None = None,
) -> optax.GradientTransformation:
    """Adam whose rate is constant after a linear ramp, and whose codes rest during the warm-up.

    Args:
        learning_rate: rate after the ramp.
        ramp_steps: steps of the ramp.
        warmup_steps: steps in which the predictor alone learns.
        seeds: returns where the codes start, from the parameters of the predictor: the last step of
            the warm-up puts them there. None leaves them where they are.
    """
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    ramp = optax.linear_schedule(0.0, learning_rate, ramp_steps)
    rate_at = ramp if ramp_steps else optax.constant_schedule(learning_rate)

    def init(params: Any) -> OptimizerState:
        zero = jnp.zeros((), jnp.int32)
        return OptimizerState(zero, adam.init(params["predictor"]), adam.init(params["codes"]))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, OptimizerState]:
        assert params is not None
        rate, learns = jnp.asarray(rate_at(state.count + 1)), state.count >= warmup_steps
        heads, predictor = adam.update(updates["predictor"], state.predictor)
        heads = jax.tree.map(lambda move: -rate * move, heads)
        move, codes = adam.update(updates["codes"], state.codes)
        move = jax.tree.map(lambda move: jnp.where(learns, -rate * move, 0.0), move)
        codes = jax.tree.map(lambda new, old: jnp.where(learns, new, old), codes, state.codes)
        if seeds is not None:
            move = jax.lax.cond(
                state.count == warmup_steps - 1,
                lambda: seeds(optax.apply_updates(params["predictor"], heads)) - params["codes"],
                lambda: move,
            )
        moves = {"predictor": heads, "codes": move}
        return moves, OptimizerState(state.count + 1, predictor, codes)

    return optax.GradientTransformation(init, update)


def seeds(
    embeddings: Float[Array, "rows n"], num_codes: int, layout: Layout, predictor: Any
) -> Float[Array, "k d"]:
    """Returns the codes of `seed_codes` for prompts of which the embeddings are given."""
    logits = router.predict({"predictor": predictor}, embeddings, layout)
    return seed_codes(logits, num_codes, layout)


def seed_codes(
    logits: Float[Array, "rows d"], num_codes: int, layout: Layout
) -> Float[Array, "k d"]:
    """Returns the mean logits of groups of prompts whose architectures are alike.

    Groups start at prompts that are far apart, and have about equally many: they are balanced as in
    training.

    Source: the start is that of k-means++ (SODA 2007) less its chance; the published code has
        random codes, whose gates are all open, and so all alike.
    """
    gates = soft_gates(logits, MEDIAN_NOISE, layout)
    between = router.cosines(gates, gates, layout)
    chosen = [jnp.argmax(between.sum(axis=1))]  # the most usual prompt
    while len(chosen) < num_codes:
        chosen.append(jnp.argmin(between[:, jnp.stack(chosen)].max(axis=1)))
    codes = logits[jnp.stack(chosen)]

    def improve(_: Any, codes: Float[Array, "k d"]) -> Float[Array, "k d"]:
        similarity = router.cosines(gates, soft_gates(codes, MEDIAN_NOISE, layout), layout)
        sharp = similarity / (0.1 * similarity.std() + 1e-6)
        group = jnp.argmax(router.sinkhorn(sharp, 1.0, 20), axis=1)
        member = jax.nn.one_hot(group, num_codes)
        counts = member.sum(axis=0)[:, None]
        mean = jnp.matmul(member.T, logits, precision="highest") / jnp.maximum(counts, 1)
        return jnp.where(counts > 0, mean, codes)

    return jax.lax.fori_loop(0, _SEEDING_ROUNDS, improve, codes)
