"""Stage `evaluate`: every model of the run under one protocol.

Images are kept as files and features in a cache, so an interrupted evaluation goes on, and one of
more images or other metrics computes what is missing.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Float, Num, UInt8

from sdprune_jax import checkpoint, config, pipeline, sharding, tensors
from sdprune_jax.aptp import routed
from sdprune_jax.data import cache
from sdprune_jax.data.images import RESIZE
from sdprune_jax.evaluate import images, needs, networks, scores, task
from sdprune_jax.evaluate.protocols import PROTOCOLS, Metric, Protocol
from sdprune_jax.metrics import features

# From an index to the picture as the protocol's files hold it.
_Read = Callable[[int], UInt8[np.ndarray, "h w 3"]]


def run(run: config.Run, mesh: Mesh) -> pathlib.Path:
    """Writes `workdir/evaluate.json`: the protocol, and every figure of every model.

    Beside a figure stand the number of its images and, where there is one, its interval. What means
    are of, image by image, is in `evaluate/values-*.npz`, by the record's fingerprint: prompts and
    noise are the same for all models of all runs of a protocol, so these can be compared in pairs.

    Raises:
        ValueError: naming what the protocol needs that is not there.
    """
    section, work = run.evaluate, pathlib.Path(run.workdir)
    assert section is not None
    protocol = PROTOCOLS[section.protocol]
    directories = checkpoint.models_of_run(run.model, work)
    dense = checkpoint.open_model(directories["dense"][0])
    size = (protocol.generate_size or dense.unet.sample_size * dense.vae.downscale,) * 2
    needs.check(section, size[0])
    asked = task.load(
        protocol.data, section.data, section.num_images or protocol.num_images,
        needs.has_pictures(section, protocol),
    )  # fmt: skip
    num_images = len(asked.prompts)  # rows that were skipped are missing
    perceptual = networks.load_lpips(section.networks, dense, size)
    record = work / "evaluate.json"
    states = routed.states(directories, work)
    made_from = cache.fingerprint(
        dataclasses.asdict(section), dataclasses.asdict(protocol), run.seed, run.dtype,
        run.variant, states, asked.state, asked.prompts, needs.states(section, protocol),
        *([perceptual.weights] if perceptual else []),
    )  # fmt: skip
    if sharding.of_first(lambda: tensors.is_record_of(record, made_from)):
        logging.info("%s is complete: made from the same config and models", record)
        return record

    folders = {
        name: work / "evaluate" / f"{name}-{_key(run, protocol, state, asked, size)}"
        for name, state in states.items()
    }
    models = routed.models(directories, work, dense, asked.prompts, mesh)
    _render(run, mesh, protocol, models, folders, asked.prompts, size)
    loaded = load_networks(section, protocol, dense)
    figures = measure(section, mesh, protocol, loaded, folders, asked, work / "evaluate" / "cache")
    for name, folder in folders.items():
        if name != "dense":
            pair = (folder, folders["dense"], num_images)
            figures[name] |= scores.to_dense(*pair, section.num_resamples)
            if perceptual:
                figures[name] |= scores.lpips_to_dense(
                    *pair, perceptual, mesh, num_resamples=section.num_resamples
                )
    of_each: dict[str, Any] = {
        f"{name}/{key}": x
        for name, found in figures.items()
        for key, x in scores.take_values(found).items()
    }
    values = {
        "made_from": made_from,
        "dense": states["dense"][0],
        "protocol": dataclasses.asdict(protocol)
        | {"evaluated": num_images, "references": asked.num_references}
        | {"height": size[0], "width": size[1], "seed": run.seed, "dtype": run.dtype},
        "weights": {name: network.weights for name, network in loaded.items()}
        | ({"lpips": perceptual.weights} if perceptual else {}),
        "models": {
            name: drawn.said() | {"figures": figures[name]} for name, drawn in models.items()
        },
    }
    if jax.process_index() == 0:
        np.savez(values_path(work, made_from), **of_each)
        tensors.write_json(record, values)
    sharding.wait_for_all(record.name)
    return record


def values_path(workdir: pathlib.Path, made_from: str) -> pathlib.Path:
    """Where the values of each image are: arrays `model/figure` of one evaluation."""
    return workdir / "evaluate" / f"values-{made_from}.npz"


def _key(
    run: config.Run, protocol: Protocol, state: Any, asked: task.Task, size: tuple[int, int]
) -> str:
    """Changes with all that an image depends on, but for how many there are."""
    how = (protocol.data, protocol.sampler or "", protocol.num_steps, protocol.guidance_scale)
    return cache.fingerprint(how, state, asked.state, size, run.seed, run.dtype, run.variant)


def _render(
    run: config.Run,
    mesh: Mesh,
    protocol: Protocol,
    models: Mapping[str, routed.Drawn],
    folders: Mapping[str, pathlib.Path],
    prompts: Sequence[str],
    size: tuple[int, int],
) -> None:
    assert run.evaluate is not None
    for name, drawn in models.items():
        for directory, index in drawn.parts():
            model = checkpoint.open_model(directory)
            sample = pipeline.make_sample(
                model, mesh, sampler=protocol.sampler, num_steps=protocol.num_steps,
                guided=protocol.guidance_scale > 1, dtype=jnp.dtype(run.dtype),
            )  # fmt: skip
            variant = run.variant if name == "dense" else None
            # The weights are named nowhere here: they are gone before the next expert's come.
            images.complete(
                folders[name], model, pipeline.load(model, mesh, variant), sample,
                prompts, index, size=size, seed=run.seed, batch_size=run.evaluate.batch_size,
                guidance_scale=protocol.guidance_scale, negative_prompt="",
            )  # fmt: skip


def load_networks(
    section: config.Evaluate, protocol: Protocol, dense: checkpoint.Model
) -> dict[str, networks.Network]:
    """All that a protocol's metrics need, by name."""
    names = needs.network_names(protocol)
    return {name: networks.load(name, section.networks, dense) for name in names}


def measure(
    section: config.Evaluate,
    mesh: Mesh,
    protocol: Protocol,
    loaded: Mapping[str, networks.Network],
    folders: Mapping[str, pathlib.Path],
    asked: task.Task,
    cached: pathlib.Path,
) -> dict[str, scores.Figures]:
    """The figures of every model, of the images in its folder.

    Args:
        section: where reference statistics are, and the number of resamples.
        mesh: of `sharding.make_mesh`.
        protocol: what to measure.
        loaded: of `load_networks`.
        folders: of images, by model; features are kept in `cache` beside each.
        asked: prompts and reference pictures.
        cached: where the features of the reference pictures are kept.
    """
    num_images = len(asked.prompts)
    figures: dict[str, scores.Figures] = {name: {} for name in folders}
    for metric in protocol.metrics:
        network = loaded[metric.network]
        extract = functools.partial(_features, network, metric, protocol, mesh)
        wanted = {}
        for name, folder in folders.items():
            read = functools.partial(_generated, folder, None if metric.is_fresh else protocol)
            state = f"{folder.name}:{num_images}"
            wanted[name] = extract(folder.parent / "cache", read, num_images, state)
        reference = None
        if asked.reference and needs.reads_pictures(section, metric.kind):
            read = functools.partial(_real, asked.reference, protocol)
            reference = extract(cached, read, asked.num_references, f"real:{asked.state}")
        found = scores.of_metric(
            metric, wanted, reference, network, asked, mesh,
            references=section.references, num_resamples=section.num_resamples,
        )  # fmt: skip
        for name in folders:
            figures[name] |= found[name]
    return figures


def _features(
    network: networks.Network,
    metric: Metric,
    protocol: Protocol,
    mesh: Mesh,
    directory: pathlib.Path,
    read: _Read,
    num_images: int,
    state: str,
) -> Float[np.ndarray, "n d"]:
    def load(index: Num[np.ndarray, " b"]) -> Num[np.ndarray, "b h w 3"]:
        return np.stack([_resized(read(int(i)), metric.resize, metric.size) for i in index])

    how = {
        "resize": metric.resize, "size": metric.size, "is_fresh": metric.is_fresh,
        "files": [protocol.file_size, protocol.file_resize, protocol.jpeg_quality],
    }  # fmt: skip
    compute = lambda: features.extract(network.embed, network.params, load, num_images, mesh)
    return features.cached(directory, network.weights, how, state, compute)


def _generated(
    folder: pathlib.Path, protocol: Protocol | None, index: int
) -> UInt8[np.ndarray, "h w 3"]:
    image = images.picture(folder, index)
    if protocol is None:
        return image
    if protocol.jpeg_quality:
        image = images.through_jpeg(image, protocol.jpeg_quality)
    return _filed(image, protocol, protocol.file_resize[0])


def _real(read: _Read, protocol: Protocol, index: int) -> UInt8[np.ndarray, "h w 3"]:
    return _filed(read(index), protocol, protocol.file_resize[1])


def _filed(
    image: UInt8[np.ndarray, "h w 3"], protocol: Protocol, rule: str
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """As the protocol's files hold it."""
    if protocol.file_size:
        image = np.round(_resized(image, rule, protocol.file_size)).astype(np.uint8)
    if protocol.jpeg_quality:
        image = images.through_jpeg(image, protocol.jpeg_quality)
    return image


def _resized(image: UInt8[np.ndarray, "h w 3"], rule: str, size: int) -> Num[np.ndarray, "h2 w2 3"]:
    return image if rule == "none" else RESIZE[rule](image, size)
