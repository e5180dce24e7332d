"""Measures what the headline sparsities cost the embedded model, with intervals.

Text encoder 47.5 % and UNet 35 % by layer-wise magnitude (https://arxiv.org/abs/2411.15113), under
the protocol `embedded`: 512 training captions, 25 steps of PNDM, guidance 3. 4 minutes on 2
cores, and it goes on where it was stopped.

python -m sdprune_jax.main --config=configs/evaluate_embedded.py[:tiny]
"""

from sdprune_jax import config


def get_config(size: str | None = None) -> config.Run:
    prune = config.Prune(
        text_encoder=config.PruneComponent(sparsity=0.475),
        unet=config.PruneComponent(sparsity=0.35),
    )
    run = config.Run(
        workdir="runs/evaluate_embedded",
        prune=prune,
        evaluate=config.Evaluate(batch_size=32),
        report=config.Report(title="The embedded model, measured"),
    )
    return config.resize(run, size)
