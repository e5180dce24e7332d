import dataclasses
import re

import numpy as np
import pytest

from sdprune_jax import sites
from sdprune_jax.models import clip, unet, vae
from sdprune_jax.sites import macs

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


# APTP's counter on Stable Diffusion 2.1: sub-blocks of its architecture vector -> MACs that its
# width gates remove (for a transformer: self-attention, cross-attention, feed-forward) | the rest
# of the block; at a 32 x 32 latent with 77 tokens, then at 96 x 96 with 1.
PAPER = """
0 1: 1889157440 | 655360 : 16999137600 | 5898240
2 3 35 36 37: 1095762240 936509760 1258294080 | 211354240
 : 58557727040 56670945600 11324623680 | 1902183040
4: 1417052800 | 52756480 : 12746916480 | 474808320
5: 1888912000 | 327680 : 16993649280 | 2949120
6 7 29 30 31: 503972480 395182720 1258296960 | 210535680
 : 10622730880 8736604800 11324626560 | 1894810880
8: 1417544960 | 52592640 : 12744787200 | 473333760
9: 1889404160 | 163840 : 16991520000 | 1474560
10 11 23 24 25: 429999360 422135040 1258302720 | 210127360
 : 4630856960 2746041600 11324632320 | 1891125760
12 13 14 15: 473580800 | 40960 : 4249109760 | 368640
16: 105519360 254941440 314584320 | 52533760 : 997218560 527980800 2831166720 | 472783360
17 18 19: 709510400 | 52531200 : 6372476160 | 472780800
20 21: 2833122560 | 210124800 : 25484985600 | 1891123200
22: 2361263360 | 157614080 : 21238252800 | 1418526720
26: 3776348800 | 315719680 : 33980580480 | 2841477120
27: 2832630400 | 210534400 : 25487114880 | 1894809600
28: 2360771200 | 157941760 : 21240382080 | 1421475840
32: 3776594240 | 316866560 : 33986068800 | 2851799040
33 34: 2832875840 | 211353600 : 25492603200 | 1902182400
"""


def test_paper_counter_gives_the_numbers_of_aptp():
    dense = unet.UNetConfig()
    for size, tokens, removable, total in (
        (32, 77, 81_165_672_960, 94_062_888_576),
        (64, 77, 411_269_368_320, 462_851_677_824),
        (96, 77, 1_270_071_288_320, 1_386_128_754_304),
        (96, 1, 1_268_128_801_280, 1_384_186_267_264),
    ):
        found = macs.by_site(dense, (size, size), tokens, "paper")
        assert (found.removable, found.total) == (removable, total)


def test_paper_counter_splits_every_block_as_aptp():
    rows = {}
    for line in PAPER.replace("\n :", " :").strip().splitlines():
        blocks, *costs = line.split(":")
        rows |= {
            int(block): [[int(n) for n in re.findall(r"\d+", c)] for c in costs]
            for block in blocks.split()
        }
    dense = unet.UNetConfig()
    width = [site.name for site in sites.table(dense) if site.kind != "depth"]
    blocks = list(dict.fromkeys(name.partition(".transformer_blocks")[0] for name in width))
    assert len(rows) == len(blocks) == 38
    for column, (size, tokens) in enumerate(((32, 77), (96, 1))):
        found = macs.by_site(dense, (size, size), tokens, "paper")
        fixed = found.always
        for i, block in enumerate(blocks):
            *prunable, rest = rows[i][column]
            inside = [name for name in width if f"{name}.".startswith(f"{block}.")]
            assert [found.sites[name] for name in inside] == prunable, block
            assert found.sites.get(f"{block}.depth", rest) == rest, block
            fixed -= 0 if f"{block}.depth" in found.sites else rest
        # Everything outside of the blocks: time embedding, resampling, first and last layers.
        assert fixed == (9_262_716_416, 83_347_101_184)[column]


def test_sites_and_the_rest_add_up_to_the_exact_count():
    found = macs.by_site(TINY, (4, 6), 5)
    assert found.total == sum(macs.of_unet(TINY, (4, 6), 5))
    assert list(found.sites) == [site.name for site in sites.table(TINY)]
    closed = {site.name: 1 for site in sites.table(TINY)} | dict.fromkeys(
        [name for name in found.sites if name.endswith(".depth")], 0
    )
    smallest = dataclasses.replace(TINY, kept_units=tuple(closed.items()))
    left = macs.by_site(smallest, (4, 6), 5)
    assert left.always == found.always
    with pytest.raises(ValueError, match="expected one of"):
        macs.by_site(TINY, (4, 6), 5, "published")


def _per_unit(config, latent_size, text_tokens):
    """What removing one unit of each site saves; a whole block goes with the sites inside."""
    found = macs.by_site(config, latent_size, text_tokens).sites
    saved = {site.name: found[site.name] // site.units for site in sites.table(config)}
    for name in [name for name in found if name.endswith(".depth")]:
        block = name.removesuffix("depth")
        saved[name] = sum(cost for inner, cost in found.items() if f"{inner}.".startswith(block))
    return saved


def test_units_of_sites_save_what_slicing_saves():
    size, tokens = (4, 6), 5
    dense, saved = macs.of_unet(TINY, size, tokens), _per_unit(TINY, size, tokens)
    for kind in ("heads", "ff", "channels", "depth"):
        chosen = [site for site in sites.table(TINY) if site.kind == kind]
        kept = {site.name: site.units // 2 for site in chosen}
        config = dataclasses.replace(TINY, kept_units=tuple(kept.items()))
        expected = sum(saved[s.name] * (s.units - kept[s.name]) for s in chosen)
        assert sum(dense) - sum(macs.of_unet(config, size, tokens)) == expected > 0
        left = {name: saved[name] for name, units in kept.items() if units}
        assert left.items() <= _per_unit(config, size, tokens).items()


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
