"""CLIP scores under the names of their conventions. Say with a score which CLIP it is of."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

from sdprune_jax import UserError

# From the cosine of every image with its own caption to the score that is reported.
CONVENTIONS: Mapping[str, Callable[[Float[np.ndarray, " n"]], float]] = {
    "cosine": lambda cosines: float(cosines.mean()),  # SD2-Pruning and APTP print it as 0.314
    # 100 times that, at least 0: torchmetrics bounds the mean, not each image.
    "torchmetrics": lambda cosines: max(100 * float(cosines.mean()), 0.0),
}


def cosines(
    images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, " n"]:
    """The cosine of every image with its own text, both given as unit vectors.

    Raises:
        ValueError: if a vector is not of length 1.
    """
    for name, part in (("images", images), ("texts", texts)):
        length = np.linalg.norm(part.astype(np.float64), axis=1)
        bad = np.flatnonzero(~(np.abs(length - 1) < 1e-3))
        if len(bad):
            raise UserError(
                f"{len(bad)} embeddings of {name} are not unit vectors, first number {bad[0]} of"
                f" length {length[bad[0]]:.4g}: divide each by its length"
            )
    return np.sum(images.astype(np.float64) * texts.astype(np.float64), axis=1)


def mismatched(images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n d"]) -> float:
    """The mean cosine of an image with the text of another: what a pair has by chance."""
    x, y = images.astype(np.float64), texts.astype(np.float64)
    return float((x.sum(axis=0) @ y.sum(axis=0) - np.sum(x * y)) / (len(x) * (len(x) - 1)))


def clip_score(cosines: Float[np.ndarray, " n"], convention: str) -> float:
    """The score of a set of images.

    Raises:
        ValueError: if there is no such convention, or no image.
    """
    if convention not in CONVENTIONS:
        raise UserError(f"CLIP score {convention!r} is unknown: use one of {list(CONVENTIONS)}")
    if not len(cosines):
        raise UserError("there is no image to score")
    return CONVENTIONS[convention](cosines)
