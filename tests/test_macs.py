import dataclasses

import numpy as np
import pytest

from sdprune_jax import macs, sites
from sdprune_jax.models import clip, unet, vae

TINY = unet.UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=(2, 4),
    cross_attention_dim=12,
    norm_num_groups=4,
)


def test_macs_of_stable_diffusion_2():
    # Read from PyTorch's FlopCounterMode on diffusers' model; 402.1 and 1074.6 G in the literature.
    for size, total in ((32, 90_545_233_920), (64, 402_128_732_160), (96, 1_074_552_872_960)):
        assert sum(macs.of_unet(unet.UNetConfig(), (size, size))) == total
    parts = [round(part / 1e9, 1) for part in macs.of_unet(unet.UNetConfig(), (96, 96))]
    assert parts == [289.8, 470.7, 310.1, 4.0]
    assert sum(macs.of_decoder(vae.VAEConfig(), (64, 64))) == 1_257_259_466_752
    # 23 layers on 77 tokens of 1024: 12 matrices of 1024 x 1024, and two products in attention.
    assert sum(macs.of_text(clip.TextConfig())) == 23 * (77 * 12 * 1024**2 + 2 * 77**2 * 1024)


def test_units_of_sites_save_what_slicing_saves():
    size, tokens = (4, 6), 5
    dense, saved = macs.of_unet(TINY, size, tokens), macs.per_unit(TINY, size, tokens)
    for kind in ("heads", "ff", "channels", "depth"):
        chosen = [site for site in sites.table(TINY) if site.kind == kind]
        kept = {site.name: site.units // 2 for site in chosen}
        config = dataclasses.replace(TINY, kept_units=tuple(kept.items()))
        expected = sum(saved[s.name] * (s.units - kept[s.name]) for s in chosen)
        assert sum(dense) - sum(macs.of_unet(config, size, tokens)) == expected > 0
        left = {name: saved[name] for name, units in kept.items() if units}
        assert left.items() <= macs.per_unit(config, size, tokens).items()


def test_macs_equal_the_count_of_pytorch():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def count(call):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
            call()
        parts = {str(name): n // 2 for name, n in flops.get_flop_counts()["Global"].items()}
        return sum(parts.values()), parts.get("aten.convolution", 0), parts["aten.bmm"]

    def ours(found):
        return sum(found), found.conv, found.self_attention + found.cross_attention

    vae_config = vae.VAEConfig(block_out_channels=(16, 32), norm_num_groups=8, sample_size=12)
    text_config = clip.TextConfig(60, 24, 40, 3, 4, max_position_embeddings=11)
    with torch.device("meta"):
        reference = diffusers.UNet2DConditionModel.from_config(TINY.to_json())
        latents, text = torch.zeros(1, 4, 9, 6), torch.zeros(1, 5, 12)  # odd: skips are cropped
        want = count(lambda: reference(latents, torch.zeros(1), text))
        assert ours(macs.of_unet(TINY, (9, 6), 5)) == want
        autoencoder = diffusers.AutoencoderKL.from_config(vae_config.to_json())
        assert ours(macs.of_decoder(vae_config, (9, 6))) == count(
            lambda: autoencoder.decode(latents)
        )
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text_config.to_json()))
    ids = torch.from_numpy(np.full((1, 11), 3))
    assert ours(macs.of_text(text_config)) == count(lambda: encoder(ids))
