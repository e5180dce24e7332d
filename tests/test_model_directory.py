"""Whole directories, against diffusers and transformers, which must read what is written."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pipeline
from safetensors.numpy import load_file, save_file

from sdprune_jax.files import convert, model_directory
from sdprune_jax.files.model_directory import COMPONENTS
from sdprune_jax.models import clip

torch = tiny_pipeline.torch
FILES = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def models() -> dict:
    return tiny_pipeline.make()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, models: dict) -> pathlib.Path:
    return tiny_pipeline.save(tmp_path_factory.mktemp("tiny"), models)


@pytest.fixture(scope="module")
def model(source: pathlib.Path) -> model_directory.ModelConfig:
    return model_directory.open_model(source)


@pytest.fixture(scope="module")
def shapes(model: model_directory.ModelConfig) -> dict:
    return {name: model_directory.param_shapes(model, name) for name in COMPONENTS}


@pytest.fixture(scope="module")
def params(source: pathlib.Path, shapes: dict) -> dict:
    return {name: model_directory.load_params(source / name, shapes[name]) for name in COMPONENTS}


@pytest.fixture
def copied(source: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(source, tmp_path / "copied"))


def _edit(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _assert_equal(got: dict, want: dict):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_load_finds_the_component(model, params):
    _assert_equal(model_directory.load(model, "vae"), params["vae"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_reads_back_what_it_wrote(models, model, params, tmp_path, dtype):
    model_directory.save(model, params, tmp_path / "new", dtype=jnp.dtype(dtype))
    for name, reference in models.items():
        got = tiny_pipeline.reload(tmp_path / "new", name, getattr(torch, dtype))
        want = reference.state_dict()
        assert got.keys() == want.keys()
        for key in want:
            assert torch.equal(got[key], want[key].to(getattr(torch, dtype))), key


def test_files_equal_those_of_diffusers(source, model, params, tmp_path):
    model_directory.save(model, params, tmp_path / "new", dtype=None)
    for name in ("unet", "vae"):
        file = f"{name}/{FILES[name]}"
        assert (tmp_path / "new" / file).read_bytes() == (source / file).read_bytes()


def test_diffusers_opens_the_whole_export(model, params, tmp_path):
    model_directory.save(model, params, tmp_path / "new", dtype=jnp.float16)
    pipeline = tiny_pipeline.diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "new")
    assert type(pipeline.scheduler).__name__ == "PNDMScheduler"
    assert pipeline.tokenizer("a red face").input_ids[0] == 518
    assert (tmp_path / "new" / "LICENSE").read_text() == "CreativeML Open RAIL++-M"
    config = json.loads((tmp_path / "new/text_encoder/config.json").read_text())
    assert config["torch_dtype"] == "float16"


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_variants_of_diffusers_are_read(models, params, shapes, copied, variant):
    for name in COMPONENTS:
        (copied / name / FILES[name]).unlink()
        models[name].save_pretrained(copied / name, max_shard_size="1MB", variant=variant)
    assert any((copied / "unet").glob("*-00002-of-*"))
    for name in COMPONENTS:
        got = model_directory.load_params(copied / name, shapes[name], variant=variant)
        _assert_equal(got, params[name])


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_components_left_out_are_copied(models, model, params, shapes, copied, tmp_path, variant):
    (copied / "unet" / FILES["unet"]).unlink()
    models["unet"].save_pretrained(copied / "unet", max_shard_size="1MB", variant=variant)
    if variant:
        for name in ("text_encoder", "vae"):
            file = copied / name / FILES[name]
            file.rename(file.with_suffix(f".{variant}.safetensors"))
    moved = dataclasses.replace(model, directory=copied)
    tree = {"text_encoder": params["text_encoder"]}
    model_directory.save(moved, tree, tmp_path / "new", dtype=None, variant=variant)
    for name in COMPONENTS:
        _assert_equal(
            model_directory.load_params(tmp_path / "new" / name, shapes[name]), params[name]
        )
        tiny_pipeline.reload(tmp_path / "new", name)


def test_what_is_written_into_an_output_stays_out_of_the_source(model, params, copied, tmp_path):
    source = dataclasses.replace(model, directory=copied)
    model_directory.save(source, {"unet": params["unet"]}, tmp_path / "new", dtype=None)
    contents = lambda root: {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    before = contents(copied)
    for path in contents(tmp_path / "new"):
        with path.open("r+b") as file:  # as cp does: the file stays, its bytes change
            file.write(b"changed")
    assert contents(copied) == before


def test_text_encoder_is_read_with_and_without_prefix(params, shapes, copied):
    path = copied / "text_encoder/model.safetensors"
    bare = {key.removeprefix("text_model."): x for key, x in load_file(path).items()}
    ids = {"embeddings.position_ids": np.arange(77)[None]}
    for tensors in (bare | ids, {f"text_model.{key}": x for key, x in (bare | ids).items()}):
        save_file(tensors, path)
        got = model_directory.load_params(copied / "text_encoder", shapes["text_encoder"])
        _assert_equal(got, params["text_encoder"])


@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_names_of_the_vae_are_read(params, shapes, copied, as_convolution):
    path = copied / "vae/diffusion_pytorch_model.safetensors"
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old, num_renamed = {}, 0
    for key, x in load_file(path).items():
        found = re.search(r"to_(q|k|v|out\.0)", key)
        num_renamed += found is not None
        name = key.replace(found[0], words[found[0]]) if found else key
        old[name] = x[..., None, None] if found and as_convolution and x.ndim == 2 else x
    assert num_renamed == 16
    save_file(old, path)
    _assert_equal(model_directory.load_params(copied / "vae", shapes["vae"]), params["vae"])


def test_keys_of_configs_are_kept(model, params, copied, tmp_path):
    _edit(copied / "unet/config.json", _name_or_path="mine", sample_size=32)
    _edit(copied / "scheduler/scheduler_config.json", trained_betas=None, clip_sample=False)
    written = dataclasses.replace(model, directory=copied)
    model_directory.save(written, params, tmp_path / "new", dtype=None)
    config = json.loads((tmp_path / "new/unet/config.json").read_text())
    assert config["_name_or_path"] == "mine"
    assert config["sample_size"] == 8  # ours wins
    assert model_directory.open_model(tmp_path / "new").unet == model.unet


def test_names_of_the_past_become_those_of_today(copied, params, tmp_path):
    entries = {"unet": "UNet2DConditionModel", "scheduler": "PNDMScheduler"}
    flax = {name: ["diffusers", f"Flax{entry}"] for name, entry in entries.items()}
    extractor = ["transformers", "CLIPFeatureExtractor"]
    index = copied / "model_index.json"
    _edit(index, _class_name="FlaxStableDiffusionPipeline", feature_extractor=extractor, **flax)
    _edit(copied / "unet/config.json", _class_name="FlaxUNet2DConditionModel")
    _edit(copied / "scheduler/scheduler_config.json", _class_name="FlaxPNDMScheduler")
    (copied / "feature_extractor").mkdir()
    processor = {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 224}
    (copied / "feature_extractor/preprocessor_config.json").write_text(json.dumps(processor))
    model = model_directory.open_model(copied)
    model_directory.save(model, params, tmp_path / "new", dtype=None)
    for path in sorted((tmp_path / "new").rglob("*.json")):
        assert "Flax" not in path.read_text(), path
        assert "FeatureExtractor" not in path.read_text(), path
    tiny_pipeline.diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "new")


def test_whole_clip_is_read(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 2
    config = tiny_pipeline.transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": 600, "bos_token_id": 0, "eos_token_id": 2},
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    reference = tiny_pipeline.transformers.CLIPModel(config)
    reference.save_pretrained(tmp_path)
    config = clip.CLIPConfig.from_json(json.loads((tmp_path / "config.json").read_text()))
    loaded = convert.flatten(model_directory.load_params(tmp_path, clip.clip_param_shapes(config)))
    want = reference.state_dict()
    assert {convert.torch_key(path) for path in loaded} == want.keys() - {
        "text_model.embeddings.position_ids",
        "vision_model.embeddings.position_ids",
    }
    for path, x in loaded.items():
        got = convert.to_torch(path, np.asarray(x))
        np.testing.assert_array_equal(got, want[convert.torch_key(path)].numpy())


def test_nothing_appears_before_all_is_written(model, params, tmp_path):
    broken = params | {"vae": jax.tree.map(lambda x: x * jnp.nan, params["vae"])}
    with pytest.raises(ValueError, match="not finite"):
        model_directory.save(model, broken, tmp_path / "new", dtype=None)
    assert not list(tmp_path.iterdir())
    (tmp_path / "new.tmp" / "left").mkdir(parents=True)  # of a run that was killed
    model_directory.save(model, params, tmp_path / "new", dtype=None)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_only_models_are_overwritten_and_only_when_asked(model, params, tmp_path):
    new = tmp_path / "new"
    model_directory.save(model, params, new, dtype=None)
    with pytest.raises(ValueError, match="exists"):
        model_directory.save(model, params, new, dtype=None)
    model_directory.save(model, params, new, dtype=jnp.float16, overwrite=True)
    assert load_file(new / "vae" / FILES["vae"])["decoder.conv_in.weight"].dtype == np.float16
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(ValueError, match="is not a model"):
        model_directory.save(model, params, tmp_path / "home", dtype=None, overwrite=True)
    assert (tmp_path / "home" / "letter").exists()
