"""sdprune convert, against the converters of diffusers and by round trips."""

import importlib
import json
import pathlib

import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
import tiny_pipeline
from flax import serialization
from safetensors.numpy import load_file, save_file

from sdprune_jax import UserError
from sdprune_jax.commands import convert as tool
from sdprune_jax.commands import flax_files, infer_configs, single_file
from sdprune_jax.files import convert, model_directory, tensors
from sdprune_jax.files.model_directory import COMPONENTS
from sdprune_jax.models import clip, noise_schedule, unet, vae

torch = tiny_pipeline.torch
single_file_utils = importlib.import_module("diffusers.loaders.single_file_utils")  # needs torch
FULL = model_directory.ModelConfig(
    clip.TextConfig(), unet.UNetConfig(), vae.VAEConfig(), noise_schedule.Schedule(), pathlib.Path()
)
FILES = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Saved by ourselves once more, so that files can be compared byte by byte."""
    first = tiny_pipeline.save(tmp_path_factory.mktemp("tiny"), tiny_pipeline.make())
    tool.main([str(first), str(first.with_name("source"))])
    return first.with_name("source")


@pytest.fixture(scope="module")
def full_places() -> dict:
    return {name: single_file.places(FULL, name) for name in COMPONENTS}


def _stored(full_places: dict) -> dict[str, tensors.StoredTensor]:
    """The tensors of a full-size single file, without contents."""
    stored = {}
    for component, places in full_places.items():
        shapes = convert.flatten(model_directory.param_shapes(FULL, component))
        for path, place in places.items():
            axes = convert.torch_axes(path, len(shapes[path].shape))
            rows, *rest = (shapes[path].shape[axis] for axis in axes)
            shape = (rows * (1 if place.third is None else 3), *rest)
            shape += (1, 1) if place.is_convolution else ()
            stored[place.name] = tensors.StoredTensor("F32", shape, None)
    return stored


def _assert_same_weights(got: pathlib.Path, want: pathlib.Path):
    for file in FILES.values():
        assert (got / file).read_bytes() == (want / file).read_bytes(), file


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_names_are_those_that_diffusers_converts(full_places, component):
    keys, data = {}, {}
    for i, (path, place) in enumerate(full_places[component].items()):
        keys[convert.torch_key(path)] = i
        data[place.name] = torch.full((1, 1, 1, 1) if place.is_convolution else (1,), i)
    assert len(data) == len(keys)  # no two share a name
    if component == "unet":
        config = unet.UNetConfig().to_json() | {"class_embed_type": None}
        found = single_file_utils.convert_ldm_unet_checkpoint(data, config)
    else:
        found = single_file_utils.convert_ldm_vae_checkpoint(data, vae.VAEConfig().to_json())
    assert {key: int(x.flatten()[0]) for key, x in found.items()} == keys


def test_text_encoder_is_what_diffusers_converts(source, tmp_path):
    tool.main([str(source), str(tmp_path / "one.safetensors")])
    reference = tiny_pipeline.make()["text_encoder"]
    data = {k: torch.from_numpy(x) for k, x in load_file(tmp_path / "one.safetensors").items()}
    found = single_file_utils.convert_open_clip_checkpoint(reference, data)
    want = load_file(source / FILES["text_encoder"])
    assert found.keys() == want.keys()
    for key, x in found.items():
        np.testing.assert_array_equal(x.numpy(), want[key])


def test_full_size_configs_are_inferred_from_shapes(full_places, tmp_path):
    stored = _stored(full_places)
    infer_configs.write_configs(stored, "epsilon", tmp_path)
    model = model_directory.open_model(tmp_path)
    assert model.unet == FULL.unet
    assert model.vae == FULL.vae
    assert model.text_encoder == FULL.text_encoder
    whole = {name.replace("blocks.22.", "blocks.23."): x for name, x in stored.items()}
    infer_configs.write_configs(stored | whole, "v_prediction", tmp_path)
    model = model_directory.open_model(tmp_path)
    assert model.text_encoder.num_hidden_layers == 23
    assert (model.unet.sample_size, model.unet.upcast_attention) == (96, True)
    assert model.schedule.prediction_type == "v_prediction"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", ["flax", "single"])
def test_round_trips_keep_every_bit(source, tmp_path, dtype, form):
    start, middle, end = tmp_path / "start", tmp_path / "middle", tmp_path / "end"
    tool.main([str(source), str(start), "--dtype", dtype])
    tool.main([str(start), str(middle), "--to", form])
    if form == "flax":
        assert not list(middle.rglob("*.safetensors"))
        tool.main([str(middle), str(end)])
    else:
        tool.main([str(middle), str(end), "--from", form, "--config", str(source)])
    _assert_same_weights(end, start)
    if dtype == "float32":
        _assert_same_weights(start, source)


def test_single_files_keep_what_diffusers_cannot_hold(source, tmp_path, capsys):
    tool.main([str(source), str(tmp_path / "plain.safetensors")])
    data = load_file(tmp_path / "plain.safetensors")
    text = "cond_stage_model.model."
    extra = {
        f"{text}transformer.resblocks.2.ln_1.weight": np.ones(32, np.float32),
        f"{text}transformer.resblocks.2.ln_1.bias": np.ones(32, ml_dtypes.bfloat16),
        f"{text}logit_scale": np.array(4, np.float16),
        f"{text}text_projection": np.ones((32, 32), np.float32),
        "alphas_cumprod": np.linspace(0, 1, 1000),
        "model_ema.num_updates": np.array(7, np.int32),
    }
    save_file(data | extra, tmp_path / "one.safetensors")
    arguments = [str(tmp_path / "one.safetensors"), str(tmp_path / "new"), "--config", str(source)]
    tool.main(arguments)
    printed = capsys.readouterr().out
    assert "6 tensors have no place" in printed
    assert "resblocks.2 (2 tensors)" in printed
    assert "alphas_cumprod (1 tensors)" in printed
    assert not (tmp_path / "new" / single_file.EXTRA_FILE).exists()
    tool.main([*arguments, "--overwrite", "--keep-extra"])
    tool.main([str(tmp_path / "new"), str(tmp_path / "two.safetensors")])
    got, want = load_file(tmp_path / "two.safetensors"), data | extra
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape)
        assert got[name].tobytes() == x.tobytes(), name


def test_flax_names_are_those_of_the_old_library(source, tmp_path):
    tool.main([str(source), str(tmp_path / "flax"), "--to", "flax"])
    restore = lambda file: serialization.msgpack_restore((tmp_path / "flax" / file).read_bytes())
    weights = load_file(source / FILES["unet"])
    block = restore("unet/diffusion_flax_model.msgpack")["down_blocks_0"]["attentions_0"]
    block = block["transformer_blocks_0"]
    name = "down_blocks.0.attentions.0.transformer_blocks.0"
    kernel = block["ff"]["net_0"]["proj"]["kernel"]
    np.testing.assert_array_equal(kernel, weights[f"{name}.ff.net.0.proj.weight"].T)
    kernel = block["attn1"]["to_out_0"]["kernel"]
    np.testing.assert_array_equal(kernel, weights[f"{name}.attn1.to_out.0.weight"].T)
    attention = restore("vae/diffusion_flax_model.msgpack")["encoder"]["mid_block"]["attentions_0"]
    assert attention.keys() == {"group_norm", "query", "key", "value", "proj_attn"}
    layers = restore("text_encoder/flax_model.msgpack")["text_model"]["encoder"]["layers"]
    assert layers["1"]["self_attn"]["q_proj"]["kernel"].shape == (32, 32)
    index = json.loads((tmp_path / "flax/model_index.json").read_text())
    assert index["unet"] == ["diffusers", "FlaxUNet2DConditionModel"]


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((-1, 2), b"float32", "shape"),
        ((-1, -4), b"float32", r"an array of shape \[-1, -4\] with 16 bytes"),
        ((2**40, 2**40), b"float32", "shape"),
        ((2, 3), b"float32", "shape"),
        ((2, 2), b"object", "dtype"),
        ((2, 2), b"int32", "dtype"),
        ((2, 1), b"float64", r"expected \(2, 2\)"),
    ],
)
def test_damaged_flax_files_are_refused(tmp_path, shape, dtype, message):
    array = msgpack.packb((shape, dtype, bytes(16)))
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(msgpack.packb({"a": {"kernel": msgpack.ExtType(1, array)}}))
    shapes = {"a": {"kernel": jax.ShapeDtypeStruct((2, 2), np.float32)}}
    with pytest.raises(ValueError, match=message):
        flax_files.read(path, shapes, "text_encoder")


@pytest.mark.parametrize("data", [b"", b"\x81", b"\x81" * 10**5, b"<html>"])
def test_files_that_are_not_flax_are_refused(tmp_path, data):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"flax_model\.msgpack"):
        flax_files.read(path, {"a": jax.ShapeDtypeStruct((1,), np.float32)}, "text_encoder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/model.ckpt", "{tmp}/new"], "neither a directory nor a .safetensors"),
        (["{tmp}/one.safetensors", "{tmp}/new"], "--prediction-type"),
        (
            ["{tmp}/one.safetensors", "{tmp}/new", "--prediction-type", "epsilon"],
            "no Stable Diffusion 2 checkpoint",
        ),
        (["{tmp}/one.safetensors", "{tmp}/new", "--config", "{source}"], "does not fit"),
        (["{source}", "{source}"], "exists"),
        (["{source}", "{tmp}", "--overwrite"], "is not a model"),
    ],
)
def test_mistakes_are_explained_in_one_line(source, tmp_path, arguments, message):
    save_file({"a": np.ones(1)}, tmp_path / "one.safetensors")
    arguments = [argument.format(tmp=tmp_path, source=source) for argument in arguments]
    with pytest.raises(UserError, match=message):
        tool.main(arguments)
