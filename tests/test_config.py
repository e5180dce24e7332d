"""What a run may say, and what is said when it may not."""

import functools
import pathlib
import re

import pytest

from sdprune_jax import config
from sdprune_jax.config import checks, command_line

CONFIGS = sorted(pathlib.Path(__file__).parents[1].glob("configs/*.py"))


def _run(**changes: object) -> config.Run:
    """Every section set, then some keys changed, with `__` for the dot."""
    run = config.Run(
        pretrain=config.Pretrain(),
        prune=config.Prune(unet=config.PruneComponent()),
        router=config.Router(),
        finetune=config.Finetune(),
        generate=config.Generate(),
        report=config.Report(),
    )
    for key, value in changes.items():
        *path, last = key.split("__")
        setattr(functools.reduce(getattr, path, run), last, value)  # types are not checked here
    return run


@pytest.mark.parametrize("size", ["", ":tiny"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_ours_is_possible(path, size):
    run = command_line.load(f"{path}{size}")
    checks.check(run)
    assert any(getattr(run, stage) for stage in config.STAGES)
    assert f"configs/{path.name}" in path.read_text().split('"""')[1]  # says its own command


def test_every_default_is_possible():
    checks.check(_run())
    checks.check(config.Run())


def test_sparsity_in_percent_gets_the_fraction():
    with pytest.raises(ValueError, match=re.escape("so 35 % is 0.35")):
        checks.check(_run(prune__unet__sparsity=35))
    checks.check(_run(prune__unet__sparsity=0.35))
    checks.check(_run(prune__unet__sparsity=0))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 200, float("nan")])
def test_sparsity_outside_its_range_is_refused_with_the_range(sparsity):
    with pytest.raises(ValueError, match=r"sparsity is .*, expected float from 0\.0 to 0\.999999$"):
        checks.check(_run(prune__unet__sparsity=sparsity))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "3"}, "config.seed is '3', expected int from 0 to 4294967295"),
        ({"seed": True}, "config.seed is True, expected int"),
        ({"seed": None}, "config.seed is None, expected int"),
        ({"prune": 3}, "config.prune is 3, expected Prune or none"),
        ({"prune__unet__sparsity": "half"}, "prune.unet.sparsity is 'half', expected float"),
        ({"prune__unet__scope": "liner"}, "linear+conv, obsdiff, all; did you mean `linear`?"),
        ({"prune__unet__method": "sparcegpt"}, "alps, taylor; did you mean `sparsegpt`?"),
        ({"generate__sampler": "pdnm"}, "one of pndm, ddim, dpm++ or none; did you mean `pndm`?"),
        ({"generate__height": 9.5}, "generate.height is 9.5, expected int from 8 to 8192 or none"),
        ({"pretrain__unet__heads": (1, 2)}, "unet.heads has not 4 values"),
        ({"pretrain__unet__heads": (3, 4, 8, 8)}, "do not divide widths"),
        ({"pretrain__unet__heads": ()}, "unet.heads is (), expected one or more int"),
        ({"pretrain__vae__widths": (16, 0)}, "vae.widths is (16, 0), expected"),
        ({"pretrain__vae__widths": [12]}, "not all multiples of norm_num_groups=8"),
        ({"pretrain__clip__heads": 5}, "clip.heads=5 does not divide width=128"),
        ({"pretrain__clip__training__num_steps": 9}, "warmup_steps=100, not fewer than the 9"),
        ({"pretrain__unet__training__cycles": 10}, "unet.training has warmup_steps=100, not fewer"),
        (
            {"pretrain__vae__training__clip_norm": 0.0},
            "clip_norm is 0.0, expected float from 1e-06",
        ),
        ({"dtype": "bfloat16"}, "dtype is bfloat16, and pretrain computes in float32 alone"),
        ({"finetune__training__warmup_steps": 1000}, "finetune.training has warmup_steps=1000"),
        ({"router__num_steps": 500}, "codes learn only after warmup_steps=500"),
        ({"router__batch_size": 7}, "batch_size=7, fewer prompts than the 8 codes"),
    ],
)
def test_impossible_value_is_refused_with_what_is_possible(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        checks.check(_run(**change))


def test_batches_that_do_not_divide_are_told_at_once():
    run = _run(generate__batch_size=12, router__batch_size=20, finetune__training__batch_size=24)
    run.pretrain.unet.training.batch_size = 36
    run.sweep = config.Sweep(measure=config.Evaluate(batch_size=28))
    with pytest.raises(ValueError, match=r"a multiple of the 8 devices") as error:
        checks.check_devices(run, 8)
    told = [line.split(" is ")[0].strip() for line in str(error.value).splitlines()[1:]]
    assert {name.removeprefix("config.").removesuffix(".batch_size") for name in told} == {
        "router",
        "generate",
        "sweep.measure",
        "pretrain.unet.training",
    }
    checks.check_devices(run, 4)


def test_all_problems_are_told_at_once():
    wrong = {"prune__unet__sparsity": 2, "prune__unet__threshold": "x", "dtype": "bf16", "seed": -1}
    with pytest.raises(ValueError, match="not possible") as error:
        checks.check(_run(**wrong))
    assert str(error.value).count("\n  config.") == 4


def test_pruning_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no component"):
        checks.check(_run(prune__unet=None))


def test_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"unknown size 'small'.*`tiny`"):
        config.resize(config.Run(), "small")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sed": "1"}, "config has no field `sed`; did you mean `seed`? it has workdir, model"),
        ({"prune.unet.sparcity": "1"}, "config.prune.unet has no field `sparcity`; did you mean `"),
        ({"fsdp": "1"}, "did you mean `mesh.fsdp`?"),
        ({"seed.x": "1"}, "config.seed is a value, it has no field `x`"),
        ({"mesh": "none"}, "config.mesh is 'none', but it is a section: say `build`, or set its"),
        ({"prune": "yes"}, "say `build` or `none`, or set its text_encoder, unet"),
        ({"prune.text_encoder.scope": "linear"}, "put --config.prune.text_encoder=build before it"),
        ({"prune": "none", "prune.unet.sparsity": "0"}, "config.prune=none leaves that section"),
        ({"report.title": "x"}, "put --config.report=build before it"),
    ],
)
def test_key_that_sets_nothing_is_refused(overrides, message):
    run = config.Run(prune=config.Prune(unet=config.PruneComponent()))
    with pytest.raises(ValueError, match=re.escape(message)):
        checks.check_keys(run, overrides)


def test_keys_that_set_something_pass():
    run = config.Run(prune=config.Prune(unet=config.PruneComponent()))
    good = {"seed": "1", "prune.unet.sparsity": "0", "report": "build", "report.title": "x"}
    checks.check_keys(run, good)
    checks.check_keys(run, {"prune": "none", "mesh.data": "-1"})
    deep = {"prune": "build", "prune.unet": "build", "prune.unet.sparsity": "0.1"}
    checks.check_keys(config.Run(), deep)
