"""How many weights each layer loses, from the sparsity of all together."""

import bisect
import difflib
import fnmatch
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Float

from sdprune_jax import UserError
from sdprune_jax.scoring.masks import num_removed

Sparsity = float | Fraction

_BLOCK = re.compile(r".*?\.(?:layers|attentions|resnets|downsamplers|upsamplers)\.\d+(?=\.)")
_LOWEST, _HIGHEST = Fraction("0.01"), Fraction("0.99")  # sparsity of a group, by OWL


def uniform(sizes: Mapping[str, int], sparsity: Sparsity) -> dict[str, int]:
    """The same sparsity in every layer, and the floor of `sparsity` over all of them together.

    Ramesh and Zhao round every layer down, which `each_floored` does.
    """
    return counts(sizes, dict.fromkeys(sizes, sparsity))


def each_floored(sizes: Mapping[str, int], sparsity: Sparsity) -> dict[str, int]:
    """The floor of the same sparsity in every layer.

    Source: the authors' code of Ramesh and Zhao 2024 (https://arxiv.org/abs/2411.15113).
    """
    return {name: num_removed(size, sparsity) for name, size in sizes.items()}


def counts(sizes: Mapping[str, int], sparsities: Mapping[str, Sparsity]) -> dict[str, int]:
    """How many weights each layer loses, and in total the floor of what all should lose.

    Rounded cumulatively: each layer is within one weight of its share, and no layer's rounding
    adds up.
    """
    removed, exact, done = {}, Fraction(0), 0
    for name, size in sizes.items():
        num_removed(size, sparsities[name])  # which refuses what is no sparsity
        exact += size * Fraction(str(sparsities[name]))  # the decimal as written
        removed[name] = math.floor(exact) - done
        done += removed[name]
    return removed


def owl(
    outlier_ratios: Mapping[str, float],
    sizes: Mapping[str, int],
    sparsity: Sparsity,
    lam: float = 0.08,
) -> dict[str, Fraction]:
    """Less sparsity for groups of layers with more outliers, at most `2 * lam` less than the most.

    The groups together lose exactly `sparsity` of their weights, also where some are held at 0.01
    or 0.99. The published form takes the plain mean over groups, which is the same for groups of
    one size: pass sizes of 1 for it.

    Args:
        outlier_ratios: by group, what `outlier_ratio` gives.
        sizes: by group, the number of weights.
        sparsity: fraction that all groups together lose.
        lam: half the range of the groups' sparsities, in [0, 0.5).

    Raises:
        ValueError: if `sparsity` or `lam` is out of range, or a ratio is not finite.

    Source: OWL (https://arxiv.org/abs/2310.05175), section 3.3, and its authors' code.
    """
    assert outlier_ratios.keys() == sizes.keys()
    num_removed(1, sparsity)  # which refuses what is no sparsity
    if not 0 <= lam < 0.5:
        raise UserError(f"lambda is half a range of sparsities, in [0, 0.5), got {lam}")
    if bad := [name for name, ratio in outlier_ratios.items() if not math.isfinite(ratio)]:
        raise UserError(f"outlier ratios are not finite, so neither are the scores: {bad}")
    ratios = {name: Fraction(ratio) for name, ratio in outlier_ratios.items()}
    least = min(ratios.values())
    spread = max(ratios.values()) - least or 1  # 1: all are equal, and so will be the sparsities
    slope = 2 * Fraction(str(lam)) / spread
    kept_more = {name: (ratio - least) * slope for name, ratio in ratios.items()}

    # Sparsities are a level less `kept_more`, clipped. What is removed grows with the level, in
    # straight pieces between the levels at which a group reaches a bound: find the piece, then
    # the level on it.
    sparsity = Fraction(str(sparsity))
    bounds = (min(_LOWEST, sparsity), max(_HIGHEST, sparsity))

    def at(level: Fraction) -> dict[str, Fraction]:
        return {name: min(max(level - x, bounds[0]), bounds[1]) for name, x in kept_more.items()}

    def removed(level: Fraction) -> Fraction:
        return sum((sizes[name] * s for name, s in at(level).items()), Fraction(0))

    levels = sorted({bound + x for bound in bounds for x in kept_more.values()})
    target = sparsity * sum(sizes.values())
    i = bisect.bisect_left(levels, target, key=removed)
    level = levels[i]
    if removed(level) > target:
        before = removed(levels[i - 1])
        share = (target - before) / (removed(level) - before)
        level = levels[i - 1] + share * (level - levels[i - 1])
    return at(level)


def outlier_ratio(
    scores: Sequence[Float[np.ndarray, "..."]],
    multiple: float = 5.0,
) -> float:
    """Percentage of the scores of one group's layers above `multiple` times their mean.

    OWL takes 5 for language models; Ramesh and Zhao 7, with the scores of Wanda.

    Source: OWL (https://arxiv.org/abs/2310.05175), equation 1.
    """
    size = sum(score.size for score in scores)
    limit = multiple * sum(float(score.sum(dtype=np.float64)) for score in scores) / size
    return 100 * sum(int(np.count_nonzero(score > limit)) for score in scores) / size


def blocks(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups layers by the transformer layer, ResNet or transformer that they lie in.

    A layer of none of them is its own group. Ramesh and Zhao allocate to the layers of the text
    encoder in this way: their six matrices share one sparsity.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        block = _BLOCK.match(name)
        groups.setdefault(block[0] if block else name, []).append(name)
    return groups


def matched(rules: Iterable[tuple[str, float]], names: Collection[str]) -> dict[str, float]:
    """Sparsities of the layers that a user singles out, 0 to leave one alone.

    Args:
        rules: shell patterns, as in `*.attn2.to_k`, and sparsities: `*` stands for anything, dots
            too. Where several match a layer, the first one counts.
        names: PyTorch names of the layers in scope, without `.weight`.

    Raises:
        ValueError: naming all patterns that match nothing, with what is close to them, those that
            come too late to count, and all sparsities out of range.
    """
    sparsities: dict[str, float] = {}
    problems = []
    for pattern, sparsity in rules:
        try:
            num_removed(1, sparsity)
        except ValueError as error:
            problems.append(f"{pattern}: {error}")
        matches = fnmatch.filter(names, pattern)
        if not matches:
            close = ", ".join(_close(pattern, names)) or "nothing is close to it"
            problems.append(f"{pattern} matches none of the {len(names)} layers in scope: {close}")
        elif sparsities.keys() >= set(matches):
            problems.append(f"{pattern} matches only what others before it do: put it first")
        sparsities = dict.fromkeys(matches, sparsity) | sparsities
    if problems:
        raise UserError("sparsities by pattern cannot be used:\n  " + "\n  ".join(problems))
    return sparsities


def remaining(
    sizes: Mapping[str, int], sparsity: Sparsity, fixed: Mapping[str, Sparsity]
) -> Fraction:
    """The sparsity of the layers that are not `fixed`, so that all lose `sparsity` together.

    What a layer with a sparsity of its own loses is rounded down.

    Raises:
        ValueError: if the other layers cannot make up for it, with the range that they can reach.
    """
    if not fixed:
        return Fraction(str(sparsity))
    total = sum(sizes.values())
    done = sum(num_removed(sizes[name], s) for name, s in fixed.items())
    free = sum(size for name, size in sizes.items() if name not in fixed)
    left = num_removed(total, sparsity) - done
    if 0 <= left < free or left == free == 0:
        return Fraction(left, free or 1)
    raise UserError(
        f"a sparsity of {float(sparsity):g} is out of reach: {len(fixed)} of {len(sizes)} layers "
        f"have their own, so {done / total:.4f} is the lowest of all {total:,} weights together "
        f"and {(done + free) / total:.4f} more than the highest; change it, or theirs"
    )


def _close(pattern: str, names: Collection[str]) -> list[str]:
    """What a pattern may have meant: for each part that no name holds, parts which some do."""
    known = sorted({part for name in names for part in name.split(".")})
    unknown = [part for part in re.split(r"[.*?]+", pattern) if part and part not in known]
    close = [c for part in unknown for c in difflib.get_close_matches(part, known)]
    return [f"did you mean {' or '.join(close)}?"] if close else []
