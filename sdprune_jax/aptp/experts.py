"""The experts of a finished APTP run: the library's `experts`."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from sdprune_jax import UserError, artefacts, sharding
from sdprune_jax.aptp import assignment, expert_files
from sdprune_jax.aptp.records import ExpertsRecord
from sdprune_jax.files import model, model_directory


class Experts:
    """Smaller UNets, each for some prompts.

    Attributes:
        record: MACs, parameters and prompts of every expert.
        directories: a diffusers directory an expert, fine-tuned if the run has fine-tuned it.
    """

    def __init__(self, directory: pathlib.Path, mesh: Mesh):
        output = artefacts.output_of("materialise", directory)
        if not output.record.is_file():
            raise UserError(f"{directory} has no experts: {output.again()}")
        self.record = artefacts.require(output, ExpertsRecord)
        self.directories = expert_files.models_of_run(self.record.model, directory)["routed"]
        self._dense = model_directory.open_model(model_directory.directory_of(self.record.model))
        self._workdir, self._mesh = directory, mesh

    def __len__(self) -> int:
        return len(self.directories)

    def route(self, prompts: Sequence[str]) -> Int32[np.ndarray, " prompts"]:
        """Returns the expert of each prompt, from 0 to `len(self) - 1`."""
        return assignment.assign(self._workdir, self._dense, prompts, self._mesh)

    def load(self, index: int) -> model.Model:
        """Loads an expert as a whole model."""
        return model.load(self.directories[index])


def experts(directory: str | os.PathLike[str], *, mesh: Mesh | None = None) -> Experts:
    """Opens the experts of a finished run of stages `router`, `assign` and `materialise`.

    Args:
        directory: the `workdir` of the run.
        mesh: devices that embed prompts; None is all of them.

    Raises:
        UserError: if the run has no experts, or they are damaged.
    """
    return Experts(pathlib.Path(directory), mesh or sharding.make_mesh())
