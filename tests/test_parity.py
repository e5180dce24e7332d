"""Every model against PyTorch: all parameters random, biases and norms too; odd sizes too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax.files import convert
from sdprune_jax.models import clip, unet, vae

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

BOUND = 2e-5  # of the largest output


def _randomise(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        fan_in = max(tensor[0].numel(), 1) if tensor.ndim > 1 else 10
        if "norm" in name and name.endswith("weight"):
            noise = 1 + 0.3 * noise
        else:
            noise = noise / fan_in**0.5
        tensor.data.copy_(noise)
    return module.eval()


def _params(module, shapes):
    state = {key: x.numpy() for key, x in module.state_dict().items()}
    flat = {
        path: convert.from_torch(path, state[convert.torch_key(path)])
        for path in convert.flatten(shapes)
    }
    for path, leaf in convert.flatten(shapes).items():
        assert flat[path].shape == leaf.shape, path
    return convert.unflatten(flat, shapes)


def _apply(model, params, *inputs, method=None):
    return jax.jit(model.apply, static_argnames="method")(
        {"params": params}, *inputs, method=method
    )


def _assert_close(got, want):
    want = want.detach().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=BOUND * np.abs(want).max())


def _nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


UNETS = {
    "SD2's skeleton, odd latents": (
        {"block_out_channels": (16, 32, 48, 48), "attention_head_dim": (2, 2, 3, 4)},
        (2, 9, 13),
    ),
    "one layer a block, upcast": (
        {
            "block_out_channels": (32, 64),
            "attention_head_dim": (1, 4),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "upcast_attention": True,
        },
        (3, 8, 6),
    ),
    "attention everywhere, sines first": (
        {
            "block_out_channels": (16, 32, 32),
            "attention_head_dim": (1, 2, 2),
            "freq_shift": 1,
            "down_block_types": ("CrossAttnDownBlock2D",) * 3,
            "norm_num_groups": 4,
            "flip_sin_to_cos": False,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3,
            "norm_eps": 1e-6,
        },
        (1, 5, 5),
    ),
}


@pytest.mark.parametrize("name", UNETS)
def test_unet_equals_diffusers(name):
    values, (b, h, w) = UNETS[name]
    config = unet.UNetConfig(**{"cross_attention_dim": 24, "norm_num_groups": 8} | values)
    reference = diffusers.UNet2DConditionModel.from_config(config.to_json())
    params = _params(_randomise(reference, 0), unet.param_shapes(config))
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(b, h, w, 4)).astype(np.float32)
    text = rng.normal(size=(b, 7, 24)).astype(np.float32)
    timestep = np.array([981, 0, 500][:b], np.int32)
    got = _apply(unet.UNet(config), params, latents, timestep, text)
    with torch.no_grad():
        want = reference(_nchw(latents), torch.from_numpy(timestep), torch.from_numpy(text)).sample
    _assert_close(got, want.permute(0, 2, 3, 1))


VAES = {
    "three levels": ({"block_out_channels": (16, 32, 32), "layers_per_block": 1}, (2, 12, 20)),
    "four levels": ({"block_out_channels": (8, 16, 16, 24), "norm_num_groups": 4}, (1, 24, 8)),
    "odd images": ({"block_out_channels": (16, 24)}, (2, 9, 7)),
}


@pytest.mark.parametrize("name", VAES)
def test_vae_equals_diffusers(name):
    values, (b, h, w) = VAES[name]
    config = vae.VAEConfig(**{"norm_num_groups": 8, "sample_size": 32} | values)
    reference = _randomise(diffusers.AutoencoderKL.from_config(config.to_json()), 0)
    params = _params(reference, vae.param_shapes(config))
    images = np.random.default_rng(1).uniform(-1, 1, size=(b, h, w, 3)).astype(np.float32)
    model = vae.VAE(config)
    mean, log_variance = _apply(model, params, images, method="encode")
    with torch.no_grad():
        want = reference.encode(_nchw(images)).latent_dist
        decoded = reference.decode(want.mean).sample
    _assert_close(mean, want.mean.permute(0, 2, 3, 1))
    _assert_close(log_variance, want.logvar.permute(0, 2, 3, 1))
    latents = jnp.asarray(want.mean.permute(0, 2, 3, 1).numpy())
    got = _apply(model, params, latents, method="decode")
    _assert_close(got, decoded.permute(0, 2, 3, 1))


CLIPS = {
    "exact gelu": ({"hidden_act": "gelu", "eos_token_id": 59}, {"patch_size": 8, "image_size": 32}),
    "quick gelu, legacy end of text": (
        {"hidden_act": "quick_gelu", "eos_token_id": 2},
        {"patch_size": 4, "image_size": 20, "hidden_act": "quick_gelu"},
    ),
    "one layer, odd image": (
        {"num_hidden_layers": 1, "num_attention_heads": 1, "eos_token_id": 59},
        {"patch_size": 5, "image_size": 23, "num_hidden_layers": 1},
    ),
}


def _clip(name):
    text, vision = CLIPS[name]
    shared = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    shared |= {"num_attention_heads": 4, "projection_dim": 20}
    config = clip.CLIPConfig(
        clip.TextConfig(**shared | {"vocab_size": 60, "max_position_embeddings": 11} | text),
        clip.VisionConfig(**shared | vision),
        projection_dim=20,
    )
    ids = np.random.default_rng(2).integers(3, 58, size=(3, 11)).astype(np.int32)
    ids[0, 4:], ids[1, 10:], ids[2, 7] = 59, 59, 59
    return config, ids


@pytest.mark.parametrize("name", CLIPS)
def test_text_encoder_equals_transformers(name):
    config, ids = _clip(name)
    reference = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config.text.to_json()))
    reference = _randomise(reference, 0)
    shapes = clip.text_param_shapes(config.text)
    if not any(key.startswith("text_model.") for key in reference.state_dict()):
        shapes = shapes["text_model"]  # transformers 5 dropped the prefix
    params = _params(reference, shapes)
    params = params if "text_model" in params else {"text_model": params}
    got = _apply(clip.TextTower(config.text), params, ids)
    with torch.no_grad():
        want = reference(torch.from_numpy(ids)).last_hidden_state
    _assert_close(got, want)


@pytest.mark.parametrize("name", CLIPS)
def test_clip_equals_transformers_layer_by_layer(name):
    config, ids = _clip(name)
    reference = transformers.CLIPModel(transformers.CLIPConfig(**config.to_json()))
    params = _params(_randomise(reference, 0), clip.clip_param_shapes(config))
    size = config.vision.image_size
    images = np.random.default_rng(3).normal(size=(3, size, size, 3)).astype(np.float32)
    is_layer = lambda module, _: isinstance(module, clip.EncoderLayer)
    apply = lambda params, *inputs: clip.CLIP(config).apply(
        {"params": params}, *inputs, capture_intermediates=is_layer, mutable=["intermediates"]
    )
    (texts, pictures, scale), intermediates = jax.jit(apply)(params, ids, images)
    with torch.no_grad():
        want = reference(torch.from_numpy(ids), _nchw(images), output_hidden_states=True)
    towers = {"text_model": want.text_model_output, "vision_model": want.vision_model_output}
    for tower, output in towers.items():
        layers = intermediates["intermediates"][tower]
        assert len(layers) == len(output.hidden_states) - 1  # before the layers, and after each
        for i, state in enumerate(output.hidden_states[1:]):
            _assert_close(layers[f"encoder.layers.{i}"]["__call__"][0], state)
    _assert_close(texts, want.text_embeds)
    _assert_close(pictures, want.image_embeds)
    np.testing.assert_allclose(scale, np.exp(params["logit_scale"]), rtol=1e-6)
    _assert_close(scale * pictures @ texts.T, want.logits_per_image)
