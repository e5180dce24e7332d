"""The cost card, on directories that hold configs and no weights."""

import json
import re

import pytest

from sdprune_jax import artefacts, config
from sdprune_jax.aptp.records import DenseRow, ExpertRow, ExpertsRecord
from sdprune_jax.data.pictures import PictureSource
from sdprune_jax.models import clip, noise_schedule, unet, vae
from sdprune_jax.stages import cost_card

TINY = {
    "text_encoder": clip.TextConfig(60, 24, 40, 2, 4, max_position_embeddings=11),
    "unet": unet.UNetConfig(
        sample_size=6,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=24,
        norm_num_groups=4,
    ),
    "vae": vae.VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4),
}
STABLE_DIFFUSION_2 = {
    "text_encoder": clip.TextConfig(),
    "unet": unet.UNetConfig(),
    "vae": vae.VAEConfig(),
}


def _write(directory, configs):
    files = {f"{name}/config.json": values for name, values in configs.items()}
    files["scheduler/scheduler_config.json"] = noise_schedule.Schedule()
    for name, values in files.items():
        (directory / name).parent.mkdir()
        (directory / name).write_text(json.dumps(values.to_json()))
    index = {"_class_name": "StableDiffusionPipeline"}
    (directory / "model_index.json").write_text(json.dumps(index))
    return str(directory)


@pytest.fixture
def tiny(tmp_path):
    return _write(tmp_path, TINY)


def _tables(card):
    """Cells by table and row, each named by its first cell."""
    assert len(card.splitlines()) <= 40
    split = lambda text: [re.split(r"  +", line) for line in text.splitlines()]
    return {
        rows[0][0]: {row[0]: row[1:] for row in rows} for rows in map(split, card.split("\n\n"))
    }


def test_card_of_the_recommended_point(tmp_path):
    run = config.Run(
        model=_write(tmp_path, STABLE_DIFFUSION_2),
        mesh=config.Mesh(fsdp=4),
        prune=config.Prune(config.PruneComponent(0.475), config.PruneComponent(0.35)),
        generate=config.Generate(num_steps=50, batch_size=64),
    )
    card = cost_card.card(run, 64)
    assert "prune, generate to runs/run; devices data 16 x fsdp 4" in card
    found = _tables(card)
    # By hand: all but 387,072 parameters of the text encoder are split in four.
    text = found["parameters"]["text_encoder"]
    assert text[:5] == ["340,387,840", "289,406,976", "85.0%", "289,406,976", "85.0%"]
    assert text[5:] == ["1.27 GiB", "649 MiB", "326 MiB"]
    assert found["parameters"]["unet"][:3] == ["865,910,724", "301,219,840", "34.8%"]
    assert found["parameters"]["pipeline"][0] == "1,289,952,427"
    macs = found["GMACs, 512 x 512, 50 steps"]
    assert macs["unet"][:4] == ["129.922", "209.180", "61.247", "1.779"]
    assert macs["unet"][4:] == ["402.129", "102", "41,017.131"]  # PNDM makes a call more
    assert macs["vae decoder"][4:] == ["1,257.259", "1", "1,257.259"]
    assert macs["pipeline"] == ["42,296.954"]
    assert found["prune"]["text_encoder"] == [
        "138 linear layers, exact",
        "47.50%",
        "137,468,313",
        "47.50%",
        "40.39%",
        "10.66%",
    ]
    assert found["prune"]["unet"][1:] == ["35.00%", "105,426,944", "35.00%", "12.18%", "8.17%"]
    # 38.5 % is what the paper says, 20.1 % of the two components is zero.
    assert found["prune"]["together"] == ["38.53%", "242,895,257", "41.12%", "20.14%", "18.83%"]


def test_card_follows_its_sections(tiny):
    part = config.PruneComponent(sparsity=0.35, scope="linear+conv", threshold="rz")
    generate = config.Generate(sampler="ddim", num_steps=7, guidance_scale=1.0, height=8, width=20)
    run = config.Run(model=tiny, prune=config.Prune(unet=part), generate=generate)
    card = cost_card.card(run, 1)
    found = _tables(card)
    assert found["GMACs, 8 x 20, 7 steps"]["unet"][-2] == "7"
    assert found["prune"].keys() == {"prune", "unet", "together"}
    assert "linear+conv layers, rz" in found["prune"]["unet"][0]
    assert "generate: 16 prompts, 16 at once, dense and pruned" in card
    bare = cost_card.card(config.Run(model=tiny, report=config.Report()), 1)
    assert _tables(bare).keys() - {bare.split("\n")[0]} == {
        "parameters",
        "GMACs, 12 x 12, 25 steps",
    }


def test_threshold_of_ramesh_and_zhao_floors_each_layer(tiny):
    zeros = {}
    for threshold in ("exact", "rz"):
        part = config.PruneComponent(0.35, threshold=threshold)
        run = config.Run(model=tiny, prune=config.Prune(text_encoder=part))
        zeros[threshold] = _tables(cost_card.card(run, 1))["prune"]["text_encoder"][2]
    # Two layers of four 24 x 24 and two 24 x 40 matrices: 8448 weights.
    assert zeros == {"exact": f"{2956:,}", "rz": f"{2 * (4 * 201 + 2 * 336):,}"}


def test_training_holds_four_copies_of_the_parameters(tmp_path):
    section = config.Pretrain()
    section.unet.training = config.Training(num_steps=4500, batch_size=64)
    run = config.Run(model=str(tmp_path / "none"), pretrain=section)
    found = _tables(cost_card.card(run, 2))
    parameters, steps, batch, state = found["pretrain"]["unet"]
    assert parameters == found["parameters"]["unet"][0]
    assert (steps, batch) == ("4,500", "64")
    copies = float(state.removesuffix(" MiB")) * 2**20 / 4 / int(parameters.replace(",", ""))
    assert copies == pytest.approx(4, rel=2e-3)
    assert found["pretrain"].keys() == {"pretrain", "clip", "vae", "unet"}
    size = lambda name: int(found["pretrain"][name][0].replace(",", ""))
    encoder = int(found["parameters"]["text_encoder"][0].replace(",", ""))
    assert size("clip") > 1.5 * encoder  # both towers, and the last layer


def test_card_counts_what_a_run_has_without_being_asked(tiny, tmp_path):
    rows = [ExpertRow("", 1, share, 1, 1.0, {}, {}) for share in (0.6, 0.8)]
    source = PictureSource(num_images=8)
    record = ExpertsRecord("", source, 0, "", "exact", (8, 8), "", 7, DenseRow(1, 1), rows)
    output = artefacts.output_of("materialise", tmp_path / "run")
    artefacts.seal(output, {}, record)
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("PNDMScheduler", "EulerDiscreteScheduler"))
    run = config.Run(model=tiny, workdir=str(tmp_path / "run"), finetune=config.Finetune())
    card = cost_card.card(run, 1)
    assert "finetune: experts 2, each 1,000 steps" in card
    works = [float(re.search(r"about ([\d.e+-]+) TMACs", card)[1])]
    output.record.unlink()
    works.append(float(re.search(r"about ([\d.e+-]+) TMACs", cost_card.card(run, 1))[1]))
    assert works[0] / works[1] == pytest.approx((1 + 3 * 0.7) / 4, rel=0.01)
    run.generate = config.Generate()
    with pytest.raises(ValueError, match="EulerDiscreteScheduler"):
        cost_card.card(run, 1)


def test_impossible_runs_are_refused(tiny):
    for mesh in (config.Mesh(fsdp=3), config.Mesh(data=2, fsdp=2), config.Mesh(fsdp=16)):
        with pytest.raises(ValueError, match="for 8 devices"):
            cost_card.card(config.Run(model=tiny, mesh=mesh), 8)
    with pytest.raises(ValueError, match="no component"):
        cost_card.card(config.Run(model=tiny, prune=config.Prune()), 8)
    with pytest.raises(ValueError, match="2000 steps"):
        cost_card.card(config.Run(model=tiny, generate=config.Generate(num_steps=2000)), 8)
    with pytest.raises(ValueError, match="model_index"):
        cost_card.card(config.Run(model=f"{tiny}/none"), 8)
