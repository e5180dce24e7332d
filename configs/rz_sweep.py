r"""All 99 configurations of Ramesh and Zhao 2024, and their cliffs.

https://arxiv.org/abs/2411.15113. UNet by layer-wise magnitude; text encoder by magnitude, Wanda and
OWL on both; then both together. With Stable Diffusion 2 under their protocol the results in their
code (CLIP / FID) are: dense 0.3140 / 18.07; UNet at 35 % 0.3144 / 18.81, FID doubled by 45 %; text
encoder by magnitude at 50 % 0.3103 / 18.06, 60 % 0.2677 / 27.21, 65 % 0.1858 / 134; both at 47.5 %
and 35 % 0.3113 / 18.15, of which 38.53 % is nominal and 20.14 % zero. Known to differ: every image
has a seed here; OWL by magnitude takes its outliers from magnitudes, theirs from Wanda; Wanda reads
the dense encoder, theirs the one pruned so far.

On the embedded model, with 64 prompts, hours on 2 cores; `--dry_run` lists it all.

    python -m sdprune_jax.main --config=configs/rz_sweep.py[:tiny]
    python -m sdprune_jax.main --config=configs/rz_sweep.py --config.model=models/sd2 \
        --config.sweep.measure.protocol=sd2prune-paper --config.sweep.measure.num_images=0 \
        --config.sweep.measure.data=data/coco --config.sweep.measure.networks=models/metrics \
        --config.sweep.calibration.prompts=captions.txt
"""

from sdprune_jax import config

_UNET = (
    0.1,
    0.2,
    0.3,
    0.35,
    0.375,
    0.4,
    0.425,
    0.45,
    0.475,
    0.5,
    0.525,
    0.55,
    0.575,
    0.6,
)
_TEXT = (0.3, 0.4, 0.5, 0.55, 0.575, 0.6, 0.625, 0.65, 0.675, 0.7, 0.8)
_BOTH = (
    (0.18, 0.21),
    (0.35, 0.14),
    (0.53, 0.07),
    (0.27, 0.31),
    (0.53, 0.21),
    (0.8, 0.1),
    (0.425, 0.3),
    (0.45, 0.325),
    (0.475, 0.35),
    (0.35, 0.42),
    (0.71, 0.28),
    (0.5, 0.375),
    (0.525, 0.4),
    (0.55, 0.425),
    (0.575, 0.45),
    (0.44, 0.52),
    (0.89, 0.35),
    (0.6, 0.475),
    (0.625, 0.5),
    (0.53, 0.63),
)


def get_config(size: str | None = None) -> config.Run:
    points = [config.SweepPoint(unet=_prune(s)) for s in _UNET]
    for method, allocation in (
        ("magnitude", "uniform"),
        ("magnitude", "owl"),
        ("wanda", "uniform"),
        ("wanda", "owl"),
    ):
        more = (0.525,) if (method, allocation) == ("wanda", "uniform") else ()
        points += [
            config.SweepPoint(text_encoder=_prune(s, method, allocation))
            for s in sorted((*_TEXT, *more))
        ]
    points += [
        config.SweepPoint(_prune(text, allocation=allocation), _prune(unet))
        for text, unet in _BOTH
        for allocation in ("uniform", "owl")
    ]
    sweep = config.Sweep(
        points=tuple(points),
        cliff=config.Cliff(),
        calibration=config.Calibration(num_prompts=128, mask_pads=False),
        measure=config.Evaluate(num_images=64, batch_size=16, num_resamples=0),
    )
    report = config.Report(title="Where pruning breaks")
    return config.resize(config.Run(workdir="runs/rz_sweep", sweep=sweep, report=report), size)


def _prune(
    sparsity: float, method: str = "magnitude", allocation: str = "uniform"
) -> config.PruneComponent:
    """Their threshold is a rule of uniform magnitude; OWL takes 7 times the mean for an outlier."""
    is_plain = (method, allocation) == ("magnitude", "uniform")
    return config.PruneComponent(
        sparsity,
        method=method,
        allocation=allocation,
        owl_multiple=7.0 if allocation == "owl" else 5.0,
        threshold="rz" if is_plain else "exact",
    )
