"""Times calibration against plain denoising, and the compensating solver against torch.

    python tools/bench/calibration.py [--quick] [--prompts=2] [--steps=2] [--rounds=5]

Weights are random. All sides of a ratio are measured in turns in one run, after a first run that
compiles, so other jobs slow them alike. `--quick` takes a UNet of a tenth of the widths and a layer
a sixteenth as large; without it the shapes are those of Stable Diffusion 2 at 512 pixels.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from sdprune_jax import pipeline, sharding, sites
from sdprune_jax.files.model_directory import ModelConfig
from sdprune_jax.models import clip, noise_schedule, samplers, unet, vae
from sdprune_jax.models.initial import init_params
from sdprune_jax.scoring import calibrate, obs
from sdprune_jax.scoring.recorder import LayerStats
from sdprune_jax.scoring.settings import CalibrationSettings

QUICK = unet.UNetConfig(
    sample_size=16,
    block_out_channels=(32, 64, 128, 128),
    attention_head_dim=(1, 2, 4, 4),
    cross_attention_dim=128,
)
SPARSITY = 0.5
BLOCK = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="of the sampler")
    parser.add_argument("--rounds", type=int, default=5, help="after the one that compiles")
    asked = parser.parse_args()
    quick, rounds = asked.quick, asked.rounds
    _calibration(QUICK if quick else unet.UNetConfig(), asked.prompts, asked.steps, rounds)
    _solver(*((320, 1280) if quick else (1280, 5120)), rounds)


def _calibration(config: unet.UNetConfig, num_prompts: int, num_steps: int, rounds: int) -> None:
    shapes, mesh = unet.param_shapes(config), sharding.make_mesh()
    batch = -(-num_prompts // mesh.size) * mesh.size
    params = jax.device_put(init_params(shapes, 0), sharding.fsdp_shardings(shapes, mesh))
    walk = CalibrationSettings(num_steps=num_steps, batch_size=batch)
    model = ModelConfig(
        clip.TextConfig(), config, vae.VAEConfig(), noise_schedule.Schedule(), pathlib.Path()
    )
    rng = np.random.default_rng(0)
    draw = lambda n: rng.normal(size=(n, 77, config.cross_attention_dim)).astype(np.float32)
    text, negative, key = draw(batch), draw(1), jax.random.key(0)
    both_texts = np.concatenate([text, negative])
    linear, both = (sites.prunable(shapes, "unet", scope) for scope in ("linear", "linear+conv"))

    def statistics_of(paths: list[str], statistic: str) -> None:
        stats = calibrate.unet_statistics(
            model, params, mesh, both_texts, paths, statistic, key, walk
        )
        jax.block_until_ready(stats)

    plain = partial(_denoise, model, params, text, negative, key, walk)
    seconds = _in_turns(
        {
            "plain": plain,
            "second moments, linear": lambda: statistics_of(linear, "moments"),
            "second moments, linear and convolutions": lambda: statistics_of(both, "moments"),
            "Gram matrices, linear": lambda: statistics_of(linear, "gram"),
        },
        rounds,
    )
    print(f"{batch} prompts, {num_steps} steps, guidance, latents of {config.sample_size}, float32")
    for name, value in seconds.items():
        print(f"  {name}: {value:.3f} s, {value / seconds['plain']:.2f} times plain")


def _denoise(
    model: ModelConfig,
    params: dict,
    text: np.ndarray,
    negative: np.ndarray,
    key: jax.Array,
    walk: CalibrationSettings,
) -> None:
    table = samplers.timetable(model.schedule, walk.sampler, walk.num_steps)
    shape = (*(model.unet.sample_size,) * 2, 4)
    noise = pipeline.image_noise(key, jnp.arange(len(text)), shape)
    context = np.concatenate([np.broadcast_to(negative, text.shape), text])
    scan = _scan(model.unet, params, noise, context, jax.tree.map(jnp.asarray, table))
    jax.block_until_ready(scan)


@partial(jax.jit, static_argnums=0)
def _scan(
    config: unet.UNetConfig,
    params: dict,
    noise: jax.Array,
    text: jax.Array,
    table: samplers.Timetable,
) -> jax.Array:
    def call(state: samplers.SamplerState, row: samplers.Timetable):
        x = jnp.concatenate([state.x, state.x])
        timestep = jnp.broadcast_to(row.timestep, x.shape[:1])
        without, prompted = jnp.split(
            unet.UNet(config).apply({"params": params}, x, timestep, text), 2
        )
        return samplers.step(state, row, without + 7 * (prompted - without)), None

    return jax.lax.scan(call, samplers.start(noise), table)[0].x


def _solver(n_out: int, n_in: int, rounds: int) -> None:
    import torch

    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * n_in, n_in), np.float32)
    gram, w = x.T @ x, rng.standard_normal((n_out, n_in), np.float32)
    stats = LayerStats(jnp.asarray(gram), jnp.float32(len(x)))
    kernel, number = jnp.asarray(w.T), int(SPARSITY * w.size)
    found = {}

    def ours() -> None:
        solution = obs.remove(kernel, obs.factorise(stats), number, block_size=BLOCK)
        found["ours"] = np.asarray(solution.kernel).T

    def theirs() -> None:
        found["torch"] = _in_torch(torch.from_numpy(w), torch.from_numpy(gram), len(x)).numpy()

    seconds = _in_turns({"ours": ours, "torch": theirs}, rounds)
    differ = np.mean((found["ours"] == 0) != (found["torch"] == 0))
    print(f"SparseGPT, {n_out} x {n_in}, half of the weights, blocks of {BLOCK}")
    print(f"  ours {seconds['ours']:.2f} s, torch {seconds['torch']:.2f} s,", end=" ")
    print(f"{seconds['torch'] / seconds['ours']:.1f} times; {differ:.1e} of the mask differs")


def _in_torch(w, gram, num_rows):
    """The published algorithm as one would write it down."""
    import torch

    w, hessian = w.clone(), 2 * gram / num_rows
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        block, square = w[:, start:stop], upper[start:stop, start:stop]
        score = block**2 / square.diagonal()[None] ** 2
        limit = torch.sort(score.flatten()).values[int(score.numel() * SPARSITY)]
        removed, errors = score <= limit, torch.zeros_like(block)
        for j in range(stop - start):
            pruned = torch.where(removed[:, j], 0, block[:, j])
            errors[:, j] = (block[:, j] - pruned) / square[j, j]
            block[:, j:] -= errors[:, j, None] @ square[j, None, j:]
            block[:, j] = pruned
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w


def _in_turns(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least seconds of each, run one after another several times; the first round compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(1 + rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(values[1:]) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
