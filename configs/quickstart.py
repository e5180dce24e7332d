"""The main job on the embedded model: prune at the headline sparsities, look at the difference.

Reproduces the recommended point of Ramesh and Zhao 2024 (https://arxiv.org/abs/2411.15113), text
encoder 47.5 % and UNet 35 % by layer-wise magnitude, on a small model of the same architecture.
Ends with the path of a report; under 3 minutes on 2 cores.

python -m sdprune_jax.main --config=configs/quickstart.py[:tiny]
"""

from sdprune_jax import config


def get_config(size: str | None = None) -> config.Run:
    prune = config.Prune(
        text_encoder=config.PruneComponent(sparsity=0.475),
        unet=config.PruneComponent(sparsity=0.35),
        save_dtype="float16",
    )
    run = config.Run(
        workdir="runs/quickstart",
        mesh=config.Mesh(cpu_devices=2),
        prune=prune,
        generate=config.Generate(num_prompts=48, batch_size=16, guidance_scale=3.0),
        report=config.Report(title="The embedded model, pruned"),
    )
    return config.resize(run, size)
