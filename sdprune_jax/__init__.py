"""Prune Stable Diffusion 2 in JAX: `import sdprune_jax as sp`.

    model = sp.load("models/sd21-base")
    pruned = sp.prune(model, unet=sp.Magnitude(0.35), text_encoder=sp.Magnitude(0.475))
    images = sp.generate(pruned, ["a red apple"], seed=0)
    sp.save(pruned, "models/sd21-pruned")

All functions are pure: the model that they are given stays as it is. Names are imported when they
are used, so that `import sdprune_jax` takes no libraries with it.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what editors and type checkers see; at run time `__getattr__` does the same
    from sdprune_jax.aptp.experts import Experts as Experts
    from sdprune_jax.aptp.experts import experts as experts
    from sdprune_jax.files.model import Model as Model
    from sdprune_jax.files.model import load as load
    from sdprune_jax.files.model import save as save
    from sdprune_jax.pipeline import generate as generate
    from sdprune_jax.pruning.methods import ALPS as ALPS
    from sdprune_jax.pruning.methods import Magnitude as Magnitude
    from sdprune_jax.pruning.methods import Method as Method
    from sdprune_jax.pruning.methods import OBSDiff as OBSDiff
    from sdprune_jax.pruning.methods import Override as Override
    from sdprune_jax.pruning.methods import Random as Random
    from sdprune_jax.pruning.methods import SparseGPT as SparseGPT
    from sdprune_jax.pruning.methods import Taylor as Taylor
    from sdprune_jax.pruning.methods import Wanda as Wanda
    from sdprune_jax.pruning.prune import prune as prune
    from sdprune_jax.scoring.settings import CalibrationSettings as CalibrationSettings
    from sdprune_jax.slicing.criteria import BKSDM as BKSDM
    from sdprune_jax.slicing.criteria import ByNorm as ByNorm
    from sdprune_jax.slicing.criteria import ByOBS as ByOBS
    from sdprune_jax.slicing.criteria import ByTaylor as ByTaylor
    from sdprune_jax.slicing.criteria import Criterion as Criterion
    from sdprune_jax.slicing.criteria import DiffPruning as DiffPruning
    from sdprune_jax.slicing.criteria import LDPruner as LDPruner
    from sdprune_jax.slicing.criteria import RandomUnits as RandomUnits
    from sdprune_jax.slicing.criteria import Uniform as Uniform
    from sdprune_jax.slicing.slice import slice as slice

_MODULES = {  # module: the public names in it
    "aptp.experts": "Experts experts",
    "files.model": "Model load save",
    "pipeline": "generate",
    "pruning.methods": "ALPS Magnitude Method OBSDiff Override Random SparseGPT Taylor Wanda",
    "pruning.prune": "prune",
    "scoring.settings": "CalibrationSettings",
    "slicing.criteria": "BKSDM ByNorm ByOBS ByTaylor Criterion DiffPruning LDPruner RandomUnits"
    " Uniform",
    "slicing.slice": "slice",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = ["NotFiniteError", "UserError", "__version__", *_MODULE_OF]


class UserError(ValueError):
    """What the user of the package can mend; its message says what, where, why and how."""


class NotFiniteError(UserError, FloatingPointError):
    """A computation gave NaN or infinity; its message says which and what may help."""


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
