"""What a run would cost, from its config and the shapes of its model alone (`--dry_run`)."""

import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sdprune_jax import UserError, config, sharding, sites
from sdprune_jax.config import checks
from sdprune_jax.evaluate.protocols import PROTOCOLS
from sdprune_jax.files import convert, model_directory
from sdprune_jax.models import clip, samplers
from sdprune_jax.pruning import request
from sdprune_jax.sites import macs
from sdprune_jax.sweep import points
from sdprune_jax.training import loop

Row = Sequence[str]

_SCOPES = ("linear", "linear+conv")  # whose sizes the card shows


def card(run: config.Run, num_devices: int) -> str:
    """Parameters, arithmetic, sparsity, memory and steps of a run.

    At most 40 lines, and one more for every point of a sweep.

    Args:
        run: a config that `checks.check` accepts. Of its model the configs are read, no weights.
        num_devices: of the machine to plan for, which need not be this one.

    Raises:
        ValueError: if the mesh does not fit the devices, or the sampler not the schedule, if no
            component is chosen to prune, or the model cannot be opened.
    """
    mesh = _mesh(run.mesh, num_devices)
    checks.check_devices(run, num_devices)
    if run.pretrain:
        model = _to_pretrain(run, run.pretrain)
    else:
        model = model_directory.open_model(model_directory.directory_of(run.model))
    shapes = {
        name: model_directory.param_shapes(model, name) for name in model_directory.COMPONENTS
    }
    stages = [stage for stage in config.STAGES if getattr(run, stage)]
    known = model.schedule.class_name in samplers.SAMPLERS
    drawing = run.generate or config.Generate(sampler=None if known else "ddim")
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    parts = [
        f"{model.directory}: {model.schedule.prediction_type}, {model.schedule.class_name}\n"
        f"{', '.join(stages)} to {run.workdir}; devices {axes}; computes in {run.dtype}",
        _aligned(_parameters(shapes, mesh)),
        _aligned(_arithmetic(model, drawing)),
    ]
    if run.prune:
        parts.append(_aligned(_zeros(shapes, run.prune)))
    if run.slice:
        what, share = run.slice.criterion, f"{run.slice.macs_budget:.1%} of the UNet's MACs"
        fixed = what.startswith("bksdm-")
        parts.append(f"slice: {what}, to {'a fixed list of blocks' if fixed else share}")
    if run.pretrain:
        parts.append(_aligned(_trainings(run.pretrain, shapes, mesh)))
    if run.router or run.finetune:
        parts.append("\n".join(_experts(run, model, shapes["unet"], mesh)))
    others = {"pruned": run.prune, "routed": run.materialise or run.slice}
    models = " and ".join(["dense", *(name for name, is_made in others.items() if is_made)])
    if run.generate:
        batch, count = run.generate.batch_size, run.generate.num_prompts
        parts.append(f"generate: {count:,} prompts, {batch} at once, {models}")
    if run.evaluate:
        protocol = PROTOCOLS[run.evaluate.protocol]
        count = run.evaluate.num_images or protocol.num_images
        parts.append(
            f"evaluate: {protocol.name}, {count:,} images of {models}, {protocol.num_steps} steps,"
            f" guidance {protocol.guidance_scale:g}: {', '.join(m.name for m in protocol.metrics)}"
        )
    if run.sweep:
        parts += _sweep(shapes, run.sweep)
    return "\n\n".join(parts)


def _parameters(shapes: dict[str, Any], mesh: Mesh) -> list[Row]:
    heads = [text for scope in _SCOPES for text in (scope, "share")]
    rows: list[Row] = [("parameters", "all", *heads, "float32 file", "float16 file", "a device")]
    for name, tree in shapes.items():
        count = _count(tree)
        prunable = [sum(_prunable(tree, name, scope).values()) for scope in _SCOPES]
        shares = [text for n in prunable for text in (f"{n:,}", f"{n / count:.1%}")]
        sizes = (4 * count, 2 * count, _bytes_a_device(tree, mesh))
        rows.append((name, f"{count:,}", *shares, *map(_size, sizes)))
    total, here = _count(shapes), _bytes_a_device(shapes, mesh)
    sizes = map(_size, (4 * total, 2 * total, here))
    return [*rows, ("pipeline", f"{total:,}", *[""] * len(heads), *sizes)]


def _arithmetic(model: model_directory.Model, section: config.Generate) -> list[Row]:
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


def _zeros(shapes: dict[str, Any], section: config.Prune) -> list[Row]:
    """The four sparsities that papers mix up; the first weighs components by all parameters."""
    parts = {name: getattr(section, name, None) for name in model_directory.COMPONENTS}
    pipeline, sums, rows = _count(shapes), np.zeros(4), []
    for name, part in parts.items():
        if part is None:
            continue
        count, sizes = _count(shapes[name]), _prunable(shapes[name], name, part.scope)
        removed = request.num_removed(sizes, part)
        found = np.array([part.sparsity * count, removed, sum(sizes.values()), count])
        rule = f"{len(sizes)} {part.scope} layers, {part.threshold}"
        rows.append((name, rule, *_sparsities(found, pipeline)))
        sums += found
    if not rows:
        raise UserError("config.prune has no component: set config.prune.unet or text_encoder")
    rows.append(("together", "", *_sparsities(sums, pipeline)))
    heads = ("requested", "zeros", "of prunable", "of component", "of pipeline")
    return [("prune", "", *heads), *rows]


def _sparsities(found: Any, pipeline: int) -> list[str]:
    requested, zeros, prunable, component = found
    shares = (zeros / prunable, zeros / component, zeros / pipeline)
    return [f"{requested / component:.2%}", f"{int(zeros):,}", *(f"{x:.2%}" for x in shares)]


def _sweep(shapes: dict[str, Any], section: config.Sweep) -> list[str]:
    """Every point with the sparsity that papers state and the one that there is."""
    rows: list[Row] = [("sweep", *points.COMPONENTS, "nominal", "true", "zeros")]
    for i, point in enumerate(section.points):
        parts = points.sections(point)
        words = [
            f"{parts[name].sparsity:g} {points.method(parts[name])}" if name in parts else "dense"
            for name in points.COMPONENTS
        ]
        found = points.expected(point, shapes)
        sizes = (f"{found.nominal:.2%}", f"{found.true:.2%}", f"{found.zeros:,}")
        rows.append((str(i + 1), *words, *sizes))
    protocol = PROTOCOLS[section.measure.protocol]
    count = section.measure.num_images or protocol.num_images
    steps = section.num_steps or protocol.num_steps
    cliffs = len(list(points.series(section.points))) if section.cliff else 0
    total = count * section.num_seeds * (len(section.points) + 1)
    return [
        _aligned(rows),
        "shares are of the text encoder and the UNet together: nominal as asked of all their"
        " parameters, true those that are zero\n"
        f"{protocol.name}: {len(section.points)} points and dense, {count:,} images,"
        f" {section.num_seeds} seeds, {steps} steps: {total:,} images in all"
        + (f", and those that bisect {cliffs} cliffs by 2 figures" if cliffs else ""),
    ]


def _trainings(section: config.Pretrain, shapes: dict[str, Any], mesh: Mesh) -> list[Row]:
    """The state is parameters, their average, and the two moments of AdamW, in float32."""
    from sdprune_jax.pretrain import contrastive

    clip_config = contrastive.configure(section.clip, section.clip.vocab_size)
    shapes = shapes | {"clip": clip.clip_param_shapes(clip_config)}  # text encoder and more
    rows: list[Row] = [("pretrain", "parameters", "steps", "batch", "state a device")]
    for name in ("clip", "vae", "unet"):
        training, tree = getattr(section, name).training, shapes[name]
        optimizer = loop.adamw(
            training.learning_rate,
            training.warmup_steps,
            training.num_steps,
            training.weight_decay,
            training.clip_norm,
        )
        state = jax.eval_shape(lambda params, o=optimizer: loop.init_state(params, o), tree)
        counts = (_count(tree), training.num_steps, training.batch_size)
        rows.append((name, *(f"{n:,}" for n in counts), _size(_bytes_a_device(state, mesh))))
    return rows


def _experts(
    run: config.Run, model: model_directory.Model, shapes: Any, mesh: Mesh
) -> Iterator[str]:
    """A step is a pass of the teacher, and of the student one forward and one or two back.

    The router's weights are none of the student's, whose own have no gradient: one back.
    """
    from sdprune_jax.aptp import expert_files
    from sdprune_jax.data import pictures
    from sdprune_jax.training import distillation

    made_by = run.router or run.slice
    cut = {} if made_by else expert_files.record(pathlib.Path(run.workdir))
    data = made_by.data if made_by else config.RouterData(**cut.get("data", {}))
    latent = (pictures.size(data) // model.vae.downscale,) * 2
    unet = sum(macs.of_unet(model.unet, latent, model.text_encoder.max_position_embeddings))
    frozen = _size(_bytes_a_device(shapes, mesh))
    shares = [row["share_of_macs"] for row in cut.get("experts", ())] or [1.0]
    share, count = made_by.macs_budget if made_by else float(np.mean(shares)), len(shares)
    if section := run.router:
        count = section.num_codes
        work = section.batch_size * unet * (3 + section.remat)
        yield (
            f"router: {count} codes at {share:.1%} of the UNet's MACs; {section.num_steps:,} steps"
            f" of {section.batch_size:,} prompts, {work / 1e12:,.3g} TMACs each; {frozen} of frozen"
            " UNet a device"
        )
    if section := run.finetune:
        training = section.training
        work = training.batch_size * unet * (1 + (3 + section.remat) * share)
        optimizer = distillation.make_optimizer(section)
        state = jax.eval_shape(lambda params: loop.init_state(params, optimizer), shapes)
        yield (
            f"finetune: experts {count}, each {training.num_steps:,} steps of"
            f" {training.batch_size:,} prompts, about {work / 1e12:,.3g} TMACs each; a device"
            f" holds {frozen} of teacher and at most {_size(_bytes_a_device(state, mesh))} of state"
        )


def _to_pretrain(run: config.Run, section: config.Pretrain) -> model_directory.Model:
    """The model that will be made; its vocabulary is taken to come out at its largest."""
    from sdprune_jax.pretrain import (
        autoencoder,  # seconds: data libraries
        contrastive,
        denoiser,
    )

    clip_config = contrastive.configure(section.clip, section.clip.vocab_size)
    text_config, _ = contrastive.text_encoder(clip_config, {"text_model": {}})
    vae_config = autoencoder.configure(section.vae)
    unet_config = denoiser.configure(section.unet, vae_config, text_config)
    directory = pathlib.Path(run.workdir) / "model"
    return model_directory.Model(text_config, unet_config, vae_config, denoiser.SCHEDULE, directory)


def _mesh(section: config.Mesh, num_devices: int) -> Mesh:
    data = num_devices // section.fsdp
    if data * section.fsdp != num_devices or section.data not in (-1, data):
        raise UserError(
            f"config.mesh is data {section.data} x fsdp {section.fsdp}, for {num_devices} devices:"
            " use an fsdp that divides them, and data=-1 for all that are left"
        )
    stand_ins = np.full((data, section.fsdp), jax.local_devices()[0])  # only the shape is read
    return Mesh(stand_ins, ("data", "fsdp"))


def _bytes_a_device(tree: Any, mesh: Mesh) -> int:
    leaves = jax.tree.leaves(tree)
    shardings = sharding.fsdp_shardings(leaves, mesh)
    return sum(
        math.prod(placed.shard_shape(x.shape)) * x.dtype.itemsize
        for x, placed in zip(leaves, shardings, strict=True)
    )


def _prunable(tree: Any, component: str, scope: str) -> dict[str, int]:
    """Weights of every prunable layer."""
    flat = convert.flatten(tree)
    return {p: math.prod(flat[p].shape) for p in sites.prunable(tree, component, scope)}


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _size(num_bytes: int) -> str:
    scale, unit = (2**30, "GiB") if num_bytes >= 1000 * 2**20 else (2**20, "MiB")
    return f"{num_bytes / scale:.3g} {unit}"


def _giga(num: int) -> str:
    return f"{num / 1e9:,.3f}"


def _aligned(rows: list[Row]) -> str:
    """Columns two spaces apart, the first one flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )
