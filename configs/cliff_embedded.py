"""Where layer-wise magnitude breaks the embedded model: text encoder and UNet apart, 10 to 90 %.

Same prompts and noise for every point; the cliff of each component is bisected to 1.25 %. A report
with the curves and pictures along them, in 5 to 15 minutes on 2 cores.

python -m sdprune_jax.main --config=configs/cliff_embedded.py[:tiny]
"""

from sdprune_jax import config

_SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def get_config(size: str | None = None) -> config.Run:
    parts = [config.PruneComponent(sparsity=sparsity) for sparsity in _SPARSITIES]
    sweep = config.Sweep(
        points=tuple(
            [config.SweepPoint(text_encoder=part) for part in parts]
            + [config.SweepPoint(unet=part) for part in parts]
        ),
        cliff=config.Cliff(),
        measure=config.Evaluate(num_images=64, batch_size=16, num_resamples=0),
    )
    report = config.Report(title="Where magnitude pruning breaks the embedded model")
    run = config.Run(
        workdir="runs/cliff_embedded",
        mesh=config.Mesh(cpu_devices=2),
        sweep=sweep,
        report=report,
    )
    return config.resize(run, size)
