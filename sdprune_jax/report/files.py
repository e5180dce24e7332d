"""What a report reads of a run: the form of the files, checked before anything is said."""

import pathlib
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdprune_jax import tensors

# A type, [of every item], {key: of its value}. "*" is any key; one that ends in "?" may be missing.
_NUMBER = (int, float)
_LAYER = {"name": str, "shape": [int], "weights": int, "zeros": int, "threshold": _NUMBER}
_COMPONENT = {
    **dict.fromkeys(("scope", "threshold"), str),
    **dict.fromkeys(("requested", "of_prunable", "of_component", "of_pipeline"), _NUMBER),
    **dict.fromkeys(("parameters", "prunable", "zeros", "underflow_zeros"), int),
    "layers": [_LAYER],
    "histogram": {"edges": [_NUMBER], "dense": [int], "pruned": [int]},
}
_PRUNE = {
    **dict.fromkeys(("model", "directory", "save_dtype"), str),
    "seconds": {"*": _NUMBER},
    "pipeline_parameters": int,
    "of_pipeline": _NUMBER,
    "bytes": dict.fromkeys(("dense", "pruned", "dense_gzip", "pruned_gzip"), int),
    "components": {"*": _COMPONENT},
}
_MODEL = {
    "files": [str],
    **dict.fromkeys(("seconds", "first_batch_seconds?", "seconds_per_image?"), _NUMBER),
    "scores": {"*": _NUMBER},
    "found": [bool],
    "psnr_to_dense?": [_NUMBER],
}
_IMAGES = {"protocol": {}, "prompts": [str], "models": {"*": _MODEL}, "chance": {"*": _NUMBER}}
_EVALUATION = {
    "protocol": {
        **dict.fromkeys(("name", "source", "remarks"), str),
        **dict.fromkeys(("num_images", "evaluated"), int),
    },
    "models": {"*": {"figures": {"*": {"value": _NUMBER, "low?": _NUMBER, "high?": _NUMBER}}}},
}
_FIGURES = {"*": {"value": _NUMBER, "low?": _NUMBER, "high?": _NUMBER}}
_SWEEP = {
    "agreement": str,
    "prompts": [str],
    "protocol": {"name": str, "evaluated": int},
    "dense": [{"seed": int, "images": str, "figures": _FIGURES, "chance": {"*": _NUMBER}}],
    "rows": [
        {
            "seed": int,
            "zeros": int,
            **dict.fromkeys(("nominal", "true"), _NUMBER),
            "components": {"*": {"method": str, "sparsity": _NUMBER}},
            "figures": _FIGURES,
            **dict.fromkeys(("images?", "failed?"), str),
        }
    ],
    "cliffs": [
        {
            **dict.fromkeys(("component", "method", "criterion", "why_not?"), str),
            **dict.fromkeys(("limit", "whole?", "broken?"), _NUMBER),
        }
    ],
}
_FORMS = {
    "prune.json": _PRUNE,
    "images/generate.json": _IMAGES,
    "evaluate.json": _EVALUATION,
    "sweep.json": _SWEEP,
    "config.json": {},
}


class Files(NamedTuple):
    """The contents of a run's files; each is empty if its file is missing."""

    prune: Mapping[str, Any]  # prune.json
    images: Mapping[str, Any]  # images/generate.json
    evaluation: Mapping[str, Any]  # evaluate.json
    sweep: Mapping[str, Any]  # sweep.json
    settings: Mapping[str, Any]  # config.json
    folder: pathlib.Path  # of the pictures


def read(workdir: pathlib.Path, num_images: int) -> Files:
    """Reads what a report needs.

    Args:
        workdir: of the run.
        num_images: prompts whose pictures must be there.

    Raises:
        ValueError: naming all that is not as the stages before write it.
    """
    if not workdir.is_dir():
        raise ValueError(f"{workdir} is no directory, so there is nothing to report; check workdir")
    found, problems = [], []
    for name, form in _FORMS.items():
        path = workdir / name
        found.append(tensors.read_json(path) if path.exists() else {})
        problems += _misfits(found[-1], form, path.name) if path.exists() else []
    prune, images, evaluation, sweep, settings = found
    if not problems:  # contents only once the form is sound
        problems += [*_prune_problems(prune), *_images_problems(images), *_score_problems(images)]
    if not problems:
        problems += _picture_problems(images, workdir / "images", num_images)
    if problems:
        raise ValueError(
            f"{workdir} cannot be reported; run the stage again that wrote what is wrong:\n  "
            + tensors.listing(problems)
        )
    return Files(prune, images, evaluation, sweep, settings, workdir / "images")


def picture(path: pathlib.Path) -> UInt8[np.ndarray, "h w 3"]:
    return np.asarray(Image.open(path).convert("RGB"))


def _misfits(value: Any, form: Any, where: str) -> Iterator[str]:
    """What in `value` has another form."""
    kind = type(form) if isinstance(form, dict | list) else form
    is_kind = isinstance(value, kind) and (form is bool or not isinstance(value, bool))
    if not is_kind:
        names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
        yield f"{where} is {reprlib.repr(value)}, expected {names.get(kind, 'a number')}"
    elif isinstance(form, list):
        for i, item in enumerate(value):
            yield from _misfits(item, form[0], f"{where}[{i}]")
    elif isinstance(form, dict):
        for key in value if "*" in form else form:
            name = key if "*" in form else key.removesuffix("?")
            if name in value:
                yield from _misfits(value[name], form.get("*", form.get(key)), f"{where}: {name}")
            elif name == key:
                yield f"{where}: {name} is missing"


def _prune_problems(prune: Mapping[str, Any]) -> Iterator[str]:
    if not prune:
        return
    for name, size in prune["bytes"].items():
        if size <= 0:
            yield f"prune.json: bytes: {name} is {size}, expected more than 0"
    for name, component in prune["components"].items():
        for layer in component["layers"]:
            if not 0 <= layer["zeros"] <= layer["weights"] or not layer["weights"]:
                yield (
                    f"prune.json: {name}: {layer['name']} has {layer['zeros']} zeros among "
                    f"{layer['weights']} weights"
                )
        bins = component["histogram"]
        edges, num_bins = bins["edges"], (len(bins["dense"]), len(bins["pruned"]))
        if not len(edges) > 1 or num_bins != (len(edges) - 1,) * 2 or edges[-1] <= edges[0]:
            yield (
                f"prune.json: {name}: histogram has {len(edges)} edges for {num_bins[0]} dense and"
                f" {num_bins[1]} pruned counts, expected ascending edges, one more than counts"
            )


def _images_problems(images: Mapping[str, Any]) -> Iterator[str]:
    for name, model in images.get("models", {}).items():
        num_prompts = len(images["prompts"])
        for key in ("files", "found", "psnr_to_dense"):
            values = model.get(key, [])
            if len(values) != num_prompts and (values or key == "files"):
                yield (
                    f"generate.json: {name}: {key} has {len(values)} values for {num_prompts}"
                    " prompts"
                )


def _score_problems(images: Mapping[str, Any]) -> Iterator[str]:
    scores = {name: model["scores"] for name, model in images.get("models", {}).items()}
    for name, values in {**scores, "chance": images.get("chance", {})}.items():
        for key, value in values.items():
            if key != "num" and not 0 <= value <= 1:
                yield f"generate.json: {name}: {key} is {value}, expected 0 to 1"


def _picture_problems(
    images: Mapping[str, Any], folder: pathlib.Path, num_images: int
) -> Iterator[str]:
    shapes: dict[int, tuple[int, ...]] = {}  # of the first model's pictures
    for model in images.get("models", {}).values():
        for i, file in enumerate(model["files"][:num_images]):
            try:
                shape = picture(folder / file).shape
            except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three
                yield f"images/{file} cannot be read: {error}"
                continue
            if shape != shapes.setdefault(i, shape):
                sizes = " and ".join(f"{w} x {h}" for h, w, _ in (shape, shapes[i]))
                yield f"images/{file} does not compare: the sizes are {sizes} pixels"
