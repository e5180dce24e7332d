"""Measures what pruning costs the embedded model, with intervals: dense, pruned, and two experts.

Pruned: text encoder 47.5 % and UNet 35 % by layer-wise magnitude
(https://arxiv.org/abs/2411.15113). Experts: APTP (https://arxiv.org/abs/2406.12042) at 80 % of the
UNet's MACs, trained briefly, the router for 100 steps and each expert for 40: what they lose is
what is left to train, see `aptp_emoji.py`. All under the protocol `embedded`: 192 training
captions, 25 steps of PNDM, guidance 3. Some 10 minutes on 2 cores, compiling included, and it goes
on where it was stopped.

python -m sdprune_jax.main --config=configs/evaluate_embedded.py[:tiny]
"""

from sdprune_jax import config


def get_config(size: str | None = None) -> config.Run:
    prune = config.Prune(
        text_encoder=config.PruneComponent(sparsity=0.475),
        unet=config.PruneComponent(sparsity=0.35),
    )
    # Few steps, so that they are long: of the rate of `aptp_emoji.py`, no gate would close in time.
    router = config.Router(
        num_codes=2,
        num_steps=100,
        warmup_steps=30,
        batch_size=16,
        learning_rate=0.03,
        ramp_steps=10,
        num_evals=1,
        data=config.RouterData(num_images=2048, captions_per_image=2),
    )
    training = config.Training(
        num_steps=40,
        batch_size=16,
        learning_rate=5e-4,
        warmup_steps=10,
        weight_decay=0.0,
        ema_decay=0.95,
        num_evals=0,
    )
    run = config.Run(
        workdir="runs/evaluate_embedded",
        mesh=config.Mesh(cpu_devices=2),
        prune=prune,
        router=router,
        assign=config.Assign(),
        materialise=config.Materialise(),
        finetune=config.Finetune(training=training),
        evaluate=config.Evaluate(batch_size=16, num_images=192),
        report=config.Report(title="The embedded model, measured"),
    )
    return config.resize(run, size)
