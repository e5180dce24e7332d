r"""Loads an expert, or any sliced model of ours, into PyTorch: diffusers with narrower layers.

    sdprune torch runs/aptp_emoji/finetuned/03
    sdprune torch runs/sd21/finetuned/03 --device cuda --dtype float16 \
        --prompt "a red apple" --output apple.png

Prints what is left of the UNet, and runs it on random input. It needs torch, diffusers and
safetensors, and nothing of this package: copied to where the GPUs are, this file is a program.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file

_FF_UNITS = 32  # groups of neurons that a feed-forward network is pruned in
_STEM = "diffusion_pytorch_model"


class Removed(torch.nn.Module):
    """Stands where a ResNet or a transformer was, and passes its input on.

    Of what a ResNet of an up block reads, the skip connection comes last and goes with the block.
    """

    def __init__(self, channels: int, is_transformer: bool):
        super().__init__()
        self.channels, self.is_transformer = channels, is_transformer

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor | tuple[torch.Tensor]:
        return (x,) if self.is_transformer else x[:, : self.channels]


def load_unet(
    directory: str | pathlib.Path,
    *,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> diffusers.UNet2DConditionModel:
    """Loads the UNet of a diffusers directory, its layers as narrow as the weights are.

    Args:
        directory: a model's, dense or sliced, or its `unet/`.
        variant: "fp16" reads `*.fp16.safetensors`.
        dtype: dtype to compute in.
        device: PyTorch's name of the device, such as "cuda:1".

    Raises:
        ValueError: naming every tensor that is missing, left over or of another shape.
    """
    folder = _unet_folder(directory)
    values = json.loads((folder / "config.json").read_text())
    model = empty_unet(values)
    try:  # nothing may be missing or left over
        state = {key: x.to(dtype) for key, x in _tensors(folder, variant).items()}
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit its config.json: {error}") from error
    return model.to(device).eval()


def load_pipeline(
    directory: str | pathlib.Path,
    *,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> diffusers.StableDiffusionPipeline:
    """Loads the whole model around `load_unet`, with the sampler that its scheduler names."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        directory,
        unet=load_unet(directory, variant=variant, dtype=dtype),
        variant=variant,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        local_files_only=True,
    )
    return pipeline.to(device, dtype)


def empty_unet(values: Mapping[str, Any]) -> diffusers.UNet2DConditionModel:
    """Builds the UNet of a `unet/config.json` on the device `meta`: shapes, and no memory.

    Args:
        values: what diffusers writes, and `kept_units`: pairs of a site and how many of its units
            are left. A site that ends in `.depth` with 0 units is a block that was removed.

    Raises:
        ValueError: naming the sites that are not of this UNet, or have other numbers of units.
    """
    dense = {key: value for key, value in values.items() if key != "kept_units"}
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel.from_config(dense)
        problems = []
        for site, units in values.get("kept_units", ()):
            try:
                _shrink(model, site, units)
            except (AttributeError, KeyError, IndexError):
                problems.append(f"{site} is no site of this UNet")
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError("kept_units of config.json is not possible:\n  " + "\n  ".join(problems))
    return model


def _shrink(model: torch.nn.Module, site: str, units: int) -> None:
    """Makes the layers of one site narrower, or takes a block out."""
    path = site.removesuffix(".depth")
    module: Any = model.get_submodule(path)
    is_resnet = isinstance(module, diffusers.models.resnet.ResnetBlock2D)
    if site.endswith(".depth"):
        if units not in (0, 1):
            raise ValueError(f"{site} is {units}, expected 0, which removes it, or 1")
        if units == 0:
            parent, _, index = path.rpartition(".")
            channels = module.out_channels if is_resnet else module.in_channels
            blocks: Any = model.get_submodule(parent)
            blocks[int(index)] = Removed(channels, not is_resnet)
        return
    dense = module.norm2.num_groups if is_resnet else getattr(module, "heads", _FF_UNITS)
    if not 1 <= units <= dense:
        raise ValueError(f"{site} has {units} units left, expected 1 to {dense}")
    if is_resnet:
        width = units * (module.out_channels // dense)
        module.conv1 = _conv(module.conv1, module.conv1.in_channels, width)
        module.time_emb_proj = _linear(module.time_emb_proj, outputs=width)
        module.norm2 = torch.nn.GroupNorm(units, width, module.norm2.eps)
        module.conv2 = _conv(module.conv2, width, module.conv2.out_channels)
    elif hasattr(module, "heads"):
        width = units * (module.to_q.out_features // dense)  # the size of a head stays
        for name in ("to_q", "to_k", "to_v"):
            setattr(module, name, _linear(getattr(module, name), outputs=width))
        module.to_out[0] = _linear(module.to_out[0], inputs=width)
        module.heads = module.sliceable_head_dim = units
        module.inner_dim = module.inner_kv_dim = width
    else:
        width = units * (module.net[2].in_features // dense)
        module.net[0].proj = _linear(module.net[0].proj, outputs=2 * width)  # value and gate
        module.net[2] = _linear(module.net[2], inputs=width)


def _linear(layer: Any, inputs: int | None = None, outputs: int | None = None) -> torch.nn.Linear:
    sizes = (inputs or layer.in_features, outputs or layer.out_features)
    return torch.nn.Linear(*sizes, bias=layer.bias is not None)


def _conv(layer: Any, inputs: int, outputs: int) -> torch.nn.Conv2d:
    return torch.nn.Conv2d(inputs, outputs, layer.kernel_size, layer.stride, layer.padding)


def _unet_folder(directory: str | pathlib.Path) -> pathlib.Path:
    directory = pathlib.Path(directory)
    for folder in (directory / "unet", directory):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"{directory} has no unet/config.json: give a model's directory, such as finetuned/00 in"
        " the working directory of a run"
    )


def _tensors(folder: pathlib.Path, variant: str | None) -> dict[str, torch.Tensor]:
    """Reads all tensors of a component, from one file or from the several of an index."""
    mark = f".{variant}" if variant else ""
    whole = folder / f"{_STEM}{mark}.safetensors"
    index = folder / f"{_STEM}.safetensors.index{mark}.json"
    if whole.is_file():
        return load_file(whole)
    if not index.is_file():
        raise ValueError(f"{folder} has neither {whole.name} nor {index.name}")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {key: x for name in names for key, x in load_file(folder / name).items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    how = {"variant": args.variant, "dtype": getattr(torch, args.dtype), "device": args.device}
    try:
        model = load_unet(args.directory, **how)
        print(_parameters(model, _unet_folder(args.directory)))
        print(_forward(model))
        if args.prompt:
            generator = torch.Generator("cpu").manual_seed(args.seed)
            pipeline = load_pipeline(args.directory, **how)
            pipeline.set_progress_bar_config(disable=True)
            picture = pipeline(
                args.prompt,
                num_inference_steps=args.num_steps,
                guidance_scale=args.guidance,
                generator=generator,
            ).images[0]
            picture.save(args.output)
            print(args.output)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sdprune torch", description=__doc__, formatter_class=raw)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--variant", help="fp16 reads *.fp16.safetensors")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", help="also draw a picture of it")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("picture.png"))
    parser.add_argument("--num-steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0, help="of torch, whose noise is not JAX's")
    return parser


def _parameters(model: torch.nn.Module, folder: pathlib.Path) -> str:
    values = json.loads((folder / "config.json").read_text())
    kept = dict(values.pop("kept_units", ()))
    whole, left = _count(empty_unet(values)), _count(model)
    removed = sum(units == 0 for units in kept.values())
    return (
        f"{left:,} parameters, {left / whole:.1%} of the {whole:,} of this shape:"
        f" {len(kept) - removed} sites narrower, {removed} blocks removed"
    )


def _count(model: torch.nn.Module) -> int:
    return sum(x.numel() for x in model.parameters())


@torch.no_grad()
def _forward(model: diffusers.UNet2DConditionModel) -> str:
    generator, config = torch.Generator().manual_seed(0), model.config
    size = config.sample_size
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(model.device, model.dtype)
    latents, text = draw(1, config.in_channels, size, size), draw(1, 77, config.cross_attention_dim)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        output = model(latents, 500, text).sample.float().cpu()
        seconds.append(time.perf_counter() - start)
    shape = " x ".join(map(str, output.shape))
    finite = "finite" if output.isfinite().all() else "NOT FINITE"
    return (
        f"random input gives {shape}, {finite}, standard deviation {output.std():.3f};"
        f" {1000 * min(seconds):.1f} ms a call"
    )


if __name__ == "__main__":
    main()
