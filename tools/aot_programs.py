"""The compiled programs of a run, lowered from shapes alone: no weights, no devices, no data."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sdprune_jax import UserError, config, pipeline, sharding, sites
from sdprune_jax.aptp import router
from sdprune_jax.aptp.layout import layout_of
from sdprune_jax.evaluate.protocols import PROTOCOLS
from sdprune_jax.files import model_directory
from sdprune_jax.metrics import features
from sdprune_jax.models import inception, samplers, unet
from sdprune_jax.pruning.methods import STATISTIC
from sdprune_jax.scoring import accumulate, calibrate
from sdprune_jax.scoring import inputs as read
from sdprune_jax.scoring.settings import CalibrationSettings
from sdprune_jax.stages import finetune, inputs, pretrain
from sdprune_jax.stages import router as router_stage
from sdprune_jax.stages.prune import open_calibration
from sdprune_jax.training import encoded, loop

_Shape = jax.ShapeDtypeStruct
_VOCAB_SIZE = 2048  # stands for a tokenizer that is not trained yet; the UNet does not depend on it


def lower(run: config.Run, stage: str, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the program that takes most of the time of a stage.

    Args:
        run: the config of the run.
        stage: one of `STAGES`. Trainings have their step: `pretrain` that of the UNet, `finetune`
            that of an expert as large as the UNet. `prune` has the calibration of the UNet by a
            batch of prompts; `generate` and `evaluate` draw a batch of pictures; `features` has
            Inception-v3 on a chunk of pictures a device.
        mesh: devices, which need not be there.

    Raises:
        UserError: if the section of the stage is not set, or its batch does not fit the mesh.
    """
    section = getattr(run, "evaluate" if stage == "features" else stage)
    if section is None:
        raise UserError(f"--stage={stage}: config.{stage} is not set; use another stage or config")
    return STAGES[stage](run, section, mesh)


def batch_shapes(
    model: model_directory.ModelConfig,
    batch_size: int,
    size: int,
    stage: str,
    mesh: Mesh,
    width: int,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what `encoded.Examples.batch` gives a stage; embedded prompts are `width` wide."""
    text, latent = model.text_encoder, (size, size, model.unet.in_channels)
    kinds = {
        "embedding": _Shape((batch_size, width), jnp.float32),
        "text": _Shape((batch_size, text.max_position_embeddings, text.hidden_size), jnp.float16),
        "mean": _Shape((batch_size, *latent), jnp.float32),
        "log_variance": _Shape((batch_size, *latent), jnp.float32),
    }
    if stage == "router":
        kinds["warms_up"] = _Shape((batch_size,), jnp.bool_)
    return _split(kinds, mesh)


def _router(run: config.Run, section: config.Router, mesh: Mesh) -> jax.stages.Lowered:
    model = inputs.open_model(run)
    _check("router", section.batch_size, mesh)
    layout, (_, costs) = layout_of(sites.table(model.unet)), router_stage.budget(section, model)
    size, width = _latent_size_and_width(section.data, model)
    params = jax.eval_shape(
        lambda: jax.tree.map(jnp.asarray, router.init_params(layout, width, section.num_codes, 0))
    )
    return _step(
        router_stage.make_loss(section, model, costs, layout, jnp.dtype(run.dtype)),
        router_stage.make_optimizer(section),
        params,
        model_directory.param_shapes(model, "unet"),
        batch_shapes(model, section.batch_size, size, "router", mesh, width),
        mesh,
    )


def _finetune(run: config.Run, section: config.Finetune, mesh: Mesh) -> jax.stages.Lowered:
    model, batch_size = inputs.open_model(run), section.training.batch_size
    _check("finetune.training", batch_size, mesh)
    params, text = model_directory.param_shapes(model, "unet"), model.text_encoder
    null = _Shape((1, text.max_position_embeddings, text.hidden_size), jnp.float32)
    makes_experts = run.router or run.slice
    data = makes_experts.data if makes_experts else config.RouterData()
    size, width = _latent_size_and_width(data, model)
    return _step(
        finetune.make_loss(section, model, model.unet, jnp.dtype(run.dtype)),
        finetune.make_optimizer(section),
        params,
        {"teacher": params, "null": null},
        batch_shapes(model, batch_size, size, "finetune", mesh, width),
        mesh,
    )


def _pretrain(run: config.Run, section: config.Pretrain, mesh: Mesh) -> jax.stages.Lowered:
    del run
    batch_size = section.unet.training.batch_size
    _check("pretrain.unet.training", batch_size, mesh)
    clip = pretrain.configure_clip(section.clip, _VOCAB_SIZE).text
    vae = pretrain.configure_vae(section.vae)
    unet_config = pretrain.configure_unet(section.unet, vae, clip)
    text = (clip.max_position_embeddings, clip.hidden_size)
    latent = (batch_size, *(unet_config.sample_size,) * 2, unet_config.in_channels)
    batch = {
        "mean": _Shape(latent, jnp.float32),
        "log_variance": _Shape(latent, jnp.float32),
        "text": _Shape((batch_size, *text), jnp.float16),
    }
    return _step(
        pretrain.make_unet_loss(section.unet, unet_config, vae.scaling_factor),
        inputs.adamw(section.unet.training),
        unet.param_shapes(unet_config),
        {"null": _Shape((1, *text), jnp.float32)},
        _split(batch, mesh),
        mesh,
    )


def _prune(run: config.Run, section: config.Prune, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the calibration of the first package of layers whose statistics fit in memory."""
    part = section.unet
    statistic = STATISTIC[part.method] if part else None
    if part is None or statistic in (None, "gradient"):
        fit = [name for name, kind in STATISTIC.items() if kind not in (None, "gradient")]
        raise UserError(
            "--stage=prune: nothing walks from noise to a picture; set config.prune.unet.method to"
            f" one of {', '.join(fit)}"
        )
    _check("prune.calibration", section.calibration.batch_size, mesh)
    model = inputs.open_model(run)
    layers = sites.prunable(model_directory.param_shapes(model, "unet"), "unet", part.scope)
    calibration = open_calibration(section.calibration, model, "unet", mesh, 0, "")
    first = calibration.packages(layers, statistic)[0]
    return _walk(model, mesh, first, statistic.removeprefix("weighted_"), calibration.settings)


def _walk(
    model: model_directory.ModelConfig,
    mesh: Mesh,
    paths: Sequence[str],
    statistic: Any,
    settings: CalibrationSettings,
) -> jax.stages.Lowered:
    """Lowers what a calibration of these kernels runs for every batch of prompts."""
    apart = (*read.TIME, read.TEXT)  # inputs of layers that read no picture
    leaders = [group[0] for name, group in read.groups(paths).items() if name not in apart]
    params, size = unet.param_shapes(model.unet), settings.batch_size
    setup = calibrate.setup_of(model, params, mesh, leaders, statistic, settings)
    table = samplers.timetable(model.schedule, settings.sampler, settings.num_steps)
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    shape = lambda *axes, place=whole: _Shape(axes, jnp.float32, sharding=place)
    on_all = lambda tree: jax.tree.map(lambda x: _Shape(x.shape, x.dtype, sharding=whole), tree)
    stats = _sharded(jax.eval_shape(lambda: accumulate.zeros(setup)), mesh)
    text = (model.text_encoder.max_position_embeddings, model.text_encoder.hidden_size)
    batch = (shape(size, *a, place=split) for a in (calibrate.noise_shape(model), text, ()))
    negative = shape(1, *text) if settings.guidance_scale > 1 else None
    calls = on_all(jax.tree.map(jnp.asarray, table)), shape(len(table.timestep)), shape()
    key = on_all(jax.eval_shape(lambda: jax.random.key(0)))
    return accumulate.add_trajectories.lower(
        setup, on_all(params), stats, *batch, negative, *calls, key
    )


class _Drawing(NamedTuple):
    """How a batch of pictures is drawn; a size is in pixels, None is the model's own."""

    batch_size: int
    sampler: str | None
    num_steps: int
    guidance_scale: float
    height: int | None
    width: int | None


def _generate(run: config.Run, section: config.Generate, mesh: Mesh) -> jax.stages.Lowered:
    fields = {name: getattr(section, name) for name in _Drawing._fields}
    return _draw(run, mesh, "generate", _Drawing(**fields))


def _evaluate(run: config.Run, section: config.Evaluate, mesh: Mesh) -> jax.stages.Lowered:
    protocol = PROTOCOLS[section.protocol]
    size, sampler = protocol.generate_size, (protocol.sampler, protocol.num_steps)
    drawing = _Drawing(section.batch_size, *sampler, protocol.guidance_scale, size, size)
    return _draw(run, mesh, "evaluate", drawing)


def _draw(run: config.Run, mesh: Mesh, stage: str, drawing: _Drawing) -> jax.stages.Lowered:
    """Lowers the way from prompts to pictures."""
    batch_size, sampler, num_steps, guidance_scale, *size = drawing
    _check(stage, batch_size, mesh)
    model = inputs.open_model(run)
    program = pipeline.sample_program(
        model, mesh, sampler, num_steps, guidance_scale > 1, jnp.dtype(run.dtype)
    )
    params = {
        name: _sharded(model_directory.param_shapes(model, name), mesh)
        for name in model_directory.COMPONENTS
    }
    own, length = model.unet.sample_size, model.text_encoder.max_position_embeddings
    h, w = (pixels // model.vae.downscale if pixels else own for pixels in size)
    batch = {
        "ids": _Shape((batch_size, length), jnp.int32),
        "noise": _Shape((batch_size, h, w, model.vae.latent_channels), jnp.float32),
    }
    batch, whole = _split(batch, mesh), sharding.replicated(mesh)
    negative = _Shape((1, length), jnp.int32, sharding=whole)
    scale = _Shape((), jnp.float32, sharding=whole)
    return program.lower(params, batch["ids"], negative, batch["noise"], scale)


def _features(run: config.Run, section: config.Evaluate, mesh: Mesh) -> jax.stages.Lowered:
    del run, section

    def embed(params: Any, images: jax.Array) -> jax.Array:
        scaled = inception.NORMALISE["pytorch_fid"](images.astype(jnp.float32))
        return inception.InceptionV3().apply({"params": params}, scaled)  # pyrefly: ignore

    whole = sharding.replicated(mesh)
    params = jax.tree.map(lambda x: x.update(sharding=whole), inception.param_shapes())
    images = _Shape((features.CHUNK * mesh.size, 299, 299, 3), jnp.float32)
    program: Any = features.program(embed, mesh)
    return program.lower(params, _split({"images": images}, mesh)["images"])


def _step(
    loss_fn: loop.LossFn,
    optimizer: optax.GradientTransformation,
    params: Any,
    frozen: Any,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
) -> jax.stages.Lowered:
    """Lowers a training step; any decay of the moving average makes the same program."""
    state = jax.eval_shape(functools.partial(loop.init_state, optimizer=optimizer), params)
    places = sharding.fsdp_shardings(state, mesh)
    step: Any = loop.make_train_step(loss_fn, optimizer, mesh, places, ema_decay=0.999)
    key = jax.eval_shape(lambda: jax.random.key(0)).update(sharding=sharding.replicated(mesh))
    return step.lower(_sharded(state, mesh), _sharded(frozen, mesh), batch, key)


def _latent_size_and_width(
    section: config.RouterData, model: model_directory.ModelConfig
) -> tuple[int, int]:
    """Returns the side of the latents that are trained on, and the width of embedded prompts."""
    width = encoded.encoder_config(section.encoder, model).hidden_size
    return inputs.picture_source(section).side // model.vae.downscale, width


def _sharded(tree: Any, mesh: Mesh) -> Any:
    places = sharding.fsdp_shardings(tree, mesh)
    return jax.tree.map(lambda x, s: x.update(sharding=s), tree, places)


def _split(
    shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    split = sharding.batch_sharding(mesh)
    return {name: x.update(sharding=split) for name, x in shapes.items()}


def _check(section: str, batch_size: int, mesh: Mesh) -> None:
    if batch_size % mesh.size:
        raise UserError(
            f"config.{section}: a batch of {batch_size} is not split over {mesh.size} devices;"
            f" use a multiple, such as {math.ceil(batch_size / mesh.size) * mesh.size}"
        )


STAGES: Mapping[str, Callable[[config.Run, Any, Mesh], jax.stages.Lowered]] = {
    "router": _router,
    "finetune": _finetune,
    "pretrain": _pretrain,
    "prune": _prune,
    "generate": _generate,
    "evaluate": _evaluate,
    "features": _features,
}
