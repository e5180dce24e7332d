"""The models of a run to compare: which directory draws which prompts."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from sdprune_jax import UserError, artefacts
from sdprune_jax.aptp import assignment
from sdprune_jax.files import model_directory

Directories = Mapping[str, tuple[pathlib.Path, ...]]  # by model


class Drawn(NamedTuple):
    """A model of a run: its directories, and which of them draws each prompt."""

    directories: tuple[pathlib.Path, ...]  # a single one, or one for each expert
    expert: Int32[np.ndarray, " prompts"]  # index of the directory that draws each prompt

    def parts(self) -> list[tuple[pathlib.Path, list[int]]]:
        """Returns each directory that draws anything, and the indices of its prompts."""
        own = [np.flatnonzero(self.expert == i).tolist() for i in range(len(self.directories))]
        return [part for part in zip(self.directories, own, strict=True) if part[1]]

    def described(self) -> dict[str, Any]:
        """Returns what records say of it."""
        if len(self.directories) == 1:
            return {"directory": str(self.directories[0])}
        count = np.bincount(self.expert, minlength=len(self.directories)).tolist()
        return {
            "experts": [
                {"directory": str(path), "prompts": num}
                for path, num in zip(self.directories, count, strict=True)
            ]
        }


def states(
    directories: Directories, workdir: pathlib.Path, variant: str = ""
) -> dict[str, list[Any]]:
    """Returns what changes if a picture of a model may: its files and, with experts, the routing.

    Args:
        directories: from `models_of_run`.
        workdir: directory of the run.
        variant: variant of the dense model's files.

    Raises:
        UserError: if what the run made is damaged or was made from another model, if fine-tuned
            experts are not those that the run has now, or if there are several and no assignment.
    """
    dense = artefacts.model_state(directories["dense"][0], variant)
    outputs = {
        stage: artefacts.output_of(stage, workdir) for stage in ("prune", "materialise", "finetune")
    }
    is_there = {stage: output.record.is_file() for stage, output in outputs.items()}
    for stage, output in outputs.items():
        if is_there[stage]:
            artefacts.verify(output, dense)
    if is_there["materialise"] and is_there["finetune"]:
        trained = artefacts.inputs_of(outputs["finetune"])["experts"]
        if trained != artefacts.identity(outputs["materialise"]):
            raise UserError(
                f"{workdir / 'finetuned'} is of other experts than {workdir / 'experts'}: train"
                " them with --config.finetune=build, or remove it"
            )
    states: dict[str, list[Any]] = {
        name: [dense if name == "dense" else artefacts.model_state(path) for path in paths]
        for name, paths in directories.items()
    }
    if len(directories.get("routed", ())) > 1:
        assignment.read_assignment(workdir)
        states["routed"].append(artefacts.identity(artefacts.output_of("assign", workdir)))
    return states


def models(
    directories: Directories,
    workdir: pathlib.Path,
    dense: model_directory.ModelConfig,
    texts: Sequence[str],
    mesh: Mesh,
) -> dict[str, Drawn]:
    """Says for every model which of its directories draws each prompt.

    Raises:
        UserError: as `assignment.assign`.
    """
    alone = np.zeros(len(texts), np.int32)
    drawn = {name: Drawn(paths, alone) for name, paths in directories.items()}
    if "routed" in drawn:
        expert = assignment.assign(workdir, dense, texts, mesh)
        drawn["routed"] = Drawn(directories["routed"], expert)
    return drawn
