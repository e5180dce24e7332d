r"""APTP as published: Stable Diffusion 2.1 and COCO 2014, eight experts, 256 pixels.

Every value of the authors' code (https://github.com/rezashkv/diffusion_pruning, of the paper
https://arxiv.org/abs/2406.12042) at 16 GPUs of 64 prompts: as `aptp_cc3m.py`, but for the data,
with five captions a picture, and the weights of the losses of the experts. Two things are ours:
experts start from the dense weights, and a picture's crop is drawn once. The paper evaluates at 768
pixels: FID 39.12, CLIP score 29.98, CMMD 0.867 at 890.0 G MACs for APTP-Small, which this is;
22.60, 31.32 and 0.569 at 1076.6 G for APTP-Base, `--config.router.macs_budget=0.8`; dense 14.29,
32.17 and 0.537 at 1384.2 G, all as ALTER (https://arxiv.org/abs/2505.21817) prints them.

Latents and text states are computed once and kept on disk: 71 GB. For a pod:

    sdprune prepare-data coco SOURCE data/coco --split train2014  # and --split val2014
    python -m sdprune_jax.main --config=configs/aptp_coco.py[:tiny] [--dry_run]
"""

from sdprune_jax import config

_DEVICES = 16
_BATCH = 64 * _DEVICES


def get_config(size: str | None = None) -> config.Run:
    data = config.RouterData(
        dataset="coco",
        directory="data/coco",
        captions_per_image=5,
        flips=True,
        encoder="models/all-mpnet-base-v2",
    )
    router = config.Router(
        num_codes=8,
        macs_budget=0.6,
        mac_counter="paper",
        gate_position="pre_norm",
        forward_gates="soft",
        code_seeds="random",
        contrastive_scale=1 / _DEVICES,
        snr_weight="published",
        num_steps=5000,
        warmup_steps=500,
        batch_size=_BATCH,
        learning_rate=2e-4 * _BATCH**0.5,
        ramp_steps=100,
        remat=True,
        data=data,
        losses=config.RouterLosses(highest=0.1, spread=0.1),
    )
    training = config.Training(
        num_steps=30_000,
        batch_size=256,
        learning_rate=1e-5 * 256**0.5,
        warmup_steps=250,
        weight_decay=0.0,
        clip_norm=1e6,
        ema_decay=0.0,
    )
    run = config.Run(
        workdir="runs/aptp_coco",
        model="models/sd21",
        seed=43,
        router=router,
        assign=config.Assign("published", "draw", "none", fit_budget="none"),
        materialise=config.Materialise(),
        finetune=config.Finetune(
            denoising=1.0,
            output=0.2,
            block=0.2,
            snr_weight="published",
            caption_dropout=0.0,
            schedule="constant",
            remat=True,
            training=training,
        ),
        evaluate=config.Evaluate(
            protocol="aptp-coco", data="data/coco", networks="models/metrics", num_resamples=0
        ),
        report=config.Report(title="APTP as published, on COCO"),
    )
    return config.resize(run, size)
