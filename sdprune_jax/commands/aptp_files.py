"""The form in which the authors of APTP publish what they trained.

A pruning is `hypernet/` and `quantizer/`, each a `config.json` and safetensors as diffusers writes
them: the heads of the architecture predictor, the codes, and the codes' gates of the last training
step. An expert is `unet/`, whose tensors have the names of diffusers and the sizes that are left.

Source: https://github.com/rezashkv/diffusion_pruning (pdm/models, pdm/training/trainer.py).
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sdprune_jax import UserError, artefacts, sites
from sdprune_jax.aptp import assignment, gates, router_training
from sdprune_jax.aptp.layout import Layout, layout_of
from sdprune_jax.aptp.records import RouterRecord
from sdprune_jax.data import cache
from sdprune_jax.data.pictures import PictureSource
from sdprune_jax.files import convert, json_files, model_directory, tensors
from sdprune_jax.files.weights import save_params
from sdprune_jax.models import unet

_LATENT_SIZE = (32, 32)  # that the published budgets are of: 256 pixels
# A weight that is kept as direction and length, by PyTorch's present names and its former ones.
_NORMALISED = (
    ("parametrizations.weight.original1", "parametrizations.weight.original0"),
    ("weight_v", "weight_g"),
)


class Pruning(NamedTuple):
    """What a published pruning holds.

    Attributes:
        params: parameters as a router has them.
        code_gates: soft, (k, d): those of the last training step, that its experts are cut by.
    """

    params: dict[str, Any]
    code_gates: np.ndarray


def structure(layout: Layout) -> dict[str, list[list[int]]]:
    """The gates of every ResNet and transformer, in the words of the published configs."""
    blocks: dict[str, list[int]] = {}
    for name, units in zip(layout.width, layout.units, strict=True):
        blocks.setdefault(name.partition(".transformer_blocks.")[0], []).append(units)
    depth = [[int(f"{block}.depth" in layout.depth)] for block in blocks]
    return {"width": list(blocks.values()), "depth": depth}


def read_pruning(source: pathlib.Path, layout: Layout) -> Pruning:
    """Reads the router of a pruning of the UNet that has this layout.

    Raises:
        ValueError: naming all that is missing, of another UNet, or computed in another way here.
    """
    configs = {
        name: json_files.read_json(source / name / "config.json")
        for name in ("hypernet", "quantizer")
    }
    problems = _config_problems(configs["hypernet"], configs["quantizer"], layout)
    heads, codes = (
        {key: x.read() for key, x in tensors.open_tensors(source / name).items()}
        for name in configs
    )
    if not problems:
        problems += _tensor_problems(heads, codes, configs["hypernet"], layout)
    if problems:
        raise UserError(
            f"{source} is not a pruning that can be taken over:\n  " + json_files.listing(problems)
        )
    found, soft = np.float32(codes["embedding.weight"]), np.float32(codes["embedding_gs"])
    width = configs["hypernet"]["input_dim"]
    if "arch" in heads:  # one architecture for all prompts, without a code: its logits are learned
        bias = np.float32(heads["arch"])[0]
        found, kernel = bias[None], np.zeros((width, layout.size), np.float32)
        noise = gates.published_noise(1, layout)  # that the published code cuts it by
        soft = np.asarray(gates.soft_gates(jnp.asarray(found), noise, layout))
    else:
        count = len(layout.units) + 1
        kernel = np.concatenate([_weight(heads, i) for i in range(count)]).T
        zeros = [np.zeros(n, np.float32) for n in (*layout.units, len(layout.depth))]
        bias = np.concatenate([heads.get(f"mh_fc.{i}.bias", zeros[i]) for i in range(count)])
    params = {
        "predictor": {
            "heads": {"kernel": np.ascontiguousarray(kernel, np.float32), "bias": np.float32(bias)}
        },
        "codes": found,
    }
    return Pruning(params, soft)


def write_pruning(
    source: pathlib.Path, target: pathlib.Path, model: model_directory.ModelConfig, encoder: str
) -> str:
    """Makes `target/router` of a pruning, as stage `router` leaves it; says what it holds.

    Args:
        target: working directory of a run.
        model: the dense one.
        encoder: a directory of sentence-transformers that embeds prompts; published:
            all-mpnet-base-v2.

    Raises:
        ValueError: as `read_pruning`, or if there is a router in `target`.
    """
    output = artefacts.output_of("router", target)
    if output.directory.exists():
        raise UserError(f"{output.directory} exists: choose another directory, or remove it")
    layout = layout_of(sites.table(model.unet))
    found = read_pruning(source, layout)
    costs = router_training.budget_costs(model, _LATENT_SIZE, "paper")
    keep = jnp.asarray(found.code_gates >= 0.5, jnp.float32)
    kept = np.asarray(router_training.kept_shares(keep, layout, costs))
    inputs = {
        "model": artefacts.model_state(model.directory),
        "pruning": cache.fingerprint(found.params, found.code_gates),
    }
    with artefacts.writing(output, inputs) as partial:
        save_params(partial.directory, found.params, dtype=np.float32, name="model")
        np.save(partial.directory / assignment.CODE_GATES, found.code_gates)
        partial.record = RouterRecord(
            model=str(model.directory),
            variant="",
            seed=0,
            embedding_dim=len(found.params["predictor"]["heads"]["kernel"]),
            latent_size=_LATENT_SIZE,
            num_codes=len(found.params["codes"]),
            macs_budget=round(float(kept.mean()), 4),  # the one asked for is not published
            mac_counter="paper",
            data=PictureSource(encoder=encoder),
        )
    return (
        f"{len(kept)} codes, which keep {', '.join(f'{share:.3f}' for share in kept)} of the"
        " UNet's MACs at 256 pixels, as published; next: stages assign, with"
        " final_codes=stored and fit_budget=none, and materialise"
    )


def expert(source: pathlib.Path, dense: model_directory.ModelConfig) -> model_directory.ModelConfig:
    """The model of a published expert; what of its tensors does not fit is told when they are read.

    Raises:
        ValueError: if there are none.
    """
    stored = tensors.open_tensors(source / "unet")
    kept = kept_units({name: x.shape for name, x in stored.items()}, dense.unet)
    return dataclasses.replace(dense, unet=dataclasses.replace(dense.unet, kept_units=kept))


def kept_units(
    shapes: Mapping[str, Sequence[int]], dense: unet.UNetConfig
) -> tuple[tuple[str, int], ...]:
    """What the shapes of a UNet's tensors say that is left of the dense one: `kept_units`.

    A block without a tensor was removed. What cannot be is left for the reader of weights to tell.
    """
    table = (*sites.table(dense), *sites.operators(dense))
    blocks = {site.name.removesuffix("depth") for site in table if site.kind == "depth"}
    removed = tuple(b for b in blocks if not any(name.startswith(b) for name in shapes))
    kept = {f"{block}depth": 0 for block in removed}
    for site in table:
        if site.kind == "depth" or f"{site.name}.".startswith(removed):
            continue
        path, axis = site.members[-1]  # the layer that closes it has its channels once
        shape = shapes.get(convert.torch_key(path), ())
        if len(shape) > 1:
            channels = shape[convert.torch_axes(path, len(shape)).index(axis)]
            if 0 < (units := channels // site.unit_size) < site.units:
                kept[site.name] = units
    return tuple(sorted(kept.items()))


def _config_problems(
    heads: Mapping[str, Any], codes: Mapping[str, Any], layout: Layout
) -> list[str]:
    """Where the published router does not compute what ours does."""
    ours, num = structure(layout), len(layout.depth)
    order = codes.get("depth_order") or range(num)
    wanted = {
        "temperature": (codes.get("temperature", 0.4), gates.TEMPERATURE),
        "base": (codes.get("base", 2), gates.OFFSET),
        "depth_order": ([i % num for i in order], list(layout.depth_order)),
        "non_zero_width": (codes.get("non_zero_width", True), True),
        # The class has true where its config says nothing.
        "resource_aware_normalization": (codes.get("resource_aware_normalization", True), False),
    }
    problems = [
        f"quantizer/config.json: {name} is {found!r}, expected {want!r}"
        for name, (found, want) in wanted.items()
        if found != want
    ]
    for name, found in (("hypernet", heads), ("quantizer", codes)):
        if found.get("structure") != ours:
            problems.append(
                f"{name}/config.json: its structure is of another UNet than --config's, which has"
                f" {len(ours['width'])} blocks with {layout.size} gates"
            )
    return problems


def _tensor_problems(
    heads: Mapping[str, np.ndarray],
    codes: Mapping[str, np.ndarray],
    values: Mapping[str, Any],
    layout: Layout,
) -> list[str]:
    width, count = values["input_dim"], codes.get("embedding.weight", np.zeros(1)).shape[0]
    wanted = {
        f"quantizer {name}": (codes.get(name), (count, layout.size))
        for name in ("embedding.weight", "embedding_gs")
    }
    if values.get("single_arch_param"):
        wanted["hypernet arch"] = (heads.get("arch"), (1, layout.size))
    else:
        for i, units in enumerate((*layout.units, len(layout.depth))):
            wanted[f"hypernet mh_fc.{i}.weight"] = (_weight(heads, i), (units, width))
            if values.get("linear_bias"):
                wanted[f"hypernet mh_fc.{i}.bias"] = (heads.get(f"mh_fc.{i}.bias"), (units,))
    problems = [
        f"{name} {'is missing' if x is None else f'has shape {x.shape}'}, expected {shape}"
        for name, (x, shape) in wanted.items()
        if x is None or x.shape != shape
    ]
    if not problems and not _are_gates(codes["embedding_gs"]):
        problems.append(
            "quantizer embedding_gs are no gates: it was saved before its first training step"
        )
    return problems


def _are_gates(x: np.ndarray) -> bool:
    """In (0, 1), or lifted by half where none of a site was open."""
    return bool(((x >= 0) & (x < 1.5)).all())


def _weight(heads: Mapping[str, np.ndarray], index: int) -> Any:
    """The matrix of one head, [gates, input]; None if it is missing."""
    plain = heads.get(f"mh_fc.{index}.weight")
    for direction, length in _NORMALISED:
        v, g = (heads.get(f"mh_fc.{index}.{name}") for name in (direction, length))
        if v is not None and g is not None:
            return g * v / np.linalg.norm(v, axis=1, keepdims=True)
    return plain
