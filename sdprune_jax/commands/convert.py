r"""Converts Stable Diffusion 2 between diffusers, old Flax and single-file checkpoints.

    sdprune convert models/sd2-1-base sd2.safetensors --dtype float16
    sdprune convert v2-1_512-ema-pruned.safetensors models/sd2 --prediction-type epsilon
    sdprune convert old-flax-model models/sd2

Also reads what the authors of APTP publish: a pruning, into the router of a run, and experts.

    sdprune convert aptp/pruning runs/aptp --from aptp --config models/sd21
    sdprune convert aptp/arch3/checkpoint-30000 runs/aptp/finetuned/03 --from aptp \
        --config models/sd21
"""

import argparse
import contextlib
import os
import pathlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import safetensors.numpy

from sdprune_jax import UserError
from sdprune_jax.commands import aptp_files, flax_files, infer_configs, single_file
from sdprune_jax.files import json_files, model_directory, tensors

DTYPES = {"keep": None, "float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}
FORMATS = ("auto", "diffusers", "flax", "single")


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    source, target = args.source, args.target
    kind = _format(source) if args.source_format == "auto" else args.source_format
    if args.target_format == "auto":
        args.target_format = "single" if target.suffix == ".safetensors" else "diffusers"
    if kind == "aptp" and args.config is None:
        raise UserError("what APTP's authors publish needs --config: the dense model it is of")
    if kind == "aptp" and args.target_format != "diffusers":
        raise UserError("what APTP's authors publish has no single file: choose a directory")
    if kind == "aptp" and (source / "hypernet").is_dir():
        dense = model_directory.open_model(args.config)
        print(aptp_files.write_pruning(source, target, dense, args.encoder))
        return
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} exists: choose another name, or add --overwrite")
    if target.is_dir() and not (target / "model_index.json").is_file():
        raise UserError(f"{target} is not a model, so it is not overwritten")
    with _configs(args, kind) as model:
        params, extra = _read(args, kind, model)
        _write(args, model, params, extra)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sdprune convert", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("source", type=pathlib.Path)
    add("target", type=pathlib.Path)
    add("--from", dest="source_format", choices=(*FORMATS, "aptp"), default="auto")
    add("--to", dest="target_format", choices=FORMATS, default="auto")
    add("--dtype", choices=DTYPES, default="keep", help="dtype of the weights written")
    add("--variant", help="fp16 reads *.fp16.safetensors")
    text = "diffusers directory: configs, tokenizer of a single file; of aptp, the dense model"
    add("--config", type=pathlib.Path, help=text)
    text = "directory of sentence-transformers that embeds prompts, for a pruning of aptp"
    add("--encoder", default="models/all-mpnet-base-v2", help=text)
    text = "what a single file predicts: epsilon at 512 pixels, v_prediction at 768"
    add("--prediction-type", choices=("epsilon", "v_prediction"), help=text)
    text = f"keep what is no parameter in {single_file.EXTRA_FILE}"
    add("--keep-extra", action="store_true", help=text)
    add("--overwrite", action="store_true")
    return parser


def _format(source: pathlib.Path) -> str:
    if source.is_dir():
        is_flax = any((source / name / file).exists() for name, file in flax_files.FILES.items())
        has_safetensors = any((source / "unet").glob("*.safetensors*"))
        if (source / "hypernet").is_dir() or (source / "arch_vector.pt").is_file():
            return "aptp"
        return "flax" if is_flax and not has_safetensors else "diffusers"
    if source.suffix != ".safetensors":
        raise UserError(f"{source} is neither a directory nor a .safetensors file")
    return "single"


@contextlib.contextmanager
def _configs(args: argparse.Namespace, kind: str) -> Iterator[model_directory.ModelConfig]:
    if kind == "aptp":
        yield aptp_files.expert(args.source, model_directory.open_model(args.config))
    elif kind != "single":
        yield model_directory.open_model(args.source)
    elif args.config is not None:
        yield model_directory.open_model(args.config)
    elif args.prediction_type is None:
        raise UserError(
            "a single file does not say what it predicts: give --prediction-type or --config"
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            stored = tensors.open_file(args.source)
            infer_configs.write_configs(stored, args.prediction_type, pathlib.Path(folder))
            print("no --config: copy tokenizer/ from another Stable Diffusion 2 directory")
            yield model_directory.open_model(folder)


def _read(
    args: argparse.Namespace, kind: str, model: model_directory.ModelConfig
) -> tuple[dict[str, Any], dict[str, tensors.StoredTensor]]:
    if kind == "single":
        return single_file.read(args.source, model)
    if kind == "aptp":
        shapes = model_directory.param_shapes(model, "unet")
        return {"unet": model_directory.load_params(args.source / "unet", shapes)}, {}
    params, extra = {}, {}
    for component in model_directory.COMPONENTS:
        if kind == "flax":
            file = args.source / component / flax_files.FILES[component]
            shapes = model_directory.param_shapes(model, component)
            params[component] = flax_files.read(file, shapes, component)
        else:
            params[component] = model_directory.load(model, component, variant=args.variant)
    if (args.source / single_file.EXTRA_FILE).is_file():
        extra = tensors.open_file(args.source / single_file.EXTRA_FILE)
    return params, extra


def _write(
    args: argparse.Namespace,
    model: model_directory.ModelConfig,
    params: Mapping[str, Any],
    extra: Mapping[str, tensors.StoredTensor],
) -> None:
    target, dtype = args.target, DTYPES[args.dtype]
    if args.target_format == "single":
        new = target.with_name(f"{target.name}.new")
        single_file.write(new, model, params, dtype, extra)
        os.replace(new, target)
        return
    if args.target_format == "diffusers":
        model_directory.save(model, params, target, dtype=dtype, overwrite=args.overwrite)
    else:
        with model_directory.replacing(target) as new:
            new.mkdir(parents=True)
            flax_files.write(new, model, params, dtype)
    if extra and args.keep_extra:
        kept = {name: tensor.read() for name, tensor in extra.items()}
        safetensors.numpy.save_file(kept, target / single_file.EXTRA_FILE)
    elif extra:
        groups = Counter(_group(name) for name in extra)
        print(f"{len(extra)} tensors have no place in the new form (--keep-extra keeps them):")
        print(json_files.listing([f"{name} ({count} tensors)" for name, count in groups.items()]))


def _group(name: str) -> str:
    """Returns the block that a tensor belongs to, or its own name."""
    if name.startswith("model_ema."):
        return "model_ema"
    head, is_layer, rest = name.partition(".resblocks.")
    return f"{head}{is_layer}{rest.split('.')[0]}" if is_layer else name
