"""Times the router's training step against the same step in PyTorch.

    python tools/bench/router.py [--batch 8] [--rounds 3] [--model sd21 --dtype bfloat16]

A step of APTP after its warm-up: route the prompts, the UNet once without gates and once with gates
that differ from prompt to prompt, all losses, gradients of the router alone, Adam. In PyTorch the
UNet is that of diffusers, whose layers are multiplied by the gates in hooks, as one would write it
first. Weights and batch are the same, and so is the noise of the step that is compared before the
timing, which does not begin if the losses disagree. The fastest rounds count; they alternate, and
other jobs slow both sides, so quote the ratio. `sd21` is Stable Diffusion 2.1 at 256 pixels with
random weights. Both sides use a GPU if there is one.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch_router
from torch_router import Case

from sdprune_jax import config, sharding, sites
from sdprune_jax.aptp import router, router_training
from sdprune_jax.aptp.layout import layout_of
from sdprune_jax.files import model_directory
from sdprune_jax.models import clip, noise_schedule, unet, vae
from sdprune_jax.models.initial import init_params
from sdprune_jax.stages import router as router_stage

_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # relative difference of the losses


def run() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("embedded", "sd21"), default="embedded")
    parser.add_argument("--batch", type=int, default=8, help="prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    sharding.keep_freed_memory()
    case = _case(args.model, args.batch)
    steps = {"ours": _step(case, args.dtype), "torch": torch_router.step(case, args.dtype)}
    loss = {name: step() for name, step in steps.items()}  # compiles; the same noise on both sides
    apart = abs(loss["ours"] / loss["torch"] - 1)
    compared = f"loss {loss['ours']:.6f}, torch {loss['torch']:.6f}: {apart:.1e} apart"
    if apart > (most := _TOLERANCE[args.dtype]):
        sys.exit(f"error: not the same step: {compared}, expected at most {most:.0e}")
    print(compared)
    taken: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(args.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - start)
    best = {name: min(seconds) for name, seconds in taken.items()}
    print(
        f"{args.model}, {args.batch} prompts, {args.dtype}, on {jax.devices()[0].device_kind} and"
        f" torch on {torch_router.DEVICE}: a step takes {best['ours']:.3f} s, torch"
        f" {best['torch']:.3f} s, {best['torch'] / best['ours']:.2f} times as long; rounds"
        f" {', '.join(f'{b / a:.2f}' for a, b in zip(*taken.values(), strict=True))}"
    )


def _case(name: str, batch_size: int) -> Case:
    if name == "embedded":
        model = model_directory.open_model(model_directory.directory_of("embedded"))
        size, width = model.unet.sample_size, model.text_encoder.hidden_size
        frozen = model_directory.load(model, "unet", dtype=np.float32)
    else:
        schedule = noise_schedule.Schedule(prediction_type="v_prediction")
        parts = (clip.TextConfig(), unet.UNetConfig(), vae.VAEConfig())
        model = model_directory.ModelConfig(*parts, schedule, pathlib.Path())
        size, width = 32, 768
        frozen = init_params(model_directory.param_shapes(model, "unet"), 0)
    section = config.Router(batch_size=batch_size, warmup_steps=0, ramp_steps=0)
    layout = layout_of(sites.table(model.unet))
    params = router.init_params(layout, width, section.num_codes, 0)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params["codes"] += draw(*params["codes"].shape) - 2.8  # about a third of the gates closed
    params["predictor"]["heads"]["bias"] -= np.float32(2.8)
    tokens = model.text_encoder.max_position_embeddings
    batch = {
        "embedding": draw(batch_size, width),
        "text": draw(batch_size, tokens, model.unet.cross_attention_dim).astype(np.float16),
        "mean": draw(batch_size, size, size, 4),
        "log_variance": draw(batch_size, size, size, 4) - 5,
        "warms_up": np.zeros(batch_size, bool),
    }
    costs = router_training.budget_costs(model, (size, size), section.mac_counter)
    return Case(model, section, layout, costs, params, jax.tree.map(np.asarray, frozen), batch)


def _step(case: Case, dtype: str) -> Callable[[], float]:
    loss_fn = router_stage.make_loss(
        case.section, case.model, case.costs, case.layout, jnp.dtype(dtype)
    )
    optimizer = router_stage.make_optimizer(case.section)

    @jax.jit
    def step(params, state, frozen, batch, key):
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, frozen, batch, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    placed = jax.tree.map(jnp.asarray, (case.params, case.frozen, case.batch))
    held = [placed[0], optimizer.init(placed[0])]

    def run_step() -> float:
        *held[:], loss = step(*held, *placed[1:], jax.random.key(0))
        return float(loss)

    return run_step


if __name__ == "__main__":
    run()
