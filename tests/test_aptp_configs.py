"""Configs of APTP that no test runs: what they ask for, and that their cards can be had."""

import dataclasses
import json
import pathlib

import pytest

from sdprune_jax import config
from sdprune_jax.config import checks, command_line
from sdprune_jax.models import clip, noise_schedule, unet, vae
from sdprune_jax.stages import cost_card

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
ROWS = [
    "ours",
    "published",
    "contrastive",
    "no-transport",
    "one",
    "uniform",
    "random",
    "norm",
    "taylor",
    "diff-pruning",
    "bksdm-base",
]

PUBLISHED = {
    "router": {
        "mac_counter": "paper",
        "gate_position": "pre_norm",
        "forward_gates": "soft",
        "code_seeds": "random",
        "snr_weight": "published",
        "resource_kind": "log",
        "num_steps": 5000,
        "warmup_steps": 500,
        "ramp_steps": 100,
    },
    "assign": {
        "route_noise": "published",
        "final_codes": "draw",
        "balance": "none",
        "fit_budget": "none",
    },
    "finetune": {
        "snr_weight": "published",
        "caption_dropout": 0.0,
        "schedule": "constant",
        "min_snr_gamma": 5.0,
    },
}


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """The configs of Stable Diffusion 2.1, without weights."""
    directory = tmp_path_factory.mktemp("sd21")
    files = {
        "text_encoder/config.json": clip.TextConfig(),
        "unet/config.json": unet.UNetConfig(sample_size=96),
        "vae/config.json": vae.VAEConfig(),
        "scheduler/scheduler_config.json": noise_schedule.Schedule(prediction_type="v_prediction"),
    }
    for name, values in files.items():
        (directory / name).parent.mkdir()
        (directory / name).write_text(json.dumps(values.to_json()))
    index = {"_class_name": "StableDiffusionPipeline"}
    (directory / "model_index.json").write_text(json.dumps(index))
    return str(directory)


@pytest.mark.parametrize("name", ["cc3m", "coco"])
def test_published_configs_are_planned_for_sixteen_devices(name, stable_diffusion):
    run = command_line.load(f"{CONFIGS}/aptp_{name}.py")
    checks.check(run)
    run.model = stable_diffusion
    card = cost_card.card(run, 16)
    assert f"router, assign, materialise, finetune, evaluate, report to runs/aptp_{name}" in card
    assert f"evaluate: aptp-{name}, {14_000 if name == 'cc3m' else 30_000:,} images" in card
    # Of 90.5 GMACs: the teacher, and the student forward, forward again, and back.
    assert "1,024 prompts, 371 TMACs each; 3.23 GiB of frozen UNet a device" in card
    assert (
        "256 prompts, about 78.8 TMACs each" in card
    )  # the student's at 0.6, and twice as much back
    assert "at most 12.9 GiB of state" in card  # four times the UNet
    router, finetune = run.router, run.finetune
    assert (router.num_codes, router.macs_budget, router.batch_size) == (8, 0.6, 1024)
    assert router.learning_rate == pytest.approx(6.4e-3)
    assert router.contrastive_scale == 1 / 16
    for section, fields in PUBLISHED.items():
        assert dataclasses.asdict(getattr(run, section)).items() >= fields.items()
    losses = {"denoising": 1.0, "output": 0.2, "block": 0.2, "resource": 2.0, "contrastive": 100.0}
    losses |= {"highest": 0.1, "spread": 0.1, "code_pull": 0.0}
    assert dataclasses.asdict(router.losses) == losses
    weights = (finetune.denoising, finetune.output, finetune.block)
    assert weights == ((0.01, 0.5, 0.5) if name == "cc3m" else (1.0, 0.2, 0.2))
    training = finetune.training
    assert (training.num_steps, training.batch_size, training.warmup_steps) == (30_000, 256, 250)
    assert training.learning_rate == pytest.approx(1.6e-4)


@pytest.mark.parametrize("name", ["cc3m", "coco", "study"])
def test_tiny_ones_need_no_data_but_ours(name):
    run = command_line.load(f"{CONFIGS}/aptp_{name}.py:tiny")
    checks.check(run)
    assert run.model == "embedded"
    data = run.router.data
    small = config.RouterData(num_images=64, captions_per_image=1)
    assert data == dataclasses.replace(small, directory=data.directory, flips=data.flips)
    assert run.evaluate.protocol == "embedded"
    assert "routed" in cost_card.card(run, 8)


def test_rows_of_the_study_differ_in_their_architectures_alone():
    runs = {row: command_line.load(f"{CONFIGS}/aptp_study.py:{row}") for row in ROWS}
    for row, run in runs.items():
        checks.check(run)
        cut = run.router or run.slice
        assert cut.macs_budget == 0.65
        assert bool(run.router) == bool(run.assign) == bool(run.materialise) == (not run.slice)
        assert run.finetune.training == runs["ours"].finetune.training
        assert run.evaluate == runs["ours"].evaluate
        assert cut.data == config.RouterData()
        small = command_line.load(f"{CONFIGS}/aptp_study.py:{row},tiny")
        assert (small.workdir, bool(small.slice)) == (f"{run.workdir}_tiny", bool(run.slice))
        if run.slice:
            assert (run.slice.criterion, run.finetune) == (row, runs["ours"].finetune)
    assert len({run.workdir for run in runs.values()}) == len(ROWS)
    with pytest.raises(ValueError, match="unknown row 'nor', expected one of ours, published"):
        command_line.load(f"{CONFIGS}/aptp_study.py:nor")
