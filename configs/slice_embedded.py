"""Cuts one smaller UNet for all prompts out of the embedded model: the baselines of APTP.

By group norm to 80 % of the MACs, as the norm baseline of https://arxiv.org/abs/2406.12042, at its
budget for COCO. Cut alone, it draws poorly; what the paper compares is fine-tuned first. Seconds;
with `--config.finetune=build`, which trains it as APTP's experts are, hours on 2 cores.
`--config.slice.criterion` may also be uniform, random, taylor, diff-pruning, obs, operators
(LD-Pruner), or bksdm-base, bksdm-small and bksdm-tiny, whose size is fixed.

python -m sdprune_jax.main --config=configs/slice_embedded.py[:tiny]
"""

from sdprune_jax import config


def get_config(size: str | None = None) -> config.Run:
    run = config.Run(
        workdir="runs/slice_embedded", slice=config.Slice(criterion="norm", macs_budget=0.8)
    )
    return config.resize(run, size)
