"""Makes the UNet of a model in memory smaller: the library's `slice`."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from sdprune_jax import sharding
from sdprune_jax.data import captions
from sdprune_jax.files.model import Model
from sdprune_jax.scoring.calibration import Calibration
from sdprune_jax.scoring.settings import CalibrationSettings
from sdprune_jax.slicing.criteria import Criterion, slice_unet


def slice(
    model: Model,
    criterion: Criterion,
    *,
    prompts: Sequence[str] | None = None,
    calibration: CalibrationSettings | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Model:
    """Cuts heads, neurons, channels or whole blocks out of the UNet.

    Args:
        model: stays as it is.
        criterion: what goes and how much, such as `ByNorm(0.65)`.
        prompts: texts that some criteria run; None draws 100 captions of emoji, which suit the
            embedded model alone.
        calibration: how they are run.
        seed: draws units, and the noise of the calibration.
        mesh: devices of the calibration; None is all of them.

    Returns:
        A model whose UNet is smaller, in float32; text encoder and VAE are the same.

    Raises:
        UserError: if the budget cannot be kept, or the UNet cannot be cut so.
    """
    texts = captions.prompts("embedded", "train", 100, seed) if prompts is None else prompts
    run = Calibration(
        calibration or CalibrationSettings(),
        model.config,
        "unet",
        mesh or sharding.make_mesh(),
        texts,
        seed,
        text_params=model.params.get("text_encoder"),
    )
    dense = jax.tree.map(lambda x: np.asarray(x, np.float32), model.params["unet"])
    sliced = slice_unet(model.config, dense, criterion, run, seed=seed)
    smaller = dataclasses.replace(model.config, unet=sliced.unet)
    return dataclasses.replace(model, config=smaller).replace(unet=sliced.params)
