"""The methods of post-training pruning, as a caller writes them: `Wanda(0.5, scope="linear")`."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Literal, get_args

Name = Literal["magnitude", "random", "wanda", "sparsegpt", "obsdiff", "alps", "taylor"]
Group = Literal["layer", "output", "component", "normalised"]
Pattern = Literal["unstructured", "1:2", "1:4", "2:4", "4:8"]
Allocation = Literal["uniform", "owl"]
Threshold = Literal["exact", "rz"]
LEGAL: Mapping[str, tuple[str | None, ...]] = {
    "method": get_args(Name),
    "group": (None, *get_args(Group)),
    "pattern": get_args(Pattern),
    "allocation": get_args(Allocation),
    "threshold": get_args(Threshold),
}

SOLVERS = ("sparsegpt", "obsdiff", "alps")  # choose in blocks of their own, and compensate
STATISTIC: Mapping[str, str | None] = {  # what calibration has to sum for each method
    "random": None,
    "magnitude": None,
    "wanda": "moments",
    "sparsegpt": "gram",
    "obsdiff": "weighted_gram",
    "alps": "gram",
    "taylor": "gradient",
}


@dataclasses.dataclass(frozen=True)
class Override:
    """A sparsity of its own for some layers."""

    layers: str  # shell pattern of layer names as in prune.json, such as *.attn2.to_k
    sparsity: float = 0.0  # fraction removed, in [0, 1); 0 leaves these layers as they are


@dataclasses.dataclass(frozen=True)
class Method:
    """How one component is pruned; made by `Wanda`, `SparseGPT` and the others below.

    Attributes:
        method: the criterion that scores weights, or the solver that chooses and compensates.
        sparsity: fraction of the weights in scope that is removed, in [0, 1).
        scope: which layers are in scope: one of `sites.SCOPES`, as `sites.prunable` explains them.
        group: the weights that compete; None is what the method's paper compares. "component" is
            all layers together, "normalised" too, each layer in units of its norm.
        pattern: "n:m" removes n of every m consecutive inputs of an output.
        allocation: whether all layers lose the same share or, by OWL, those with outliers less.
        owl_multiple: a score above this multiple of the mean score is an outlier.
        owl_lambda: half the range of the sparsities that OWL gives to layers, in [0, 0.5).
        threshold: "rz" also removes what ties with the last weight removed, as Ramesh and Zhao do.
        damping: what solvers add to the Gram matrix, as a fraction of its mean diagonal, in (0, 1].
        overrides: layers with a sparsity of their own; of several that match, the first counts.
            The other layers make up for them: `sparsity` is of all in scope. Under an n:m pattern
            these lose weights anywhere instead.
        band: for analysis: two quantiles, `sparsity` apart, between which scores are removed.
    """

    method: Name
    sparsity: float = 0.5
    _: dataclasses.KW_ONLY
    scope: str = "linear"
    group: Group | None = None
    pattern: Pattern = "unstructured"
    allocation: Allocation = "uniform"
    owl_multiple: float = 5.0
    owl_lambda: float = 0.08
    threshold: Threshold = "exact"
    damping: float = 0.01
    overrides: tuple[Override, ...] | None = None
    band: tuple[float, float] | None = None


Magnitude = partial(Method, "magnitude")
"""Removes the smallest weights of every layer; needs no calibration."""

Random = partial(Method, "random")
"""Removes weights drawn by the seed: the baseline of baselines."""

Wanda = partial(Method, "wanda")
"""Removes, in every output, the smallest |weight| x norm of its input."""

SparseGPT = partial(Method, "sparsegpt")
"""Removes weights block by block of inputs, and lets the later inputs make up for them."""

OBSDiff = partial(Method, "obsdiff")
"""SparseGPT with the sampler's calls weighted, the last ones least; of the UNet alone."""

ALPS = partial(Method, "alps")
"""Chooses all weights of a layer together and fits those that stay; pays from 60 % sparsity."""

Taylor = partial(Method, "taylor")
"""Removes the weights that change the denoising loss least, to first order; of the UNet alone."""
