"""A model directory with the smallest UNet of every kind of site, and a router for it."""

import dataclasses
import math
import pathlib

import jax
import numpy as np

from sdprune_jax import artefacts, config, sharding, sites
from sdprune_jax.aptp import layout, router
from sdprune_jax.aptp.records import RouterRecord
from sdprune_jax.files import model_directory
from sdprune_jax.files.weights import save_params
from sdprune_jax.models import unet, vae
from sdprune_jax.stages import inputs

UNET = unet.UNetConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=(2, 4),
    cross_attention_dim=12,
    norm_num_groups=4,
)
# The least to compile: one level, two transformers and three ResNets that can go.
ONE_LEVEL = dataclasses.replace(
    UNET,
    block_out_channels=(16,),
    attention_head_dim=(2,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
)
LAYOUT = layout.layout_of(sites.table(UNET))
# One device: programs of eight compile for longer, and trainings of test_train.py have those.
MESH = sharding.make_mesh(devices=jax.devices()[:1])
DATA = config.RouterData(num_images=24, captions_per_image=2)
SOURCE = inputs.picture_source(DATA)


def make(
    directory: pathlib.Path, unet_config: unet.UNetConfig = UNET
) -> model_directory.ModelConfig:
    """Random parameters, biases and norms too; the tokenizer is that of the embedded model."""
    embedded = model_directory.open_model(model_directory.directory_of("embedded"))
    sizes = {"intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = dataclasses.replace(embedded.text_encoder, hidden_size=12, **sizes)
    sizes = {"sample_size": 64, "block_out_channels": (4, 4, 4, 4), "layers_per_block": 1}
    vae_config = vae.VAEConfig(**sizes, norm_num_groups=2, scaling_factor=1.0)
    model = dataclasses.replace(embedded, text_encoder=text, unet=unet_config, vae=vae_config)
    params = {
        name: random_params(model_directory.param_shapes(model, name), seed)
        for seed, name in enumerate(model_directory.COMPONENTS)
    }
    model_directory.save(model, params, directory, dtype=np.float32)
    return model_directory.open_model(directory)


def random_params(shapes, seed):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + np.float32(0.3) * noise
        return noise / np.float32(math.prod(leaf.shape[:-1] or (10,)) ** 0.5)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def write_router(workdir: pathlib.Path, model: model_directory.ModelConfig) -> None:
    """Writes a finished router of three codes that close about a third of all gates."""
    width = model.text_encoder.hidden_size
    sizes = layout.layout_of(sites.table(model.unet))
    params = router.init_params(sizes, width, 3, 0)
    rng = np.random.default_rng(1)
    shape = params["codes"].shape
    params["codes"] = rng.normal(-2.8, 1.0, size=shape).astype(np.float32)
    params["predictor"]["heads"]["bias"] -= np.float32(2.8)
    made_from = {"model": artefacts.model_state(model.directory), "by": "hand"}
    with artefacts.writing(artefacts.output_of("router", workdir), made_from) as partial:
        save_params(partial.directory, params, dtype=np.float32, name="model")
        partial.record = RouterRecord(
            str(model.directory), "", 0, width, (8, 8), 3, 0.7, "exact", SOURCE
        )


def rewrite(output: artefacts.Output, change) -> None:
    """Changes the values of a record, as a stage of other inputs would have written it."""
    values = artefacts._values(output.record)
    change(values)
    artefacts._write(output.record, values)
