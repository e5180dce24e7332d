r"""APTP as published: Stable Diffusion 2.1 and Conceptual Captions, eight experts, 256 pixels.

Every value of the authors' code (https://github.com/rezashkv/diffusion_pruning, of the paper
https://arxiv.org/abs/2406.12042) at 16 GPUs of 64 prompts: a router of 5,000 steps, 500 of them its
warm-up, at 60 % of the MACs in the paper's counter; 30,000 steps for each expert. Two things are
ours: experts start from the dense weights, and a picture's crop is drawn once. The paper evaluates
at 768 pixels: FID 60.04, CLIP score 28.64, CMMD 1.094 at 916.3 G MACs for APTP-Small, which this
is, and dense 17.08, 30.96, 0.361 at 1384.2 G, all as ALTER (https://arxiv.org/abs/2505.21817)
prints them. For APTP-Base, 36.77, 30.84 and 0.675 at 1182.8 G, the budget was 0.8 and the experts
16, at other weights of the losses. Our own defaults differ: see `sdprune_jax/config/experts.py`.

Latents and text states are computed once and kept on disk, 0.22 MB a picture with its mirror image:
620 GB for all, and twice that while they are computed; `--config.router.data.num_images=100000`
takes 22. For a pod:

    sdprune prepare-data cc3m SOURCE data/cc3m --split train  # and --split validation
    python -m sdprune_jax.main --config=configs/aptp_cc3m.py[:tiny] [--dry_run]
"""

from sdprune_jax import config

_DEVICES = 16
_BATCH = 64 * _DEVICES


def get_config(size: str | None = None) -> config.Run:
    data = config.RouterData(
        dataset="cc3m",
        directory="data/cc3m",
        captions_per_image=1,
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
        workdir="runs/aptp_cc3m",
        model="models/sd21",
        seed=43,
        router=router,
        assign=config.Assign("published", "draw", "none", fit_budget="none"),
        materialise=config.Materialise(),
        finetune=config.Finetune(
            denoising=0.01,
            output=0.5,
            block=0.5,
            snr_weight="published",
            caption_dropout=0.0,
            schedule="constant",
            remat=True,
            training=training,
        ),
        evaluate=config.Evaluate(
            protocol="aptp-cc3m", data="data/cc3m", networks="models/metrics", num_resamples=0
        ),
        report=config.Report(title="APTP as published, on Conceptual Captions"),
    )
    return config.resize(run, size)
