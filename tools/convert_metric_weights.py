"""Converts the networks that score images, from local files to directories that evaluation reads.

Inception v3 of pytorch-fid or torch-fidelity; CLIP of OpenAI, of open_clip or of transformers;
LPIPS from torchvision's AlexNet and weights/v0.1/alex.pth of the lpips package (v0.0 looks the same
and measures something else), which evaluation adds to any protocol if it finds it under that name:

python tools/convert_metric_weights.py pt_inception-2015-12-05-6726825d.pth metrics/inception
python tools/convert_metric_weights.py ViT-B-32.pt metrics/clip-b32 --allow-torchscript
python tools/convert_metric_weights.py open_clip_model.safetensors metrics/h14 --activation gelu
python tools/convert_metric_weights.py clip-vit-large-patch14-336 metrics/clip-l14-336
python tools/convert_metric_weights.py alexnet-owt-7be5be79.pth metrics/lpips --linear alex.pth
"""

import argparse
import hashlib
import pathlib
import pickle
import re
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import clip_files
import jax
import numpy as np
import transformers

from sdprune_jax import UserError
from sdprune_jax.files import convert, json_files, tensors, weights
from sdprune_jax.models import clip, inception, lpips

State = Mapping[str, np.ndarray]

# What PyTorch's reader of pickles raises for files that are damaged or hold more than tensors.
_DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    LookupError,
    RuntimeError,
    AssertionError,
)

_PICKLE = "pytorch_model.bin"  # in directories of transformers that are older than safetensors
_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
_COPIED = (*_TOKENIZER, "special_tokens_map.json", "preprocessor_config.json")

# What is no parameter of ours: the classifier, counters, constants.
_UNUSED = re.compile(r"(fc|classifier\.\d)\.(weight|bias)|.*\.num_batches_tracked|.*\.position_ids")


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    try:
        if args.target.exists():
            raise UserError(f"{args.target} exists: choose another name, or remove it")
        sources = [args.source, *([args.linear] if args.linear else [])]
        files = [file for source in sources for file in _weight_files(source)]
        digest = _sha256(files)
        print(f"sha256 {digest}")
        if args.sha256 and args.sha256.lower() != digest:
            raise UserError(
                f"{' and '.join(map(str, sources))} has sha256 {digest}, expected {args.sha256}: "
                "it is another file, or damaged; download it again"
            )
        state = _read(files, args.allow_torchscript)
        params, config = _converted(state, args.source, args.activation)
        _write(args.target, params, config | {"source_sha256": digest}, args.source)
    except ValueError as error:
        sys.exit(f"error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=pathlib.Path, help="file, or directory of transformers")
    parser.add_argument("target", type=pathlib.Path, help="directory to write")
    parser.add_argument(
        "--sha256", help="of the source (and --linear, after it), refused if it has another"
    )
    parser.add_argument("--linear", type=pathlib.Path, help="file of the linear layers of LPIPS")
    parser.add_argument(
        "--activation",
        choices=sorted(clip.ACTIVATIONS),
        help="of an open_clip file: quick_gelu if OpenAI trained it, gelu if LAION did",
    )
    parser.add_argument(
        "--allow-torchscript",
        action="store_true",
        help="load OpenAI's archives, which can run code: only if you trust the source",
    )
    return parser


def _weight_files(source: pathlib.Path) -> list[pathlib.Path]:
    if not source.is_dir():
        if not source.is_file():
            raise UserError(f"{source} is missing")
        return [source]
    if not any(source.glob("*.safetensors")) and (source / _PICKLE).is_file():
        return [source / _PICKLE]
    found = tensors.find_weights(source)
    if found.suffix != ".json":
        return [found]
    return [source / name for name in sorted(set(tensors.read_weight_map(found).values()))]


def _sha256(files: Sequence[pathlib.Path]) -> str:
    """Of the bytes of all files, one after another."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _read(files: Sequence[pathlib.Path], allow_torchscript: bool) -> State:
    state = {}
    for path in files:
        if path.suffix == ".safetensors":
            state |= {name: x.read() for name, x in tensors.open_file(path).items()}
        else:
            state |= _unpickled(path, allow_torchscript)
    return state


def _unpickled(path: pathlib.Path, allow_torchscript: bool) -> State:
    import torch  # not needed for safetensors

    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip and _is_torchscript(path):
            if not allow_torchscript:
                raise UserError(
                    f"{path} is a TorchScript archive, and to load it can run code. If you trust "
                    "it add --allow-torchscript, or where it can do no harm take out its tensors:\n"
                    '  python -c "import torch; '
                    f"torch.save(torch.jit.load('{path.name}', 'cpu').state_dict(), 'state.pt')\""
                )
            loaded = torch.jit.load(path, "cpu").state_dict()
        else:
            loaded = torch.load(path, "cpu", weights_only=True, mmap=is_zip)
    except _DAMAGED as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} holds no tensors that can be read: {reason}") from error
    if not isinstance(loaded, Mapping) or not all(map(torch.is_tensor, loaded.values())):
        raise UserError(f"{path} is no state dict: expected names and tensors")
    to_numpy = lambda x: (x.float() if x.dtype == torch.bfloat16 else x).detach().numpy()
    return {name: to_numpy(x) for name, x in loaded.items()}


def _is_torchscript(path: pathlib.Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _converted(
    state: State, source: pathlib.Path, activation: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nested parameters, and the contents of `config.json`."""
    as_it_is = lambda key: (key, None)
    if source.is_dir():
        values = json_files.read_json(source / "config.json")
        if values.get("model_type") != "clip":
            kind = values.get("model_type")
            raise UserError(f"{source}/config.json: model_type is {kind!r}, expected 'clip'")
        # By transformers, because what a config leaves out are the defaults of transformers.
        config = clip.CLIPConfig.from_json(transformers.CLIPConfig.from_dict(values).to_dict())
        return _matched(state, clip.clip_param_shapes(config), as_it_is), config.to_json()
    if "Conv2d_1a_3x3.conv.weight" in state:
        values = {"model_type": "inception_v3_2015_12_05"}
        return _matched(state, inception.param_shapes(), as_it_is), values
    if "features.0.weight" in state:
        if "lin0.model.1.weight" not in state:
            raise UserError(
                f"{source} has no linear layers of LPIPS: give weights/v0.1/alex.pth of the lpips"
                " package as --linear"
            )
        return _matched(state, lpips.param_shapes(), as_it_is), {"model_type": "lpips_0.1_alex"}
    if not {"visual.class_embedding", "token_embedding.weight"} <= state.keys():
        raise UserError(
            f"{source} is no Inception v3 of 2015-12-05, no AlexNet of torchvision, and no CLIP of "
            "OpenAI or open_clip with a vision transformer; it holds "
            f"{', '.join(sorted(state)[:5])}, ..."
        )
    if any(name in state for name in clip_files.ONLY_OPENAI):
        activation = activation or "quick_gelu"
    if activation is None:
        raise UserError("a state dict does not say its --activation: see --help")
    config = clip_files.clip_config({name: x.shape for name, x in state.items()}, activation)
    return _matched(state, clip.clip_param_shapes(config), clip_files.clip_name), config.to_json()


def _matched(
    state: State, shapes: Any, place: Callable[[str], tuple[str, int | None]]
) -> dict[str, Any]:
    flat, used, problems = {}, set(clip_files.ONLY_OPENAI), []
    for path, leaf in convert.flatten(shapes).items():
        name, third = place(convert.torch_key(path))
        used.add(name)
        if name not in state:
            problems.append(f"missing {name}")
            continue
        x = state[name]
        if third is not None:
            rows = len(x) // 3
            x = x[third * rows : (third + 1) * rows]
        x = x.T if name in clip_files.TRANSPOSED else x
        want = tuple(leaf.shape[axis] for axis in convert.torch_axes(path, len(leaf.shape)))
        if x.shape != want or x.dtype.type not in tensors.FLOATS.values():
            problems.append(f"{name}: {x.dtype} {x.shape}, expected {want}")
            continue
        flat[path] = convert.from_torch(path, x)
    unexpected = sorted(name for name in state.keys() - used if not _UNUSED.fullmatch(name))
    problems += [f"unexpected {name}" for name in unexpected]
    if problems:
        raise UserError(f"the tensors do not fit:\n  {json_files.listing(problems)}")
    return convert.unflatten(flat, shapes)


def _write(
    target: pathlib.Path, params: Mapping[str, Any], config: Any, source: pathlib.Path
) -> None:
    new = target.with_name(f"{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    weights.save_params(new, params, dtype=None, name="model")
    json_files.write_json(new / "config.json", config)
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, new / name)
    new.rename(target)
    if config["model_type"] == "clip" and not any((target / name).is_file() for name in _TOKENIZER):
        print(f"{target} has no tokenizer: copy that of any other CLIP, they are the same")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    main()
