"""LPIPS against PyTorch, all parameters random; its figure in an evaluation."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdprune_jax import config, sharding
from sdprune_jax.evaluate import images, measuring, networks, scores, task
from sdprune_jax.files import convert, model_directory, weights
from sdprune_jax.metrics import interval
from sdprune_jax.models import lpips
from sdprune_jax.report import evaluation
from sdprune_jax.stages import evaluate

_MESH = sharding.make_mesh(devices=jax.devices()[:1])  # it computes as much on each
_DENSE = model_directory.open_model(model_directory.directory_of("embedded"))
# Channels, kernel, stride and padding of the convolutions of torchvision's `alexnet().features`.
_CONVOLUTIONS = {
    0: (64, 11, 4, 2),
    3: (192, 5, 1, 2),
    6: (384, 3, 1, 1),
    8: (256, 3, 1, 1),
    10: (256, 3, 1, 1),
}


def _state():
    """Parameters by their published names, drawn so that features keep their size."""
    rng, state, before = np.random.default_rng(0), {}, 3
    for i, (number, (channels, size, _, _)) in enumerate(_CONVOLUTIONS.items()):
        shape = (channels, before, size, size)
        noise = rng.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5
        state[f"features.{number}.weight"] = noise
        state[f"features.{number}.bias"] = 0.2 * rng.normal(size=channels)
        state[f"lin{i}.model.1.weight"] = rng.uniform(size=(1, channels, 1, 1))
        before = channels
    return {name: x.astype(np.float32) for name, x in state.items()}


_STATE = _state()


def _params():
    shapes = lpips.param_shapes()
    paths = convert.flatten(shapes)
    assert {convert.torch_key(path) for path in paths} == _STATE.keys()
    flat = {path: convert.from_torch(path, _STATE[convert.torch_key(path)]) for path in paths}
    return convert.unflatten(flat, shapes)


def _noise(seed, num, height=45, width=37):
    """Images whose contrast falls from the top down, so that no two rows are alike."""
    noise = np.random.default_rng(seed).uniform(-1, 1, size=(num, height, width, 3))
    return (noise * np.linspace(1, 0.1, height)[:, None, None]).astype(np.float32)


@jax.jit
def _distances(params, got, want):
    return lpips.LPIPS().apply({"params": params}, jnp.asarray(got), jnp.asarray(want))


def _reference(got, want):
    """The distance as it was published, in PyTorch and in float64."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    state = {name: torch.from_numpy(x).double() for name, x in _STATE.items()}

    def features(x):
        # Images in [0, 1] are normalised by (x - 0.485) / 0.229 and so on, each to 3 digits.
        x = torch.from_numpy(x).double().permute(0, 3, 1, 2)
        mean = torch.tensor([-0.03, -0.088, -0.188], dtype=x.dtype).view(1, 3, 1, 1)
        x = (x - mean) / torch.tensor([0.458, 0.448, 0.45], dtype=x.dtype).view(1, 3, 1, 1)
        for number, (_, _, stride, padding) in _CONVOLUTIONS.items():
            if number in (3, 6):
                x = F.max_pool2d(x, 3, 2)
            name = f"features.{number}"
            x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding).relu()
            yield x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10)

    whole = 0
    for i, (x, y) in enumerate(zip(features(got), features(want), strict=True)):
        weighted = F.conv2d((x - y) ** 2, state[f"lin{i}.model.1.weight"])
        whole = whole + weighted.mean(dim=(1, 2, 3))
    return whole.numpy()


def test_distances_equal_torch():
    want = _noise(0, 3)
    got = want + 0.2 * np.array([0, 1, 5], np.float32)[:, None, None, None] * _noise(1, 3)
    found = _distances(_params(), got, want)
    reference = _reference(got, want)
    np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-12)
    assert reference[0] == 0
    assert 0.01 < found[1] < 0.5 * found[2]


def test_the_smallest_images_and_black_ones_have_a_distance():
    params, x = _params(), _noise(0, 1, 31, 31)
    assert 0 < _distances(params, x, -x)[0] < 10
    for number in _CONVOLUTIONS:  # all features become 0, and so does their length
        params[f"features.{number}"]["bias"] = np.full(_CONVOLUTIONS[number][0], -1e3, np.float32)
    assert _distances(params, x, -x).tolist() == [0]


def test_images_too_small_for_the_network_are_refused():
    small = np.zeros((1, 30, 64, 3), np.float32)
    with pytest.raises(ValueError, match="31 x 31 or more, got 30 x 64"):
        _distances(_params(), small, small)


def _save(directory):
    (directory / "lpips").mkdir(parents=True)
    weights.save_params(directory / "lpips", _params(), dtype=None, name="model")
    return directory


def _draw(directory, pictures):
    """Image files and latents, as a rendering leaves them."""
    directory.mkdir(parents=True, exist_ok=True)
    for i, x in enumerate(pictures):
        path = images.picture_path(directory, i)
        Image.fromarray(x).save(path)
        np.save(path.with_suffix(".npy"), x[::8, ::8, :1].astype(np.float32))


def _bytes(seed, num):
    return np.round((_noise(seed, num, 40, 40) + 1) * 127.5).astype(np.uint8)


def test_each_image_is_compared_with_the_dense_models_own(tmp_path):
    network = networks.load("lpips", str(_save(tmp_path / "networks")), _DENSE)
    pictures = {"dense": _bytes(0, 3), "other": _bytes(1, 3)}
    for name, x in pictures.items():
        _draw(tmp_path / name, x)
    folders = (tmp_path / "other", tmp_path / "dense")
    found = scores.lpips_to_dense(*folders, 3, network, _MESH, num_resamples=20)["lpips_to_dense"]
    got, want = (pictures[path.name] / np.float32(127.5) - 1 for path in folders)
    distances = _reference(got, want)
    assert found["value"] == pytest.approx(distances.mean(), rel=1e-5)
    ends = interval.of_mean(distances, num_resamples=20)
    assert (found["low"], found["high"]) == pytest.approx((ends.low, ends.high), rel=1e-5)
    assert found["num"] == 3
    same = scores.lpips_to_dense(folders[1], folders[1], 3, network, _MESH, num_resamples=0)
    assert same["lpips_to_dense"]["value"] < 1e-12  # and not what was cached
    assert same["lpips_to_dense"].keys() == {"value", "num", "of_each"}
    np.testing.assert_allclose(found["of_each"], distances, rtol=1e-4)


def test_the_figure_is_there_if_the_weights_are(tmp_path, monkeypatch):
    work, directories = tmp_path / "run", {"dense": [None], "pruned": [None]}
    asked = task.Task(["", ""], None, None, 0, None, "")
    said = type("Drawn", (), {"described": lambda _: {}})()
    monkeypatch.setattr(evaluate.expert_files, "models_of_run", lambda *_: directories)
    monkeypatch.setattr(evaluate.model_directory, "open_model", lambda _: _DENSE)
    monkeypatch.setattr(evaluate.routed, "states", lambda *_: {"dense": ["a"], "pruned": ["b"]})
    monkeypatch.setattr(evaluate.routed, "models", lambda *_: {"dense": said, "pruned": said})
    monkeypatch.setattr(evaluate.task, "load", lambda *_: asked)
    monkeypatch.setattr(measuring, "load_networks", lambda *_: {})
    monkeypatch.setattr(measuring, "measure", lambda *args: {name: {} for name in args[4]})
    folders = []

    def render(*args):
        folders.extend(args[4].values())
        for i, folder in enumerate(args[4].values()):
            _draw(folder, _bytes(i, 2))

    monkeypatch.setattr(evaluate, "_render", render)
    section = config.Evaluate(
        num_images=2, batch_size=2, num_resamples=0, networks=str(tmp_path / "networks")
    )
    whole = config.Run(workdir=str(work), evaluate=section)
    without = json.loads(evaluate.run(whole, _MESH).read_text())
    assert without["weights"] == {}
    assert "psnr_to_dense" in without["models"]["pruned"]["figures"]
    assert "lpips_to_dense" not in without["models"]["pruned"]["figures"]
    _save(tmp_path / "networks")
    found = json.loads(evaluate.run(whole, _MESH).read_text())  # the old record is not enough
    assert found["weights"].keys() == {"lpips"}
    assert found["models"]["dense"]["figures"] == {}
    assert "lpips to dense (lower is better)" in evaluation.figures(found)
    figures = found["models"]["pruned"]["figures"]
    assert figures.pop("lpips_to_dense")["value"] > 0.01
    assert figures == without["models"]["pruned"]["figures"]


def test_small_images_have_no_figure_but_a_warning(tmp_path, caplog):
    _save(tmp_path)
    with caplog.at_level(logging.WARNING, "absl"):
        assert networks.load_lpips(str(tmp_path), _DENSE, (16, 16)) is None
    assert "no lpips_to_dense, for it needs images of 31 pixels or more, got 16 x 16" in caplog.text


def _source(tmp_path, **changed):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(x) for name, x in (_STATE | changed).items()}
    linear = {name: x for name, x in state.items() if name.startswith("lin")}
    convolutions = {name: x for name, x in state.items() if name not in linear}
    classifier = {"classifier.6.weight": torch.zeros(2, 2), "classifier.6.bias": torch.zeros(2)}
    torch.save(convolutions | classifier, tmp_path / "alexnet.pth")
    torch.save(linear, tmp_path / "alex.pth", _use_new_zipfile_serialization=False)
    return [str(tmp_path / name) for name in ("alexnet.pth", "networks/lpips")]


def test_published_files_become_a_network(tmp_path):
    pytest.importorskip("torch")
    import convert_metric_weights as tool

    arguments = [*_source(tmp_path), "--linear", str(tmp_path / "alex.pth")]
    tool.main(arguments)
    network = networks.load_lpips(str(tmp_path / "networks"), _DENSE, (64, 64))
    jax.tree.map(np.testing.assert_array_equal, network.params, _params())
    saved = json.loads((tmp_path / "networks/lpips/config.json").read_text())
    digest = tool._sha256([tmp_path / "alexnet.pth", tmp_path / "alex.pth"])
    assert saved == {"model_type": "lpips_0.1_alex", "source_sha256": digest}


def test_files_that_are_not_those_of_lpips_are_refused(tmp_path):
    pytest.importorskip("torch")
    import convert_metric_weights as tool

    source = _source(tmp_path)
    with pytest.raises(SystemExit, match=r"no linear layers of LPIPS: .*--linear"):
        tool.main(source)
    linear = ["--linear", str(tmp_path / "alex.pth")]
    with pytest.raises(SystemExit, match=r"alexnet\.pth and .*alex\.pth has sha256"):
        tool.main([*source, *linear, "--sha256", "0" * 64])
    source = _source(tmp_path, **{"features.6.weight": np.zeros((1, 1, 1, 1), np.float32)})
    with pytest.raises(SystemExit, match=r"features\.6\.weight: .*expected \(384, 192, 3, 3\)"):
        tool.main([*source, *linear])
    assert not (tmp_path / "networks").exists()
