"""Stage `materialise`: cuts every expert out of the dense UNet."""

import dataclasses
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from sdprune_jax import UserError, artefacts, config, sites
from sdprune_jax.aptp import assignment, expert_files, router_training
from sdprune_jax.aptp.layout import layout_of, to_architecture
from sdprune_jax.data import emoji
from sdprune_jax.files import model_directory
from sdprune_jax.sites import zero_padding
from sdprune_jax.stages import cost_card, inputs


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Cuts every expert out of the dense UNet: the weights are loaded first, then sliced.

    Returns:
        `workdir/experts`, of `expert_files.write`; with `zero_padded`, each also in the dense
        shape.

    Raises:
        ValueError: if the run has no assignment, or one of another router, or the UNet cannot be
            sliced so.
    """
    section, work = run.materialise, pathlib.Path(run.workdir)
    assert section is not None
    model, output = inputs.open_model(run), artefacts.output_of("materialise", work)
    assigned = assignment.read_assignment(work)
    _, trained = router_training.load(work, model, mesh)
    purpose = expert_files.Purpose(
        data=trained.data,
        seed=trained.seed,
        variant=trained.variant,
        mac_counter=trained.mac_counter,
        latent_size=assigned.latent_size,
        cache="router/cache",
    )
    identity = artefacts.identity(artefacts.output_of("assign", work))
    made_from = {
        "section": dataclasses.asdict(section),
        "model": artefacts.model_state(model.directory, trained.variant),
        "assign": identity,
    }
    if artefacts.is_complete(output, made_from):
        return output.directory

    layout = layout_of(sites.table(model.unet))
    dense = model_directory.load(model, "unet", variant=purpose.variant or None)
    dense = jax.tree.map(np.asarray, dense)

    def cuts() -> Iterator[expert_files.Cut]:
        for vector in np.load(work / "assign" / "architectures.npy"):
            architecture = to_architecture(vector, layout)
            params, unet_config = sites.slice_params(dense, model.unet, architecture)
            kept = {site: int(units.sum()) for site, units in architecture.items()}
            padded = None
            if section.zero_padded:
                padded = zero_padding.zero_params(dense, model.unet, architecture)
            yield expert_files.Cut(params, unet_config, kept, padded)

    rows = {split: np.load(work / "assign" / f"experts_{split}.npy") for split in emoji.SPLITS}
    with artefacts.writing(output, made_from) as partial:
        record = expert_files.write(
            partial.directory, model, dense, cuts(), purpose, rows, section.save_dtype
        )
        partial.record = dataclasses.replace(record, model=run.model)
    return output.directory


def check(run: config.Run, num_devices: int) -> None:  # noqa: ARG001
    """Checks the model, and that there is, or will be, an assignment of prompts."""
    inputs.check_model(run, reads_texts=False)
    output = artefacts.output_of("assign", run.workdir)
    if not run.assign and not output.record.is_file():
        raise UserError(
            f"{output.directory} has no assignment of prompts: make one with --config.assign=build"
        )


def plan(run: config.Run, planned: cost_card.Planned) -> str:  # noqa: ARG001
    """Returns nothing: it costs little beside the other stages."""
    return ""
