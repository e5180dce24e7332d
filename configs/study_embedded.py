"""Which method prunes the embedded model best: three seeds, 20 to 80 %, text and UNet apart.

Random, magnitude, Wanda, Wanda with OWL, SparseGPT and, on the UNet, OBS-Diff; of the UNet the
linear layers, and those with the convolutions. Distance to the dense model's latents under the same
noise, agreement with the prompt, and FD of the embedded CLIP's features: each as the mean and the
range over the seeds, in tables and drawings. Expected of the literature: a flat stretch, a knee and
a cliff; the second-order methods nearest to dense from 50 % on.

85 pruned models a seed, 128 pictures of 10 steps each: 49 minutes on 2 cores, other work beside it.

python -m sdprune_jax.main --config=configs/study_embedded.py[:tiny]
"""

from sdprune_jax import config

_SPARSITIES = (0.2, 0.4, 0.5, 0.6, 0.8)
_METHODS = (
    ("random", "uniform"),
    ("magnitude", "uniform"),
    ("wanda", "uniform"),
    ("wanda", "owl"),
    ("sparsegpt", "uniform"),
    ("obsdiff", "uniform"),
)


def get_config(size: str | None = None) -> config.Run:
    text = [
        config.SweepPoint(text_encoder=part)
        for part in _parts("linear")
        if part.method != "obsdiff"  # weighs timesteps, of which a text encoder has none
    ]
    unet = [
        config.SweepPoint(unet=part)
        for scope in ("linear", "linear+conv")
        for part in _parts(scope)
    ]
    sweep = config.Sweep(
        points=(*text, *unet),
        num_seeds=3,
        num_steps=10,
        num_kept=3,
        calibration=config.Calibration(num_prompts=64, batch_size=16, num_steps=10),
        measure=config.Evaluate(num_images=128, batch_size=16, num_resamples=0),
    )
    report = config.Report(title="Pruning the embedded model: six methods, three seeds")
    run = config.Run(
        workdir="runs/study_embedded",
        mesh=config.Mesh(cpu_devices=2),
        sweep=sweep,
        report=report,
    )
    return config.resize(run, size)


def _parts(scope: str) -> list[config.PruneComponent]:
    return [
        config.PruneComponent(sparsity, scope=scope, method=method, allocation=allocation)
        for sparsity in _SPARSITIES
        for method, allocation in _METHODS
    ]
