"""The embedded model through diffusers and through us, and what an image may depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax import config, pipeline, sharding
from sdprune_jax.data import tokenizer
from sdprune_jax.files import model_directory
from sdprune_jax.metrics import paired
from sdprune_jax.stages import generate

_PROMPTS = ("a flat emoji of red apple", "a noto emoji of cat face", "a 3d emoji of airplane")
_DIRECTORY = model_directory.directory_of("embedded")


def _ids(model, prompts):
    words = tokenizer.load(model.directory / "tokenizer")
    return tokenizer.encode(words, prompts, model.text_encoder.max_position_embeddings)


def _noise(model, index, seed=0):
    size = model.unet.sample_size
    return pipeline.image_noise(jax.random.key(seed), jnp.asarray(index), (size, size, 4))


def _sample(mesh, prompts, index, num_steps):
    model = model_directory.open_model(_DIRECTORY)
    params = pipeline.load(model, mesh)
    sample = pipeline.make_sample(model, mesh, sampler=None, num_steps=num_steps, guided=True)
    noise = _noise(model, index)
    ids, negative = _ids(model, prompts), _ids(model, [""])
    return np.asarray(sample(params, ids, negative, noise, jnp.float32(7.5)).images)


def test_images_equal_those_of_diffusers():
    torch = pytest.importorskip("torch")
    import diffusers  # whose pipelines need torch

    got = _sample(sharding.make_mesh(1, 8), [*_PROMPTS] * 3 + [""] * 7, range(16), 25)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(_DIRECTORY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = np.asarray(_noise(model_directory.open_model(_DIRECTORY), range(16)))[:3].transpose(
        0, 3, 1, 2
    )
    want = pipe(
        list(_PROMPTS),
        latents=torch.from_numpy(noise.copy()),
        num_inference_steps=25,
        guidance_scale=7.5,
        output_type="np",
    ).images
    assert want.std() > 0.05
    decibel = paired.psnr(got[:3], want * 2 - 1)
    assert decibel.min() >= 50, decibel


def test_an_image_does_not_depend_on_batch_order_or_devices():
    prompts = [_PROMPTS[i % 3] for i in range(16)]
    whole = _sample(sharding.make_mesh(8, 1), prompts, range(16), 4)
    some = np.random.default_rng(0).permutation(16)[:8]
    again = _sample(sharding.make_mesh(1, 8), [prompts[i] for i in some], some, 4)
    np.testing.assert_allclose(again, whole[some], atol=1e-4)


def test_images_that_are_not_finite_are_refused():
    images = np.zeros((3, 2, 2, 3), np.float32)
    images[1, 0, 0, 0] = np.nan
    with pytest.raises(FloatingPointError, match=r"images \[1\]"):
        pipeline.to_bytes(images)


def test_pictures_that_cannot_be_decoded_are_refused_before_any_work(tmp_path):
    section = config.Generate(num_prompts=2, height=66, width=5)
    asked = config.Run(workdir=str(tmp_path / "run"), generate=section)
    message = r"(?s)height is 66, expected a multiple of 4.*width is 5"
    with pytest.raises(ValueError, match=message):
        generate.run(asked, sharding.make_mesh())
    assert not (tmp_path / "run").exists()
