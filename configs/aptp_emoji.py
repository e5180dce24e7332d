"""APTP on the embedded model: eight experts, each for the prompts that are routed to it.

The method of APTP, ICLR 2025 (https://arxiv.org/abs/2406.12042), at 80 % of the UNet's MACs, with
our defaults; `sdprune_jax/config/experts.py` names beside each what the published code does. The
router learns in 5,000 steps of 64 prompts, of which 500 are its warm-up; then each expert in 2,000
steps on its own prompts. Expected: every expert gets an eighth of the prompts, and unseen prompts
keep 0.8 of the MACs, within 2 %. Ends with pictures of the dense UNet and of the experts, their
quality under the protocol `embedded`, and a report on who draws what.

python -m sdprune_jax.main --config=configs/aptp_emoji.py[:tiny]
"""

from sdprune_jax import config


def get_config(size: str | None = None) -> config.Run:
    training = config.Training(
        num_steps=2000,
        batch_size=32,
        learning_rate=5e-4,
        warmup_steps=100,
        weight_decay=0.0,
        ema_decay=0.99,
    )
    run = config.Run(
        workdir="runs/aptp_emoji",
        mesh=config.Mesh(cpu_devices=2),
        router=config.Router(num_codes=8, macs_budget=0.8),
        assign=config.Assign(),
        materialise=config.Materialise(save_dtype="float16"),
        finetune=config.Finetune(training=training, save_dtype="float16"),
        generate=config.Generate(num_prompts=48, batch_size=16, guidance_scale=3.0),
        evaluate=config.Evaluate(batch_size=16),
        report=config.Report(title="Eight experts of the embedded model"),
    )
    return config.resize(run, size)
