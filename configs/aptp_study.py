r"""APTP against its baselines on the embedded model: one row of the comparison a command.

All at 65 % of the UNet's MACs, which BK-SDM's first student has (64.9 %), and trained on the same
captions for the same steps: `ours`, APTP with our defaults; `published`, as its authors' code does
it (https://arxiv.org/abs/2406.12042), but for the random weights that its experts start from;
`contrastive` and `no-transport`, two of its ablations; `one`, a single learned architecture; and by
rule `uniform`, `random`, `norm`, `taylor`, `diff-pruning` and `bksdm-base`, each for all prompts.
Every model is fine-tuned for as many steps, as published, so eight experts for eight times as many
in all; a single one given those, with `--config.finetune.training.num_steps=2000`, is the other
fair comparison. The trainings are short, so that 2 cores can do them. Expected: experts are nearer
to the dense model than any single UNet of as many steps, and `one` of 2,000 nearer than they;
`docs/results.md` has the figures.

    for row in ours published one uniform random norm taylor bksdm-base; do
        python -m sdprune_jax.main --config=configs/aptp_study.py:$row
    done
    sdprune compare runs/aptp_study/*

`:tiny` is `ours` in small, and `:norm,tiny` any other row; `--config.seed=1` needs another workdir.
"""

import dataclasses

from sdprune_jax import config

_BUDGET = 0.65  # of all MACs
_EXPERTS = 8
_ROUTER = {
    "macs_budget": _BUDGET,
    "num_steps": 1000,
    "warmup_steps": 200,
    "batch_size": 32,
    "learning_rate": 2e-4 * 1024**0.5,  # published, for a batch of 1,024
}
_RULES = ("uniform", "random", "norm", "taylor", "diff-pruning", "bksdm-base")


def get_config(size: str | None = None) -> config.Run:
    row, _, small = (size or "ours").partition(",")
    if row == "tiny":
        row, small = "ours", "tiny"
    run = config.Run(
        workdir=f"runs/aptp_study/{row}",
        mesh=config.Mesh(cpu_devices=2),
        finetune=_finetune(),
        evaluate=config.Evaluate(batch_size=16, num_images=256),
    )
    if row in _RULES:
        run.slice = config.Slice(criterion=row, macs_budget=_BUDGET)
    elif row in _ROUTERS:
        _ROUTERS[row](run)
        run.materialise = config.Materialise()
    else:
        raise ValueError(f"unknown row {row!r}, expected one of {', '.join((*_ROUTERS, *_RULES))}")
    return config.resize(run, small or None)


def _finetune() -> config.Finetune:
    training = config.Training(
        num_steps=250,
        batch_size=32,
        learning_rate=5e-4,
        warmup_steps=25,
        weight_decay=0.0,
        ema_decay=0.99,
        num_evals=0,
    )
    return config.Finetune(schedule="constant", training=training)


def _ours(run: config.Run) -> None:
    run.router = config.Router(num_codes=_EXPERTS, **_ROUTER)
    run.assign = config.Assign()


def _published(run: config.Run) -> None:
    """The scale of the contrastive loss is that of one device.

    Random codes start with open gates, and had closed few by step 1,000: they take twice the steps.
    """
    run.router = config.Router(
        num_codes=_EXPERTS,
        mac_counter="paper",
        gate_position="pre_norm",
        forward_gates="soft",
        code_seeds="random",
        snr_weight="published",
        losses=config.RouterLosses(highest=0.1, spread=0.1),
        **_ROUTER,
    )
    run.router.num_steps = 2000
    run.assign = config.Assign("published", "draw", "none", fit_budget="none")
    run.finetune = dataclasses.replace(
        _finetune(), denoising=0.01, snr_weight="published", caption_dropout=0.0
    )


def _contrastive(run: config.Run) -> None:
    """The first step of the authors' ablation: no balance, no distillation, no spread of costs."""
    _no_transport(run)
    assert run.router is not None
    weights = config.RouterLosses(output=0.0, block=0.0)
    run.router = dataclasses.replace(run.router, losses=weights)


def _no_transport(run: config.Run) -> None:
    """As published, but that each prompt goes to its nearest code in training too."""
    _published(run)
    assert run.router is not None
    run.router = dataclasses.replace(run.router, optimal_transport=False)


def _one(run: config.Run) -> None:
    """Architecture and weights for all prompts are learned; nothing is routed."""
    weights = config.RouterLosses(contrastive=0.0)
    run.router = config.Router(num_codes=1, losses=weights, **_ROUTER)
    run.assign = config.Assign()


_ROUTERS = {
    "ours": _ours,
    "published": _published,
    "contrastive": _contrastive,
    "no-transport": _no_transport,
    "one": _one,
}
