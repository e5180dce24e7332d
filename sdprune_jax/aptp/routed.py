"""The models of a run to compare: which directory draws which prompts, and what they are of."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from sdprune_jax import UserError
from sdprune_jax.aptp import assignment, expert_files
from sdprune_jax.data import cache
from sdprune_jax.files import model_directory

Directories = Mapping[str, tuple[pathlib.Path, ...]]  # by model


class Drawn(NamedTuple):
    """A model of a run: its directories, and which of them draws each prompt.

    Attributes:
        directories: one, or one an expert.
        expert: of each prompt, the place of its directory.
    """

    directories: tuple[pathlib.Path, ...]
    expert: Int32[np.ndarray, " prompts"]

    def parts(self) -> list[tuple[pathlib.Path, list[int]]]:
        """Every directory that draws anything, and the prompts that it draws, by index."""
        own = [np.flatnonzero(self.expert == i).tolist() for i in range(len(self.directories))]
        return [pair for pair in zip(self.directories, own, strict=True) if pair[1]]

    def said(self) -> dict[str, Any]:
        """What a record says of it."""
        if len(self.directories) == 1:
            return {"directory": str(self.directories[0])}
        count = np.bincount(self.expert, minlength=len(self.directories)).tolist()
        return {
            "experts": [
                {"directory": str(path), "prompts": num}
                for path, num in zip(self.directories, count, strict=True)
            ]
        }


def states(directories: Directories, workdir: pathlib.Path) -> dict[str, list[Any]]:
    """What changes if a picture of a model may: its files and, of experts, who gets which prompt.

    Raises:
        ValueError: if a fine-tuned expert is not of the experts that the run has now, or there are
            several and no assignment.
    """
    found: dict[str, list[Any]] = {
        name: [cache.directory_state(path) for path in paths] for name, paths in directories.items()
    }
    paths = directories.get("routed", ())
    cut = expert_files.record(workdir)
    trained = expert_files.record(workdir, "finetuned/finetune.json")
    if cut and trained and trained.get("made_from_experts", cut["made_from"]) != cut["made_from"]:
        raise UserError(
            f"{workdir / 'finetuned'} is of other experts than {workdir / 'experts'}: train them"
            " with --config.finetune=build, or remove it"
        )
    if len(paths) > 1:
        found["routed"].append(assignment.read_assignment(workdir)["made_from"])
    return found


def models(
    directories: Directories,
    workdir: pathlib.Path,
    dense: model_directory.Model,
    texts: Sequence[str],
    mesh: Mesh,
) -> dict[str, Drawn]:
    """Who draws these prompts, for every model.

    Raises:
        ValueError: as `experts.of_prompts`.
    """
    one = np.zeros(len(texts), np.int32)
    return {
        name: Drawn(
            paths, assignment.of_prompts(workdir, dense, texts, mesh) if name == "routed" else one
        )
        for name, paths in directories.items()
    }
