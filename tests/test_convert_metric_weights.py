"""tools/convert_metric_weights.py: published shapes, values against PyTorch, refused files."""

import hashlib
import json
import math
import pathlib

import clip_files
import convert_metric_weights as tool
import jax
import numpy as np
import pytest
import tiny_clip
import transformers
from safetensors.numpy import save_file

from sdprune_jax.files import convert, weights
from sdprune_jax.models import clip, inception

torch = tiny_clip.torch

# Of OpenAI and open_clip: size of images, patch; width, layers, heads, MLP of the vision tower;
# width, layers, heads of the text tower; embedding; number of parameters.
PUBLISHED = {
    "B/32": (224, 32, (768, 12, 12, 3072), (512, 12, 8), 512, 151_277_313),
    "B/16": (224, 16, (768, 12, 12, 3072), (512, 12, 8), 512, 149_620_737),
    "L/14": (224, 14, (1024, 24, 16, 4096), (768, 12, 12), 768, 427_616_513),
    "L/14-336": (336, 14, (1024, 24, 16, 4096), (768, 12, 12), 768, 427_944_193),
    "H/14": (224, 14, (1280, 32, 16, 5120), (1024, 24, 16), 1024, 986_109_441),
    "g/14": (224, 14, (1408, 40, 16, 6144), (1024, 24, 16), 1024, 1_366_678_273),
}

IDS = np.array([[48, 3, 9, 49, 0, 0, 0], [48, 7, 2, 4, 30, 11, 49]], np.int32)
IMAGES = np.random.default_rng(1).normal(size=(2, 12, 12, 3)).astype(np.float32)
TORCH_INPUTS = (torch.from_numpy(IDS), torch.from_numpy(IMAGES).permute(0, 3, 1, 2))


def _loaded(directory):
    config = clip.CLIPConfig.from_json(json.loads((directory / "config.json").read_text()))
    params = weights.load_params(directory, clip.clip_param_shapes(config), dtype=np.float32)
    return config, params


def _assert_scores_as(model, directory):
    config, params = _loaded(directory)
    got = jax.jit(clip.CLIP(config).apply)({"params": params}, IDS, IMAGES)
    with torch.no_grad():
        want = model(*TORCH_INPUTS)
    for x, y in zip(got[:2], want, strict=True):
        np.testing.assert_allclose(x, y.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(got[2], np.exp(model.logit_scale.item()), rtol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_say_the_architecture(name):
    size, patch, vision, text, embedding, num_params = PUBLISHED[name]
    shapes = tiny_clip.shapes(size, patch, vision, text, embedding)
    assert sum(map(math.prod, shapes.values())) == num_params
    config = clip_files.clip_config(shapes, "gelu")
    got = config.vision
    assert (got.image_size, got.patch_size, got.hidden_act) == (size, patch, "gelu")
    assert (got.hidden_size, got.num_hidden_layers, got.num_attention_heads) == vision[:3]
    assert got.intermediate_size == vision[3]
    got = config.text
    assert (got.hidden_size, got.num_hidden_layers, got.num_attention_heads) == text
    assert (got.intermediate_size, got.hidden_act) == (4 * text[0], "gelu")
    assert (got.vocab_size, got.max_position_embeddings, got.eos_token_id) == (49_408, 77, 49_407)
    assert {got.projection_dim, config.vision.projection_dim, config.projection_dim} == {embedding}


def test_open_clip_keeps_its_embeddings(tmp_path):
    model, source, new = tiny_clip.make("gelu"), tmp_path / "source.bin", tmp_path / "new"
    torch.save(model.state_dict(), source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    tool.main([str(source), str(new), "--activation", "gelu", "--sha256", digest])
    assert {name: x.shape for name, x in model.state_dict().items()} == tiny_clip.shapes(
        *tiny_clip.SIZES
    )
    _assert_scores_as(model, new)
    assert json.loads((new / "config.json").read_text())["source_sha256"] == digest
    source, again = tmp_path / "source.safetensors", tmp_path / "again"
    save_file({name: x.numpy() for name, x in model.state_dict().items()}, source)
    tool.main([str(source), str(again), "--activation", "gelu"])
    name = "model.safetensors"
    assert (again / name).read_bytes() == (new / name).read_bytes()


# PyTorch wants its own format instead, and attention to be without branches.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_archives_of_openai_keep_their_embeddings_if_allowed(tmp_path, capsys):
    model, source, new = tiny_clip.make("quick_gelu"), tmp_path / "source.pt", tmp_path / "new"
    for name in ("input_resolution", "context_length", "vocab_size"):
        model.register_buffer(name, torch.tensor(12))
    torch.jit.save(torch.jit.trace(model, TORCH_INPUTS, check_trace=False).half(), source)
    model.float()
    with pytest.raises(SystemExit, match="can run code"):
        tool.main([str(source), str(new)])
    tool.main([str(source), str(new), "--allow-torchscript"])
    assert "no tokenizer" in capsys.readouterr().out
    _assert_scores_as(model, new)
    size = (new / "model.safetensors").stat().st_size
    assert size < 2.2 * sum(x.numel() for x in model.parameters())  # still float16


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_directories_of_transformers_are_copied(tmp_path, has_safetensors):
    vision = {"image_size": 8, "patch_size": 4}
    shared = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    text = shared | {"vocab_size": 30, "num_attention_heads": 2, "max_position_embeddings": 5}
    vision |= shared | {"num_attention_heads": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision)
    model, source, new = transformers.CLIPModel(config), tmp_path / "source", tmp_path / "new"
    model.save_pretrained(source)
    values = json.loads((source / "config.json").read_text())
    del values["text_config"]["hidden_act"]  # then it is the default of transformers, not of ours
    (source / "config.json").write_text(json.dumps(values))
    (source / "merges.txt").write_text("#version: 0.2\n")
    state = model.state_dict()
    if not has_safetensors:
        (source / "model.safetensors").unlink()
        torch.save(state, source / "pytorch_model.bin")
    tool.main([str(source), str(new)])
    config, params = _loaded(new)
    assert (config.text.hidden_act, config.vision.num_attention_heads) == ("quick_gelu", 1)
    flat = convert.flatten(params)
    assert {convert.torch_key(path) for path in flat} == state.keys()
    for path, x in flat.items():
        want = state[convert.torch_key(path)].numpy()
        np.testing.assert_array_equal(convert.to_torch(path, np.asarray(x)), want)
    assert (new / "merges.txt").is_file()


def test_inception_is_read_without_its_classifier(tmp_path, monkeypatch):
    rng, state, whole = np.random.default_rng(0), {}, inception.param_shapes()
    shapes = {name: whole[name] for name in ("Conv2d_1a_3x3", "Mixed_5b")}
    monkeypatch.setattr(inception, "param_shapes", lambda: shapes)  # all would be 87 MB
    for path, leaf in convert.flatten(shapes).items():
        x = convert.to_torch(path, rng.random(leaf.shape, np.float32))
        state[convert.torch_key(path)] = torch.from_numpy(np.ascontiguousarray(x))
    want, classifier = (
        dict(state),
        {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)},
    )
    state |= classifier | {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}
    source = tmp_path / "source.pth"
    torch.save(state, source, _use_new_zipfile_serialization=False)  # as it was in 2019
    tool.main([str(source), str(tmp_path / "inception")])
    params = weights.load_params(tmp_path / "inception", shapes)
    for path, x in convert.flatten(params).items():
        got = convert.to_torch(path, np.asarray(x))
        np.testing.assert_array_equal(got, want[convert.torch_key(path)].numpy())


class Malicious:
    """A pickle that makes a file when it is read."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return pathlib.Path.touch, (self.canary,)


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickles_run_no_code(tmp_path, is_zip):
    state = {"Conv2d_1a_3x3.conv.weight": torch.zeros(1), "x": Malicious(tmp_path / "canary")}
    source = tmp_path / "source.pth"
    torch.save(state, source, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(SystemExit, match=r"source\.pth holds no tensors that can be read"):
        tool.main([str(source), str(tmp_path / "new")])
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "new").exists()


def _state(**changes):
    return {
        k: x for k, x in (tiny_clip.make("gelu").state_dict() | changes).items() if x is not None
    }


GELU = ("--activation", "gelu")
MISTAKES = {
    "another file": (_state, ("--sha256", "0" * 64), "expected 0000"),
    "which activation": (_state, (), "does not say its --activation"),
    "one missing": (lambda: _state(logit_scale=None), GELU, "missing logit_scale"),
    "one that tells": (lambda: _state(text_projection=None), GELU, "missing text_projection"),
    "one too many": (lambda: _state(extra=torch.ones(1)), GELU, "unexpected extra"),
    "another shape": (lambda: _state(logit_scale=torch.ones(2)), GELU, r"logit_scale: .*\(2,\)"),
    "whole numbers": (lambda: _state(logit_scale=torch.tensor(2)), GELU, "logit_scale: int64"),
    "not finite": (lambda: _state(logit_scale=torch.tensor(math.nan)), GELU, "not finite"),
    "another network": (lambda: {"weight": torch.ones(1)}, (), "no Inception v3"),
    "no tensors": (lambda: [1, 2], (), "expected names and tensors"),
    "unknown heads": (
        lambda: _state(**{"visual.conv1.weight": torch.ones(1216, 3, 4, 4)}),
        GELU,
        "heads of a vision tower 1216 wide, 2 deep",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_explained(tmp_path, name):
    make, arguments, message = MISTAKES[name]
    torch.save(make(), tmp_path / "source.bin")
    with pytest.raises(SystemExit, match=message):
        tool.main([str(tmp_path / "source.bin"), str(tmp_path / "new"), *arguments])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("data", [b"", b"<html>", b"PK\x03\x04 cut short", b"\x80\x02\x8a\nl"])
def test_files_without_tensors_are_named(tmp_path, data):
    (tmp_path / "source.pth").write_bytes(data)
    with pytest.raises(SystemExit, match=r"source\.pth"):
        tool.main([str(tmp_path / "source.pth"), str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="exists"):
        tool.main([str(tmp_path / "source.pth"), str(tmp_path)])
