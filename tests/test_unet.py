"""Full-size names and shapes, and what the module promises beyond parity."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from sdprune_jax.files import convert
from sdprune_jax.models import clip, unet, vae
from sdprune_jax.models.initial import init_params

# sha256 of the lines "name shape", sorted, of the released checkpoints' tensors.
DIGESTS = {
    "text_encoder": "ed8ac14c6009c58f16515860fa1c070e48548bc2b16204fad3f044782a4f068e",
    "unet": "102cedebfb24e477a06ae61809735ebaa75f361e6549862d432f445ef996fd26",
    "vae": "a8eb7356226250e756201865679f4127b544badce9a66957f83afdbf731c2f37",
}
COUNTS = {
    "text_encoder": (372, 340_387_840),
    "unet": (686, 865_910_724),
    "vae": (248, 83_653_863),
}
SHAPES = {
    "text_encoder": lambda: clip.text_param_shapes(clip.TextConfig()),
    "unet": lambda: unet.param_shapes(unet.UNetConfig()),
    "vae": lambda: vae.param_shapes(vae.VAEConfig()),
}


def test_names_shapes_and_counts_are_those_of_stable_diffusion_2_1():
    for name, make in SHAPES.items():
        flat = convert.flatten(make())
        lines = []
        for path, leaf in flat.items():
            shape = [leaf.shape[axis] for axis in convert.torch_axes(path, len(leaf.shape))]
            lines.append(f"{convert.torch_key(path)} {shape}")
        count = sum(leaf.size for leaf in flat.values())
        assert (len(lines), count) == COUNTS[name]
        assert hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() == DIGESTS[name]


def test_configs_are_written_back_as_they_were_read():
    for config in (unet.UNetConfig(upcast_attention=True), vae.VAEConfig(), clip.TextConfig()):
        assert type(config).from_json(config.to_json()) == config


def _tiny():
    config = unet.UNetConfig(
        block_out_channels=(16, 32),
        attention_head_dim=(1, 2),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    rng = np.random.default_rng(0)
    params = init_params(unet.param_shapes(config), 0)
    inputs = (
        jnp.asarray(rng.normal(size=(2, 4, 4, 4)), jnp.float32),
        jnp.array([1, 900]),
        jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32),
    )
    return config, params, inputs


def test_rematerialisation_changes_no_gradient():
    config, params, inputs = _tiny()

    def gradient(remat):
        model = unet.UNet(config, remat=remat)
        loss = lambda params: jnp.mean(model.apply({"params": params}, *inputs) ** 2)
        return jax.jit(jax.grad(loss))(params)

    for a, b in zip(*(jax.tree.leaves(gradient(remat)) for remat in (False, True)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_keeps_parameters_and_output_in_float32():
    config, params, inputs = _tiny()
    run = lambda dtype: jax.jit(unet.UNet(config, dtype).apply)({"params": params}, *inputs)
    full, half = run(jnp.float32), run(jnp.bfloat16)
    assert half.dtype == jnp.float32
    assert 0 < float(jnp.abs(full - half).max()) < 0.05 * float(jnp.abs(full).max())
