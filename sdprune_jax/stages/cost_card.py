"""What a run would cost, from its config and the shapes of its model alone (`--dry_run`).

Every stage adds its own part: `plan` in its file.
"""

import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sdprune_jax import UserError, config, sharding, sites
from sdprune_jax.config import checks
from sdprune_jax.files import convert, model_directory
from sdprune_jax.models import samplers
from sdprune_jax.sites import macs

Row = Sequence[str]

_SCOPES = ("linear", "linear+conv")  # whose sizes the card shows


class Planned(NamedTuple):
    """What the card of a run is made from.

    Attributes:
        model: configs of the model that the run starts from, or of the one that it pretrains.
        shapes: nested shapes of its parameters, by component.
        mesh: shape of the machine that is planned for; its devices are stand-ins.
    """

    model: model_directory.ModelConfig
    shapes: dict[str, Any]
    mesh: Mesh


def card(run: config.Run, num_devices: int) -> str:
    """Returns parameters, arithmetic, sparsity, memory and steps of a run.

    At most 40 lines, and one more for every point of a sweep. No weights are read.

    Args:
        run: a config that `checks.check` accepts.
        num_devices: devices of the machine to plan for, which need not be this one.

    Raises:
        UserError: if the mesh does not fit the devices, or the sampler not the schedule, if no
            component is chosen to prune, or the model cannot be opened.
    """
    mesh = _mesh(run.mesh, num_devices)
    checks.check_devices(run, num_devices)
    stages = {
        name: importlib.import_module(module) for name, module in config.stages_of(run).items()
    }
    if run.pretrain:
        model = stages["pretrain"].planned_model(run)
    else:
        model = model_directory.open_model(model_directory.directory_of(run.model))
    shapes = {
        name: model_directory.param_shapes(model, name) for name in model_directory.COMPONENTS
    }
    planned = Planned(model, shapes, mesh)
    known = model.schedule.class_name in samplers.SAMPLERS
    drawing = run.generate or config.Generate(sampler=None if known else "ddim")
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    parts = [
        f"{model.directory}: {model.schedule.prediction_type}, {model.schedule.class_name}\n"
        f"{', '.join(stages)} to {run.workdir}; devices {axes}; computes in {run.dtype}",
        aligned(_parameters(shapes, mesh)),
        aligned(_arithmetic(model, drawing)),
    ]
    parts += [text for stage in stages.values() if (text := stage.plan(run, planned))]
    return "\n\n".join(parts)


def models_of(run: config.Run) -> str:
    """Names the models that the pictures of a run compare."""
    others = {"pruned": run.prune, "routed": run.materialise or run.slice}
    return " and ".join(["dense", *(name for name, is_made in others.items() if is_made)])


def unet_macs(planned: Planned, image_size: int) -> int:
    """Returns the MACs of one call of the UNet on the latents of a square picture, in pixels."""
    model = planned.model
    latent = (image_size // model.vae.downscale,) * 2
    return sum(macs.of_unet(model.unet, latent, model.text_encoder.max_position_embeddings))


def _parameters(shapes: dict[str, Any], mesh: Mesh) -> list[Row]:
    heads = [text for scope in _SCOPES for text in (scope, "share")]
    rows: list[Row] = [("parameters", "all", *heads, "float32 file", "float16 file", "a device")]
    for name, tree in shapes.items():
        count = num_parameters(tree)
        prunable = [sum(prunable_sizes(tree, name, scope).values()) for scope in _SCOPES]
        shares = [text for n in prunable for text in (f"{n:,}", f"{n / count:.1%}")]
        sizes = (4 * count, 2 * count, bytes_a_device(tree, mesh))
        rows.append((name, f"{count:,}", *shares, *map(in_bytes, sizes)))
    total, here = num_parameters(shapes), bytes_a_device(shapes, mesh)
    sizes = map(in_bytes, (4 * total, 2 * total, here))
    return [*rows, ("pipeline", f"{total:,}", *[""] * len(heads), *sizes)]


def _arithmetic(model: model_directory.ModelConfig, section: config.Generate) -> list[Row]:
    """Of the prompts, only the image's own is counted: the negative one is encoded once a batch."""
    scale = model.vae.downscale  # pixels
    height = section.height or model.unet.sample_size * scale
    width = section.width or model.unet.sample_size * scale
    latent = (height // scale, width // scale)
    table = samplers.timetable(model.schedule, section.sampler, section.num_steps)
    calls = len(table.timestep) * (2 if section.guidance_scale > 1 else 1)
    parts = {
        "text_encoder": (1, macs.of_text(model.text_encoder)),
        "unet": (
            calls,
            macs.of_unet(model.unet, latent, model.text_encoder.max_position_embeddings),
        ),
        "vae decoder": (1, macs.of_decoder(model.vae, latent)),
    }
    heads = [kind.replace("_", "-") for kind in macs.Macs._fields]
    title = f"GMACs, {height} x {width}, {section.num_steps} steps"
    rows: list[Row] = [(title, *heads, "a call", "calls", "an image")]
    for name, (count, found) in parts.items():
        total = sum(found)
        rows.append((name, *map(_giga, [*found, total]), f"{count}", _giga(count * total)))
    total = sum(count * sum(found) for count, found in parts.values())
    return [*rows, ("pipeline", *[""] * (len(heads) + 2), _giga(total))]


def _mesh(section: config.Mesh, num_devices: int) -> Mesh:
    data = num_devices // section.fsdp
    if data * section.fsdp != num_devices or section.data not in (-1, data):
        raise UserError(
            f"config.mesh is data {section.data} x fsdp {section.fsdp}, for {num_devices} devices:"
            " use an fsdp that divides them, and data=-1 for all that are left"
        )
    stand_ins = np.full((data, section.fsdp), jax.local_devices()[0])  # only the shape is read
    return Mesh(stand_ins, ("data", "fsdp"))


def bytes_a_device(tree: Any, mesh: Mesh) -> int:
    leaves = jax.tree.leaves(tree)
    shardings = sharding.fsdp_shardings(leaves, mesh)
    return sum(
        math.prod(placed.shard_shape(x.shape)) * x.dtype.itemsize
        for x, placed in zip(leaves, shardings, strict=True)
    )


def prunable_sizes(tree: Any, component: str, scope: str) -> dict[str, int]:
    """Weights of every prunable layer."""
    flat = convert.flatten(tree)
    return {p: math.prod(flat[p].shape) for p in sites.prunable(tree, component, scope)}


def num_parameters(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def in_bytes(num_bytes: int) -> str:
    scale, unit = (2**30, "GiB") if num_bytes >= 1000 * 2**20 else (2**20, "MiB")
    return f"{num_bytes / scale:.3g} {unit}"


def _giga(num: int) -> str:
    return f"{num / 1e9:,.3f}"


def aligned(rows: list[Row]) -> str:
    """Columns two spaces apart, the first one flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )
