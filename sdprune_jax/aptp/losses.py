"""What the router and the experts are trained for; every loss is a scalar of a global batch.

Source: APTP, ICLR 2025 (https://arxiv.org/abs/2406.12042) and its authors' code, which alone has
`highest`, `spread`, and the split of distillation into outputs and blocks.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdprune_jax import UserError
from sdprune_jax.aptp import gates as gating
from sdprune_jax.aptp import router
from sdprune_jax.aptp.layout import Layout
from sdprune_jax.sites import macs

RESOURCE_KINDS = ("log", "absolute", "squared")


def site_shares(costs: macs.SiteMacs, layout: Layout) -> Float[np.ndarray, " sites"]:
    """Returns the share of the removable MACs that each site has, width then depth; sums to 1."""
    costs_of_sites = [costs.sites[name] for name in (*layout.width, *layout.depth)]
    return np.array(costs_of_sites) / costs.removable


def removable_budget(costs: macs.SiteMacs, macs_budget: float) -> float:
    """Returns the share of the removable MACs to keep, so that `macs_budget` of all MACs is kept.

    Raises:
        UserError: if the budget is over 1, or below what always runs.
    """
    kept = 1 - (1 - macs_budget) * costs.total / costs.removable
    always = costs.always / costs.total
    if not 0 < kept <= 1:
        raise UserError(
            f"macs_budget is the share of all MACs to keep, got {macs_budget}: expected at most 1, "
            f"and more than {always:.4f}, what runs whatever the gates are"
        )
    return kept


def total_share(kept: Float[Array, " b"], costs: macs.SiteMacs) -> Float[Array, " b"]:
    """Returns the share of all MACs that is kept with a share `kept` of the removable ones."""
    return 1 - (1 - kept) * (costs.removable / costs.total)


def kept_macs(
    gates: Float[Array, "b d"], layout: Layout, shares: Float[np.ndarray, " sites"]
) -> Float[Array, " b"]:
    """Returns the share of the removable MACs that each example keeps if its gates are hard.

    It has the gradient of the soft gates, straight through.

    Args:
        gates: soft or hard.
        layout: where the gates lie in a vector.
        shares: from `site_shares`, by either counter and at any latent size.
    """
    opened = gating.hard(gates)
    width, depth = opened[:, : layout.num_width], opened[:, layout.num_width :]
    open_share = gating.sum_by_site(width, layout) / np.array(layout.units, gates.dtype)[None]
    depth_of = np.array(layout.depth_of)
    in_block = jnp.where(depth_of[None] >= 0, depth[:, np.maximum(depth_of, 0)], 1)
    parts = jnp.concatenate([open_share * in_block, depth], axis=1)
    return jnp.sum(parts * shares.astype(gates.dtype)[None], axis=1)


def resource(kept: Float[Array, " b"], budget: float, kind: str = "log") -> Float[Array, ""]:
    """Distance of the batch's mean from the budget, both shares of the removable MACs.

    Args:
        kept: from `kept_macs`.
        budget: from `removable_budget`.
        kind: one of `RESOURCE_KINDS`; "log" is published.
    """
    assert kind in RESOURCE_KINDS, kind
    mean = kept.mean()
    if kind == "log":
        return jnp.abs(jnp.log(mean) - math.log(budget))
    return jnp.abs(mean - budget) if kind == "absolute" else (mean - budget) ** 2


def highest(kept: Float[Array, " b"]) -> Float[Array, ""]:
    """Distance of the most costly architecture of the batch from the whole UNet."""
    return 1 - kept.max()


def spread(kept: Float[Array, " b"]) -> Float[Array, ""]:
    """Minus the standard deviation of the costs in the batch; no gradient where all are equal."""
    assert kept.size > 1, "the standard deviation of one example is undefined"
    variance = jnp.var(kept, ddof=1)
    is_spread = variance > 1e-12
    return -jnp.where(is_spread, jnp.sqrt(jnp.where(is_spread, variance, 1.0)), 0.0)


def contrastive(
    features: Float[Array, "b d"],
    embeddings: Float[Array, "b n"],
    temperature: float = 0.03,
    scale: float = 1.0,
) -> Float[Array, ""]:
    """Makes the architectures of a batch as alike as its prompts are.

    Binary cross-entropy between rows of softmaxed cosine similarities, over all pairs, each prompt
    with itself included.

    Args:
        features: `router.features` of the prompts' own gates.
        embeddings: embeddings of the prompts.
        temperature: divides the similarities of architectures, and those of prompts.
        scale: factor of the loss. The published training averages, over its n devices, gradients
            that each cover the device's own rows: it trains on 1 / n of this loss.
    """
    normalise = router.normalise
    cosines = lambda x: jnp.matmul(normalise(x), normalise(x).T, precision="highest")
    target = jax.nn.softmax(cosines(jax.lax.stop_gradient(embeddings)) / temperature)
    log_p = jax.nn.log_softmax(cosines(features) / temperature)
    # log(1 - p) and its gradient need a p below 1; both logs end at -100 as in PyTorch.
    p = jnp.minimum(jnp.exp(log_p), 1 - jnp.finfo(log_p.dtype).epsneg)
    entropy = target * jnp.maximum(log_p, -100) + (1 - target) * jnp.log1p(-p)
    return -scale * entropy.mean()


def code_pull(
    prompt_features: Float[Array, "b d"],
    code_features: Float[Array, "k d"],
    assignment: Int[Array, " b"],
) -> Float[Array, ""]:
    """Moves codes toward the prompts assigned to them; the published method has no such loss.

    Returns:
        Mean over the prompts of 1 minus the cosine; only codes get its gradient.
    """
    prompts = router.normalise(jax.lax.stop_gradient(prompt_features))
    codes = router.normalise(code_features)[assignment]
    return 1 - jnp.mean(jnp.sum(prompts * codes, axis=1))
