"""The codes of a router: where they start, and when they learn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sdprune_jax import config
from sdprune_jax.aptp import router
from sdprune_jax.aptp.gates import MEDIAN_NOISE, soft_gates
from sdprune_jax.aptp.layout import Layout

_SEEDING_ROUNDS = 10


class OptimizerState(NamedTuple):
    """Steps done, and the moments of both parts, each of the steps that it has learned in."""

    count: Int[Array, ""]
    predictor: optax.OptState
    codes: optax.OptState


def make_optimizer(
    section: config.Router, seeds: Callable[[Any], Float[Array, "k d"]] | None
) -> optax.GradientTransformation:
    """Adam, constant after a linear ramp, whose moments of the codes start after the warm-up.

    Args:
        section: rates and steps.
        seeds: from the parameters of the predictor, where the codes start: they are put there by
            the last step of the warm-up. None leaves them where they are.
    """
    adam, warmup = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8), section.warmup_steps
    ramp = optax.linear_schedule(0.0, section.learning_rate, section.ramp_steps)
    rate_at = ramp if section.ramp_steps else optax.constant_schedule(section.learning_rate)

    def init(params: Any) -> OptimizerState:
        zero = jnp.zeros((), jnp.int32)
        return OptimizerState(zero, adam.init(params["predictor"]), adam.init(params["codes"]))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, OptimizerState]:
        assert params is not None
        rate, learns = jnp.asarray(rate_at(state.count + 1)), state.count >= warmup
        heads, predictor = adam.update(updates["predictor"], state.predictor)
        heads = jax.tree.map(lambda move: -rate * move, heads)
        move, codes = adam.update(updates["codes"], state.codes)
        move = jax.tree.map(lambda move: jnp.where(learns, -rate * move, 0.0), move)
        codes = jax.tree.map(lambda new, old: jnp.where(learns, new, old), codes, state.codes)
        if seeds is not None:
            move = jax.lax.cond(
                state.count == warmup - 1,
                lambda: seeds(optax.apply_updates(params["predictor"], heads)) - params["codes"],
                lambda: move,
            )
        moves = {"predictor": heads, "codes": move}
        return moves, OptimizerState(state.count + 1, predictor, codes)

    return optax.GradientTransformation(init, update)


def seeds(
    embeddings: Float[Array, "rows n"], num_codes: int, layout: Layout, predictor: Any
) -> Float[Array, "k d"]:
    """`seed_codes` of the prompts of some embeddings."""
    logits = router.predict({"predictor": predictor}, embeddings, layout)
    return seed_codes(logits, num_codes, layout)


def seed_codes(
    logits: Float[Array, "rows d"], num_codes: int, layout: Layout
) -> Float[Array, "k d"]:
    """Mean logits of groups of prompts, of about one size, that are alike in their architectures.

    Groups start at prompts that are far apart, and are balanced as in training.

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
