"""What a report reads of a run: the form of the files, checked before anything is said."""

import pathlib
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdprune_jax import UserError
from sdprune_jax.files import json_files
from sdprune_jax.report import forms


class Files(NamedTuple):
    """The contents of a run's files; each is empty if its file is missing."""

    prune: Mapping[str, Any]  # prune.json
    images: Mapping[str, Any]  # images/generate.json
    evaluation: Mapping[str, Any]  # evaluate.json
    sweep: Mapping[str, Any]  # sweep.json
    settings: Mapping[str, Any]  # config.json
    experts: Mapping[str, Any]  # experts/experts.json
    assigned: Mapping[str, Any]  # assign/assign.json
    finetuned: Mapping[str, Any]  # finetuned/finetune.json
    texts: Mapping[str, Any]  # by expert and split, prompts.json
    folder: pathlib.Path  # holds the pictures


def read(workdir: pathlib.Path, num_images: int) -> Files:
    """Reads what a report needs.

    Args:
        workdir: directory of the run.
        num_images: prompts whose pictures must be there.

    Raises:
        ValueError: naming all that is not as the stages before write it.
    """
    if not workdir.is_dir():
        raise UserError(f"{workdir} is no directory, so there is nothing to report; check workdir")
    contents, problems = [], []
    for name, form in forms.FORMS.items():
        path = workdir / name
        contents.append(json_files.read_json(path) if path.exists() else {})
        problems += _misfits(contents[-1], form, path.name) if path.exists() else []
    texts = {}
    for path in sorted((workdir / "experts").glob("*/prompts.json")):
        texts[path.parent.name] = json_files.read_json(path)
        problems += _misfits(
            texts[path.parent.name], {"*": [str]}, f"{path.parent.name}/{path.name}"
        )
    prune, images, evaluation, sweep, settings, experts, assigned, finetuned = contents
    if not problems:  # contents only once the form is sound
        problems += [*_prune_problems(prune), *_images_problems(images), *_score_problems(images)]
        problems += _expert_problems(experts, images)
    if not problems:
        problems += _picture_problems(images, workdir / "images", num_images)
    if problems:
        raise UserError(
            f"{workdir} cannot be reported; run the stage again that wrote what is wrong:\n  "
            + json_files.listing(problems)
        )
    return Files(
        prune,
        images,
        evaluation,
        sweep,
        settings,
        experts,
        assigned,
        finetuned,
        texts,
        workdir / "images",
    )


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
        for key in ("files", "found", "psnr_to_dense", "expert"):
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


def _expert_problems(experts: Mapping[str, Any], images: Mapping[str, Any]) -> Iterator[str]:
    rows = experts.get("experts", [])
    units = experts.get("dense", {}).get("units", {})
    for row in rows:
        for site, kept in row["kept"].items():
            if not 0 <= kept <= units.get(site, kept):
                whole = units.get(site, "its")
                yield f"experts.json: {row['directory']}: {site} keeps {kept} of {whole} units"
    for name, model in images.get("models", {}).items():
        wrong = sorted(set(model.get("expert", [])) - set(range(len(rows))))
        if wrong:
            yield f"generate.json: {name}: of the {len(rows)} experts, {wrong} drew pictures"


def _picture_problems(
    images: Mapping[str, Any], folder: pathlib.Path, num_images: int
) -> Iterator[str]:
    shapes: dict[int, tuple[int, ...]] = {}  # by picture, as the first model drew it
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
