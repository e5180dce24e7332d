"""Stage `evaluate`: what may be interrupted, what a protocol is, and what is refused."""

import dataclasses
import io
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdprune_jax import config, pipeline, sharding
from sdprune_jax.data import tokenizer
from sdprune_jax.evaluate import images, measuring, needs, networks, scores, task
from sdprune_jax.evaluate.measurement import Measurement
from sdprune_jax.evaluate.protocols import PROTOCOLS, Metric
from sdprune_jax.files import model_directory
from sdprune_jax.metrics import clip_score, embedded
from sdprune_jax.models import inception
from sdprune_jax.stages import evaluate

_SETTINGS = {
    "size": (16, 16),
    "seed": 3,
    "guidance_scale": 2.0,
    "negative_prompt": "",
    "batch_size": 2,
}


def _fake_sample(params, ids, negative, noise, scale):
    """Images of 16 pixels that depend on noise, prompt and parameters."""
    del negative, scale
    shifted = noise + params["shift"] + ids.sum(axis=1)[:, None, None, None] / 1000
    return pipeline.Sampled(shifted, jnp.tanh(shifted[..., :3]).repeat(4, 1).repeat(4, 2))


def _render(directory, shift, sample=_fake_sample):
    model = model_directory.open_model(model_directory.directory_of("embedded"))
    prompts = ["a", "red", "apple", "on", "it"]
    images.complete(directory, model, {"shift": shift}, sample, prompts, **_SETTINGS)
    return images.pictures(directory, range(5)), images.latents(directory, range(5))


def test_an_interrupted_rendering_goes_on_to_the_same_images(tmp_path):
    calls = []

    def stops(*inputs):
        calls.append(inputs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return _fake_sample(*inputs)

    with pytest.raises(KeyboardInterrupt):
        _render(tmp_path / "stopped", 0.0, stops)
    assert len(list((tmp_path / "stopped").glob("*.png"))) == 2
    (tmp_path / "stopped" / "000002.png.tmp").write_bytes(b"half a picture")
    stopped = _render(tmp_path / "stopped", 0.0, stops)
    assert len(calls) == 4  # two batches were left
    for got, want in zip(stopped, _render(tmp_path / "whole", 0.0), strict=True):
        np.testing.assert_array_equal(got, want)
    kept = _render(tmp_path / "whole", 1.0)  # nothing is missing, so nothing is rendered
    np.testing.assert_array_equal(kept[0], stopped[0])


@pytest.mark.parametrize(
    ("name", "num_images", "steps", "file_size", "quality", "networks_"),
    [
        ("sd2prune-paper", 10_000, 50, 299, 75, {"inception", "clip-vit-b-32"}),
        ("aptp-cc3m", 14_000, 25, 256, None, {"inception", "clip-vit-b-32", "clip-vit-l-14-336"}),
        ("aptp-coco", 30_000, 25, 256, None, {"inception", "clip-vit-b-32", "clip-vit-l-14-336"}),
        ("bksdm", 30_000, 25, 256, None, {"inception", "clip-vit-g-14"}),
    ],
)
def test_published_protocols_are_as_published(
    name, num_images, steps, file_size, quality, networks_
):
    protocol = PROTOCOLS[name]
    assert (protocol.num_images, protocol.num_steps) == (num_images, steps)
    assert (protocol.file_size, protocol.jpeg_quality) == (file_size, quality)
    assert protocol.guidance_scale == 7.5
    assert {metric.network for metric in protocol.metrics} == networks_


def test_protocols_of_the_config_are_those_there_are():
    assert set(config.PROTOCOLS) == set(PROTOCOLS)
    own = [metric.name for metric in PROTOCOLS["embedded"].metrics]
    assert all("clip_embedded" in name for name in own)  # nobody else's scores


def test_files_of_the_sd2_pruning_paper_are_jpegs_of_299_pixels():
    protocol = PROTOCOLS["sd2prune-paper"]
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)
    small = Image.fromarray(image).resize((299, 299), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    small.save(file, "jpeg")  # Pillow's own quality, which the authors used
    got = measuring._real(lambda _: image, protocol, 0)
    np.testing.assert_array_equal(got, np.asarray(Image.open(file)))


def test_what_a_protocol_lacks_is_said_before_any_work(tmp_path):
    section = config.Evaluate(protocol="aptp-coco", networks=str(tmp_path), batch_size=8)
    asked = config.Run(workdir=str(tmp_path / "run"), evaluate=section)
    with pytest.raises(
        ValueError,
        match=r"needs the network .* tools/convert_metric_weights.py",
    ):
        evaluate.run(asked, sharding.make_mesh())
    with pytest.raises(ValueError, match=r"set config\.evaluate\.data"):
        task.load("coco-val2014", "", 10, False)
    asked.evaluate = config.Evaluate(protocol="bksdm", references=str(tmp_path / "no.npz"))
    with pytest.raises(
        ValueError, match=r"not possible:(?s:.*)references is .*no\.npz, which is no"
    ):
        evaluate.run(asked, sharding.make_mesh())
    asked.evaluate = config.Evaluate(num_images=1, batch_size=8)
    with pytest.raises(ValueError, match="one image has no distribution"):
        evaluate.run(asked, sharding.make_mesh())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("protocol", "edge", "words"),
    [
        ("bksdm", 512, "set config.evaluate.references to their statistics"),
        ("embedded", 512, "measures images of 64 pixels, and this model makes 512"),
        ("embedded", 64, None),
    ],
)
def test_a_measurement_that_would_fail_at_its_end_is_told(protocol, edge, words):
    section = Measurement(protocol=protocol)
    found = needs.problems(section, PROTOCOLS[protocol], edge, "config.evaluate")
    assert (words in " ".join(found)) if words else not found


def test_statistics_replace_pictures_for_fid_alone():
    section = Measurement(references="statistics.npz")
    assert not needs.has_pictures(section, PROTOCOLS["sd2prune-paper"])
    assert needs.has_pictures(section, PROTOCOLS["aptp-coco"])  # CMMD
    read = [kind for kind in ("fid", "kid", "cmmd") if needs.reads_pictures(section, kind)]
    assert read == ["kid", "cmmd"]


def test_other_prompts_variants_and_statistics_are_other_evaluations(tmp_path):
    asked, protocol = config.Run(), PROTOCOLS["embedded"]
    key = lambda task_: evaluate._key(asked, protocol, ["model"], task_, (64, 64))
    before = key(_TASK)
    assert key(_TASK._replace(prompts=_TASK.prompts[:7])) == before  # more may come
    assert key(_TASK._replace(state="other")) != before
    asked.variant = "fp16"
    assert key(_TASK) != before
    section = Measurement(references=str(tmp_path / "real.npz"))
    (tmp_path / "real.npz").write_bytes(b"one")
    states = needs.states(section, protocol)
    (tmp_path / "real.npz").write_bytes(b"two")
    assert needs.states(section, protocol) != states


_TASK = task.Task([""] * 300, None, None, 0, None, "")


def _of(kind, features, reference, texts=None, **settings):
    metric = Metric("name", kind, "embedded", "none", 64, 2.0)
    settings = {"references": "", "num_resamples": 50} | settings
    network = networks.Network(lambda _, x: x, None, lambda _: texts, "", None)
    mesh = sharding.make_mesh()
    found = scores.of_metric(metric, features, reference, network, _TASK, mesh, **settings)
    return {name: figures["name"] for name, figures in found.items()}


def test_figures_of_features_that_are_known():
    x = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    shift = np.array([0.5, 0, 0, 0], np.float32)
    found = _of("fid", {"same": x, "shifted": x + shift}, x)
    assert found["same"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["shifted"]["value"] == pytest.approx(2 * 0.25, rel=1e-6)
    assert found["shifted"]["low"] < 0.5 < found["shifted"]["high"]
    assert _of("cmmd", {"same": x}, x)["same"]["value"] == pytest.approx(0, abs=1e-9)
    assert _of("kid", {"shifted": x + shift}, x)["shifted"]["value"] > 0
    cosine = _of("clip_score", {"own": x, "other": x[::-1]}, None, x)
    assert cosine["own"]["value"] == pytest.approx(2, rel=1e-6)
    assert cosine["other"]["value"] == pytest.approx(2 * np.sum(x * x[::-1]) / 300, rel=1e-5)


def test_recall_counts_a_tie_against_an_image():
    similarity = np.array([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.3, 0.2, 0.1]])
    found = [embedded.recall_at(k, similarity, np.array([0, 1, 2])).tolist() for k in (1, 2, 3)]
    assert found == [[True, False, False], [True, True, False], [True, True, True]]


def test_inception_sees_pixels_as_pytorch_fid_scales_them(monkeypatch):
    network = types.SimpleNamespace(apply=lambda _, x: x.mean(axis=(1, 2)))
    monkeypatch.setattr(inception, "InceptionV3", lambda: network)
    pixels = jnp.asarray([0, 51, 255], jnp.uint8).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(networks._embed_inception({}, pixels), [[-1, -0.6, 1]], atol=1e-6)


def test_a_distance_without_reference_pictures_is_refused():
    x = np.eye(4, dtype=np.float32)
    with pytest.raises(ValueError, match="needs reference pictures"):
        _of("kid", {"dense": x}, None)


def test_distances_to_the_dense_model_are_image_by_image(tmp_path):
    dense, other = tmp_path / "dense", tmp_path / "other"
    _render(dense, 0.0)
    _render(other, 0.25)
    found = scores.to_dense(other, dense, 5, num_resamples=0)
    assert found["latent_mse_to_dense"]["value"] == pytest.approx(0.25**2, rel=1e-5)
    assert found["psnr_to_dense"]["num"] == 5
    assert scores.to_dense(dense, dense, 5, 0)["psnr_to_dense"]["value"] > 100


def test_clip_score_is_that_of_transformers(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    dense = model_directory.open_model(model_directory.directory_of("embedded"))
    words = tokenizer.load(dense.directory / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "eos_token_id": words.eos_token_id}
    torch.manual_seed(0)
    reference = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=sizes | text | {"num_hidden_layers": 2, "max_position_embeddings": 77},
            vision_config=sizes | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    ).eval()
    reference.save_pretrained(tmp_path / "clip-tiny")
    network = networks.load("clip-tiny", str(tmp_path), dense)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 40, 3)).astype(np.uint8)
    prompts = ["a flat emoji of red apple", "cat", "a blue house, with a long red roof"]

    resized = np.stack([measuring._resized(image, "clip", 32) for image in pixels])
    embedded_images = np.asarray(network.embed(network.params, jnp.asarray(resized)))
    got = clip_score.cosines(embedded_images, network.embed_texts(prompts))

    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    inputs = processor(images=[Image.fromarray(x) for x in pixels], return_tensors="pt")
    ids = torch.from_numpy(tokenizer.encode(words, prompts, 77).astype(np.int64))
    with torch.no_grad():
        out = reference(input_ids=ids, pixel_values=inputs["pixel_values"])
    want = (out.image_embeds * out.text_embeds).sum(dim=1).numpy()
    np.testing.assert_allclose(got, want, atol=2e-5)

    nowhere = dataclasses.replace(dense, directory=tmp_path / "nowhere")
    words.save_pretrained(tmp_path / "clip-tiny")  # its own is taken before the model's
    own = networks.load("clip-tiny", str(tmp_path), nowhere)
    assert own.embed_texts is not None
    np.testing.assert_array_equal(own.embed_texts(prompts), network.embed_texts(prompts))
    monkeypatch.setattr(tokenizer, "load", lambda _: range(7))
    with pytest.raises(ValueError, match=r"the tokenizer in .*clip-tiny has 7"):
        networks.load("clip-tiny", str(tmp_path), dense)
