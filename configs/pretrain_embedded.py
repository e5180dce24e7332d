"""Trains the embedded model, a small Stable Diffusion 2, from nothing.

python -m sdprune_jax.main --config=configs/pretrain_embedded.py[:tiny]
"""

from sdprune_jax import config


def get_config(size: str | None = None) -> config.Run:
    pretrain = config.Pretrain()
    pretrain.clip.hard_from, pretrain.clip.whole_from = 1000, 4200
    pretrain.clip.training = config.Training(
        num_steps=4500,
        batch_size=256,
        learning_rate=2e-3,
        warmup_steps=200,
        weight_decay=0.1,
        ema_decay=0.99,
        log_every=20,
        save_every=150,
    )
    pretrain.clip.soup_strengths, pretrain.clip.tuning_whole_from = (0.5, 0.7), 480
    pretrain.clip.tuning = config.Training(
        num_steps=600,
        batch_size=256,
        learning_rate=4e-4,
        warmup_steps=50,
        weight_decay=0.1,
        ema_decay=0.995,
        log_every=20,
        save_every=150,
        num_evals=4,
    )
    pretrain.vae.training = config.Training(
        num_steps=2500,
        batch_size=16,
        learning_rate=2e-3,
        warmup_steps=100,
        ema_decay=0.99,
        log_every=50,
        save_every=250,
    )
    # A caption has few pictures, so most is to be learned where noise hides them: high timesteps.
    pretrain.unet.timestep_skew, pretrain.unet.min_snr_gamma = 1.0, 0.0
    pretrain.unet.training = config.Training(
        num_steps=26000,
        batch_size=64,
        learning_rate=1.2e-3,
        warmup_steps=150,
        ema_decay=0.998,
        log_every=50,
        save_every=200,
    )
    mesh = config.Mesh(cpu_devices=2)
    run = config.Run(workdir="runs/pretrain_embedded", mesh=mesh, pretrain=pretrain)
    return config.resize(run, size)
