"""The order of three methods in what the layers of a trained model put out."""

import functools
import importlib.util
import pathlib

import jax
import numpy as np

from sdprune_jax import sharding
from sdprune_jax.data import captions
from sdprune_jax.files import model_directory
from sdprune_jax.pruning.methods import Magnitude
from sdprune_jax.scoring.settings import CalibrationSettings

_FILE = pathlib.Path(__file__).parents[1] / "tools" / "bench" / "output_error.py"


def test_sparsegpt_moves_outputs_less_than_wanda_and_wanda_less_than_magnitude(monkeypatch):
    one_device = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])  # compiles faster
    monkeypatch.setattr(sharding, "make_mesh", one_device)
    spec = importlib.util.spec_from_file_location("output_error", _FILE)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    settings, prompts = CalibrationSettings(batch_size=64), captions.drawn("train", 64, 0)[0]
    model = model_directory.open_model(model_directory.directory_of("embedded"))
    found = dict(tool.errors("embedded", "text_encoder", Magnitude(0.5), settings, prompts))
    table = np.array(list(found.values()))  # layers by methods
    assert table.shape == (6 * model.text_encoder.num_hidden_layers, 3)
    assert ((table > 0) & (table < 0.5)).all()
    assert (np.diff(table) >= 0).all(axis=1).mean() >= 0.9
    assert (table[:, 0] < table[:, 2]).all()
