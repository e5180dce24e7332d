"""Prunes a model in memory: the library's `prune`."""

from collections.abc import Sequence

from jax.sharding import Mesh

from sdprune_jax import UserError, sharding
from sdprune_jax.data import captions
from sdprune_jax.files.model import Model
from sdprune_jax.pruning.component import prune_component
from sdprune_jax.pruning.methods import STATISTIC, Method
from sdprune_jax.scoring.calibration import Calibration
from sdprune_jax.scoring.settings import CalibrationSettings


def prune(
    model: Model,
    *,
    unet: Method | None = None,
    text_encoder: Method | None = None,
    prompts: Sequence[str] | None = None,
    calibration: CalibrationSettings | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Model:
    """Sets weights to zero.

    Args:
        model: stays as it is.
        unet: how the UNet is pruned, such as `Wanda(0.5)`; None leaves it dense.
        text_encoder: the same for the text encoder.
        prompts: texts that methods with a calibration run; None draws 100 captions of emoji, which
            suit the embedded model alone.
        calibration: how they are run.
        seed: draws random scores, and the noise of the calibration.
        mesh: devices of the calibration; None is all of them.

    Returns:
        A model of the same configs, whose pruned kernels are NumPy arrays.

    Raises:
        UserError: if no component is to be pruned, or a method cannot be applied.
    """
    methods = {"text_encoder": text_encoder, "unet": unet}
    if not any(methods.values()):
        raise UserError("nothing is to be pruned: give `unet` or `text_encoder` a method")
    texts = captions.prompts("embedded", "train", 100, seed) if prompts is None else prompts
    pruned = {}
    for name, method in methods.items():
        if method is None:
            continue
        parts = None
        if STATISTIC[method.method]:
            run = Calibration(
                calibration or CalibrationSettings(),
                model.config,
                name,
                mesh or sharding.make_mesh(),
                texts,
                seed,
                text_params=model.params.get("text_encoder"),
            )
            parts = run.parts
        pruned[name], _ = prune_component(model.params[name], name, method, parts, seed=seed)
    return model.replace(**pruned)
