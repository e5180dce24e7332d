"""sdprune torch against our own UNet, of which other tests say that it can be cut."""

import functools
import importlib
import json

import aptp_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax import sites
from sdprune_jax.aptp import layout
from sdprune_jax.files import model_directory
from sdprune_jax.models import unet

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers.models.resnet")  # the package alone does not need diffusers' models
torch_model = importlib.import_module("sdprune_jax.commands.torch_model")

UNET, LAYOUT = aptp_model.UNET, aptp_model.LAYOUT


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return aptp_model.make(tmp_path_factory.mktemp("micro") / "model")


def _cut(model, directory, architecture):
    """Writes the sliced UNet as an expert is written."""
    dense = jax.tree.map(np.asarray, model_directory.load(model, "unet"))
    params, config = sites.slice_params(dense, model.unet, architecture)
    sliced = model_directory.ModelConfig(
        model.text_encoder, config, model.vae, model.schedule, model.directory
    )
    model_directory.save(sliced, {"unet": params}, directory, dtype=np.float32)
    return directory


@functools.cache
def _compiled():
    return jax.jit(unet.UNet(UNET).apply)


def _assert_same(model, directory, gates):
    """Compares PyTorch's output with that of the dense UNet under gates, compiled once."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    timestep, text = np.array([10, 700]), rng.normal(size=(2, 5, 12)).astype(np.float32)
    params = model_directory.load(model, "unet")
    want = np.asarray(_compiled()({"params": params}, x, timestep, text, gates))
    module = torch_model.load_unet(directory)
    with torch.no_grad():
        found = module(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
            torch.from_numpy(timestep),
            torch.from_numpy(text),
        ).sample.numpy()
    found = found.transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())
    return module


def _vector(seed):
    """Gates of a random architecture with at least one unit at every site."""
    keep = np.random.default_rng(seed).random(LAYOUT.size) < 0.5
    keep[LAYOUT.starts] = True
    return keep


DEPTH = {name: LAYOUT.num_width + i for i, name in enumerate(LAYOUT.depth)}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_expert_computes_in_torch_what_it_does_here(model, tmp_path, seed):
    keep = _vector(seed)
    last = [name for name in LAYOUT.depth if name.startswith("up_blocks")]
    keep[[DEPTH[name] for name in last]] = seed == 1  # ResNets of up blocks drop skips too
    keep[LAYOUT.starts[1] :][: LAYOUT.units[1]] = np.arange(LAYOUT.units[1]) == LAYOUT.units[1] - 1
    architecture = layout.to_architecture(keep, LAYOUT)
    directory = _cut(model, tmp_path / "expert", architecture)
    gates = layout.to_gates(jnp.asarray(np.stack([keep] * 2), jnp.float32), LAYOUT)
    module = _assert_same(model, directory, gates)
    count = sum(x.numel() for x in module.parameters())
    shapes = model_directory.param_shapes(model_directory.open_model(directory), "unet")
    assert count == sum(x.size for x in jax.tree.leaves(shapes))
    assert any(isinstance(m, torch_model.Removed) for m in module.modules()) == (
        not keep[list(DEPTH.values())].all()
    )


def test_blocks_of_any_place_can_be_missing(model, tmp_path):
    names = [site.name for site in sites.operators(UNET)]
    closed = {"mid_block.resnets.1.depth", "mid_block.attentions.0.depth", names[0]}
    closed.add("up_blocks.0.resnets.0.depth")
    keep = {name: np.array([name not in closed]) for name in names}
    gates = {name: np.stack([units] * 2).astype(np.float32) for name, units in keep.items()}
    _assert_same(model, _cut(model, tmp_path / "cut", keep), gates)


def test_dense_model_is_loaded_too_from_several_files(model, tmp_path):
    params = jax.tree.map(np.asarray, model_directory.load(model, "unet"))
    model_directory.save(
        model, {"unet": params}, tmp_path / "m", dtype=np.float32, max_shard_bytes=2**17
    )
    assert len(list((tmp_path / "m" / "unet").glob("*.safetensors"))) > 1
    whole = layout.to_gates(jnp.ones((2, LAYOUT.size)), LAYOUT)
    _assert_same(model, tmp_path / "m" / "unet", whole)


def _edit(directory, change):
    path = directory / "unet" / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_what_does_not_fit_is_refused_with_every_reason(model, tmp_path):
    architecture = {"mid_block.resnets.0": np.array([True, False, True, True])}
    directory = _cut(model, tmp_path / "expert", architecture)
    _edit(directory, lambda values: values.update(kept_units=[]))
    with pytest.raises(ValueError, match=r"does not fit[^\n]*\n.*resnets\.0\.conv1\.weight"):
        torch_model.load_unet(directory)
    wrong = [["mid_block.resnets.0", 9], ["mid_block.nothing", 1], ["mid_block.resnets.1.depth", 2]]
    _edit(directory, lambda values: values.update(kept_units=wrong))
    with pytest.raises(ValueError, match="expected 1 to 4") as error:
        torch_model.load_unet(directory)
    assert "mid_block.nothing is no site" in str(error.value)
    assert "expected 0, which removes it" in str(error.value)
    with pytest.raises(ValueError, match="has no unet/config"):
        torch_model.load_unet(tmp_path)


def test_command_says_what_is_left_and_draws(model, tmp_path, capsys):
    keep = _vector(0)
    directory = _cut(model, tmp_path / "expert", layout.to_architecture(keep, LAYOUT))
    picture = tmp_path / "picture.png"
    torch_model.main(
        [str(directory), "--prompt", "a red apple", "--output", str(picture), "--num-steps", "2"]
    )
    printed = capsys.readouterr().out
    shapes = model_directory.param_shapes(model_directory.open_model(directory), "unet")
    assert f"{sum(x.size for x in jax.tree.leaves(shapes)):,} parameters" in printed
    assert "random input gives 1 x 4 x 8 x 8, finite" in printed
    assert picture.stat().st_size > 100
    with pytest.raises(SystemExit, match="2"):
        torch_model.main([str(tmp_path)])
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} has no unet/config.json")
