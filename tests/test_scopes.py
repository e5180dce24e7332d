import math

import numpy as np
import pytest

from sdprune_jax import sites
from sdprune_jax.files import convert
from sdprune_jax.models import clip, unet, vae


def test_scopes_hold_the_published_layers_of_stable_diffusion_2():
    shapes = {
        "text_encoder": clip.text_param_shapes(clip.TextConfig()),
        "unet": unet.param_shapes(unet.UNetConfig()),
        "vae": vae.param_shapes(vae.VAEConfig()),
    }
    linear, conv = 301_219_840, 564_247_040
    unlike = 24_780_800 + 25_804_800 + 2_048_000  # proj_in and out, time_emb_proj, time_embedding
    counts = {("text_encoder", scope): (138, 289_406_976) for scope in sites.SCOPES} | {
        ("unet", "linear"): (216, linear),
        ("unet", "linear+conv"): (216 + 64, linear + conv - 2 * 4 * 9 * 320),
        ("unet", "obsdiff"): (160, linear - unlike),
        ("unet", "all"): (216 + 66, linear + conv),
        ("vae", "linear"): (8, 2_097_152),
    }
    for (component, scope), expected in counts.items():
        paths = sites.prunable(shapes[component], component, scope)
        flat = convert.flatten(shapes[component])
        assert (len(paths), sum(math.prod(flat[path].shape) for path in paths)) == expected
    found = {scope: set(sites.prunable(shapes["unet"], "unet", scope)) for scope in sites.SCOPES}
    assert found["obsdiff"] < found["linear"] < found["linear+conv"] < found["all"]
    assert found["all"] - found["linear+conv"] == {"conv_in.kernel", "conv_out.kernel"}
    assert "time_embedding.linear_1.kernel" in found["linear"]
    assert all(".transformer_blocks." in path for path in found["obsdiff"])


def test_the_projection_of_a_text_encoder_is_in_no_scope():
    shapes = clip.text_param_shapes(clip.TextConfig(60, 24, 40, 2, 4, max_position_embeddings=11))
    with_head = shapes | {"text_projection": {"kernel": np.zeros((2, 2))}}
    for scope in sites.SCOPES:
        assert len(sites.prunable(with_head, "text_encoder", scope)) == 12


def test_a_scope_that_is_unknown_or_empty_is_refused():
    shapes = unet.param_shapes(unet.UNetConfig())
    with pytest.raises(ValueError, match=r"'conv', expected one of .*'linear\+conv'"):
        sites.prunable(shapes, "unet", "conv")
    with pytest.raises(ValueError, match="no layer of the unet is in scope 'linear'"):
        sites.prunable({"conv_in": shapes["conv_in"]}, "unet", "linear")
