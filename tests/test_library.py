"""`import sdprune_jax as sp`: what a notebook calls, on the embedded model."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import sdprune_jax as sp
from sdprune_jax import artefacts, sharding
from sdprune_jax.files import convert, model_directory

MESH = sharding.make_mesh(1, 1, jax.devices()[:1])


@pytest.fixture(scope="module")
def model():
    return sp.load("embedded")


def _zeros(model, name):
    return sum(x.size - np.count_nonzero(x) for x in jax.tree.leaves(model.params[name]))


def test_import_brings_no_library_along():
    source = (
        "import sys, sdprune_jax as sp; sp.__version__; "
        "heavy = {'jax', 'tensorflow', 'torch', 'transformers', 'flax'} & set(sys.modules);"
        " assert not heavy, heavy; assert 'prune' in dir(sp)"
    )
    subprocess.run([sys.executable, "-c", source], check=True)
    with pytest.raises(AttributeError, match="no attribute 'prone'"):
        sp.prone  # noqa: B018


def test_every_public_name_is_there_and_documented():
    for name in sp.__all__:
        assert getattr(sp, name) is not None
    for function in (sp.load, sp.save, sp.prune, sp.slice, sp.generate, sp.experts):
        assert "Args:" in function.__doc__


def test_pruning_leaves_its_input_as_it_is(model):
    before = jax.tree.map(np.copy, model.params)
    pruned = sp.prune(
        model, unet=sp.Magnitude(0.35), text_encoder=sp.Magnitude(0.475, scope="linear")
    )
    jax.tree.map(np.testing.assert_array_equal, before, dict(model.params))
    assert pruned.params["vae"] is model.params["vae"]
    # The record of the quickstart counts 741,171 in the layers in scope; 3 are zero elsewhere.
    assert (_zeros(pruned, "text_encoder"), _zeros(pruned, "unet")) == (280_166, 741_174)
    with pytest.raises(sp.UserError, match="nothing is to be pruned"):
        sp.prune(model)


def test_methods_that_read_prompts_are_given_them(model):
    few = sp.CalibrationSettings(num_steps=2, batch_size=2)
    prompts = ["a flat emoji of cat", "a noto emoji of sun"]
    kwargs = {"prompts": prompts, "calibration": few, "mesh": MESH}
    pruned = sp.prune(model, text_encoder=sp.Wanda(0.5), **kwargs)
    random = sp.prune(model, text_encoder=sp.Random(0.5))
    assert _zeros(pruned, "text_encoder") == _zeros(random, "text_encoder")
    other = sp.prune(model, text_encoder=sp.Wanda(0.5), **kwargs | {"prompts": ["x", "y"]})
    of = lambda found: convert.flatten(found.params["text_encoder"])
    assert any((of(pruned)[path] != x).any() for path, x in of(other).items())


def test_a_sliced_model_draws_and_comes_back(model, tmp_path):
    sliced = sp.slice(model, sp.ByNorm(0.65), mesh=MESH)
    assert sliced.num_parameters()["unet"] < 0.8 * model.num_parameters()["unet"]
    sp.save(sliced, tmp_path / "sliced")
    again = sp.load(tmp_path / "sliced")
    jax.tree.map(np.testing.assert_array_equal, dict(again.params), dict(sliced.params))
    options = {"seed": 3, "num_steps": 2, "mesh": MESH}
    images = sp.generate(again, ["a cat", "a dog"], **options)
    assert images.shape == (2, 64, 64, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, sp.generate(sliced, ["a cat", "a dog"], **options))
    with pytest.raises(sp.UserError, match="multiples of 4"):
        sp.generate(model, ["a cat"], height=63)


def test_a_save_is_complete_and_refuses_what_is_there(model, tmp_path):
    sp.save(sp.prune(model, unet=sp.Magnitude(0.5)), tmp_path / "pruned")
    assert set(artefacts.model_state(tmp_path / "pruned")) == set(
        artefacts.model_state(model_directory.directory_of("embedded"))
    )
    with pytest.raises(sp.UserError, match="exists"):
        sp.save(model, tmp_path / "pruned")


def test_a_hub_id_is_looked_up_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(sp.UserError, match=r"hf download some-one/sd\.2-base --include"):
        sp.load("some-one/sd.2-base")


def test_experts_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(sp.UserError, match="has no experts"):
        sp.experts(tmp_path)
