"""How evenly prompts are shared among experts, what that costs, and how to make both right."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

from sdprune_jax import UserError
from sdprune_jax.aptp import router
from sdprune_jax.aptp.records import SplitRecord

_EPSILONS = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005)  # from soft plans to hard ones
_ITERATIONS = 100


def offsets(similarity: Float32[np.ndarray, "rows k"]) -> Float32[np.ndarray, " k"]:
    """Returns what to add to the similarity of each code for about equally many prompts a code.

    Plans of `router.potentials` are balanced as a whole but their largest shares are not, unless
    they are nearly hard; then, sums take longer to settle. The best of several plans is taken.

    Args:
        similarity: similarities of many prompts, which stand for those to come.

    Raises:
        UserError: if a similarity is not finite.
    """
    if not np.isfinite(similarity).all():
        bad = np.count_nonzero(~np.isfinite(similarity).all(axis=1))
        raise UserError(
            f"the similarities of {bad} prompts are not finite: the router, or an embedding, is"
            " damaged; train the router again"
        )
    k = similarity.shape[1]
    ideal, candidates = len(similarity) / k, [np.zeros(k, np.float32)]
    for epsilon in _EPSILONS:
        of_codes = router.potentials(jnp.asarray(similarity), epsilon, _ITERATIONS)
        candidates.append(np.asarray(epsilon * (of_codes - of_codes.mean()), np.float32))
    uneven = [
        np.abs(np.bincount((similarity + added).argmax(axis=1), minlength=k) - ideal).max()
        for added in candidates
    ]
    return np.round(candidates[int(np.argmin(uneven))], 6)


def fit_budget(
    keep_at: Callable[[Float[np.ndarray, "n 1"]], Bool[np.ndarray, "k d"]],
    shares_of: Callable[[Bool[np.ndarray, "k d"]], Float[np.ndarray, " n"]],
    budget: float,
    num_shifts: int,
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, "k d"]]:
    """Shifts logits until a budget is kept as closely as gates allow, by bisection.

    Args:
        keep_at: returns the gates that are open at some shifts; larger shifts open more.
        shares_of: returns the shares of all MACs that gates keep, each by its own shift alone.
        budget: what every share should be.
        num_shifts: 1 for all codes together, or the number of codes.

    Returns:
        The shifts, and the gates at them.
    """
    miss = lambda shift: shares_of(keep_at(shift[:, None])) - budget
    low, high = np.full(num_shifts, -20.0), np.full(num_shifts, 20.0)
    for _ in range(40):
        middle = (low + high) / 2
        is_over = miss(middle) > 0
        low, high = np.where(is_over, low, middle), np.where(is_over, middle, high)
    ends = np.stack([np.zeros(num_shifts), low, high])
    best = np.abs([miss(end) for end in ends]).argmin(axis=0)
    shift = ends[best, np.arange(num_shifts)]
    return shift, keep_at(shift[:, None])


def figures(
    expert: Int32[np.ndarray, " rows"],
    kept: Float[np.ndarray, " k"],
    budget: float,
    labels: Mapping[str, Int[np.ndarray, " rows"]],
) -> SplitRecord:
    """Says how prompts are shared among experts, and what MACs the average prompt keeps.

    Few prompts share information with any label by chance: with shuffled labels, it is that alone.

    Args:
        expert: the expert of each prompt.
        kept: share of all MACs that each expert keeps.
        budget: what the average prompt should keep.
        labels: `style` and `group` of each prompt, where they are known.
    """
    counts = np.bincount(expert, minlength=len(kept))
    share = counts / max(counts.sum(), 1)
    macs, information = float(share @ kept), {}
    for name, label in labels.items():
        shuffled = np.random.default_rng(0).permutation(label)
        information[f"information_{name}"] = mutual_information(expert, label)
        information[f"information_{name}_shuffled"] = mutual_information(expert, shuffled)
    return SplitRecord(
        prompts=counts.tolist(),
        largest_share=float(share.max()),
        smallest_share=float(share.min()),
        dead=np.flatnonzero(counts == 0).tolist(),
        macs=macs,
        macs_over_budget=macs / budget - 1,
        **information,
    )


def mutual_information(a: Int[np.ndarray, " rows"], b: Int[np.ndarray, " rows"]) -> float:
    """Returns the nats that two labellings of the same rows tell of each other."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    expected = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    has = joint > 0
    return float((joint[has] * np.log(joint[has] / expected[has])).sum())


def differences(keep: Bool[np.ndarray, "k d"]) -> float:
    """Returns the share of gates in which two experts differ, over all pairs of experts."""
    k = len(keep)
    if k < 2:
        return 0.0
    return float((keep[:, None] != keep[None]).mean(axis=2).sum() / (k * (k - 1)))
