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
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional

from sdprune_jax import config, sharding, sites
from sdprune_jax.aptp import gates, losses, router, router_training
from sdprune_jax.aptp.layout import Layout, layout_of
from sdprune_jax.files import convert, model_directory
from sdprune_jax.models import clip, noise_schedule, unet, vae
from sdprune_jax.stages import router as router_stage
from sdprune_jax.training import encoded, loop

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_APART = {"float32": 1e-4, "bfloat16": 3e-2}  # losses, relative


class Case(NamedTuple):
    """What both sides start from."""

    model: model_directory.ModelConfig
    section: config.Router
    layout: Layout
    costs: Any
    params: dict[str, Any]  # of the router
    frozen: dict[str, Any]  # of the UNet
    batch: dict[str, Any]


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
    ours, theirs = _ours(case, args.dtype), _theirs(case, args.dtype)
    found = {"ours": ours(), "torch": theirs()}  # compiles; the same noise on both sides
    apart = abs(found["ours"] / found["torch"] - 1)
    said = f"loss {found['ours']:.6f}, torch {found['torch']:.6f}: {apart:.1e} apart"
    if apart > _APART[args.dtype]:
        sys.exit(f"error: not the same step: {said}, expected at most {_APART[args.dtype]:.0e}")
    print(said)
    taken: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(args.rounds):
        for name, step in (("ours", ours), ("torch", theirs)):
            start = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - start)
    best = {name: min(seconds) for name, seconds in taken.items()}
    print(
        f"{args.model}, {args.batch} prompts, {args.dtype}, on {jax.devices()[0].device_kind} and"
        f" torch on {_DEVICE}: a step takes {best['ours']:.3f} s, torch {best['torch']:.3f} s,"
        f" {best['torch'] / best['ours']:.2f} times as long; rounds"
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
        frozen = loop.init_params(model_directory.param_shapes(model, "unet"), 0)
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


def _ours(case: Case, dtype: str) -> Any:
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


def _theirs(case: Case, dtype: str) -> Any:
    """The step in PyTorch; its noise is drawn before, as ours draws it."""
    layout, section, batch = case.layout, case.section, case.batch
    put = lambda x: torch.from_numpy(np.array(x, np.float32)).to(_DEVICE)
    keys = jax.random.split(jax.random.key(0))
    schedule = case.model.schedule
    noisy = encoded.draw_noisy(
        jax.tree.map(jnp.asarray, batch), keys[0], schedule, case.model.vae.scaling_factor
    )
    alpha = np.asarray(noisy.alpha_cumprod)
    weight = put(
        noise_schedule.min_snr_weight(alpha / (1 - alpha), section.min_snr_gamma,
                                 schedule.prediction_type)
    )  # fmt: skip
    nchw = lambda x: put(x).permute(0, 3, 1, 2).contiguous()
    latents, target = nchw(noisy.latents), nchw(noisy.target)
    timestep = torch.from_numpy(np.array(noisy.timestep)).to(_DEVICE)
    embedding, text = put(batch["embedding"]), put(batch["text"])
    num, shape = len(embedding), case.params["codes"].shape
    noise = [
        put(gates.gumbel(jax.random.uniform(key, (rows, shape[1]))))
        for key, rows in zip(jax.random.split(keys[1], 3), (num, shape[0], num), strict=True)
    ]
    kind = getattr(torch, dtype)
    denoiser = _Gated(case, kind)
    heads = case.params["predictor"]["heads"]
    kernel, bias, codes = (
        torch.nn.Parameter(put(x)) for x in (heads["kernel"], heads["bias"], case.params["codes"])
    )
    optimizer = torch.optim.Adam((kernel, bias, codes), lr=section.learning_rate)
    sums = put(np.repeat(np.eye(len(layout.units)), layout.units, axis=0))
    units, shares = put(layout.units), put(losses.site_shares(case.costs, layout))
    budget = losses.removable_budget(case.costs, section.macs_budget)
    rank = torch.from_numpy(np.argsort(layout.depth_order)).to(_DEVICE)
    owner = torch.tensor(layout.depth_of, device=_DEVICE)
    gate_owner = torch.from_numpy(np.repeat(layout.depth_of, layout.units)).to(_DEVICE)
    starts, split = torch.from_numpy(layout.starts).to(_DEVICE), layout.num_width
    scale = put(np.repeat(np.array(layout.units, float) ** -0.5, layout.units))
    hard = lambda x: (x >= 0.5).float() + x - x.detach()

    def soft(logits, noise):
        width = torch.sigmoid((logits[:, :split] + noise[:, :split] + gates.OFFSET) / 0.4)
        lift = torch.zeros_like(width)
        lift[:, starts] = 0.5 * (((width >= 0.5).float() @ sums) == 0)
        stay = torch.softmax(logits[:, split:], -1).cumsum(-1).flip(-1).clamp(max=1)
        stay = torch.log(stay + 1e-6) - torch.log1p(1e-6 - stay)
        depth = torch.sigmoid((stay + noise[:, split:] + gates.OFFSET) / 0.4)
        return torch.cat([width + lift, depth[:, rank]], -1)

    def features(x):
        inside = x[:, :split] * x[:, split:][:, gate_owner.clamp(min=0)]
        width = torch.where(gate_owner >= 0, inside, hard(x)[:, :split])
        return torch.cat([width * scale, hard(x)[:, split:]], -1)

    def cosines(a, b):
        return functional.normalize(a, dim=-1) @ functional.normalize(b, dim=-1).T

    def assign(similarity):
        plan = torch.exp(similarity / section.epsilon).T
        for _ in range(router.ITERATIONS):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        return plan.argmax(0)

    def loss_fn():
        logits = embedding @ kernel + bias
        prompt_gates, code_gates = soft(logits, noise[0]), soft(codes, noise[1])
        with torch.no_grad():
            found = assign(cosines(features(soft(logits, noise[2])), features(code_gates)))
        chosen = code_gates[found]
        with torch.no_grad():
            teacher, teacher_blocks = denoiser(latents, timestep, text, None)
        student, blocks = denoiser(latents, timestep, text, chosen)
        opened = hard(chosen)
        width = (opened[:, :split] @ sums) / units
        depth = opened[:, split:]
        width = width * torch.where(owner >= 0, depth[:, owner.clamp(min=0)], 1.0)
        kept = torch.cat([width, depth], -1) @ shares
        wanted = torch.softmax(cosines(embedding, embedding) / 0.03, -1)
        log_p = torch.log_softmax(
            cosines(features(prompt_gates), features(prompt_gates)) / 0.03, -1
        )
        rest = torch.log1p(-log_p.exp().clamp(max=1 - 2**-24))
        pairs = zip(blocks, teacher_blocks, strict=True)
        parts = {
            "denoising": (weight * ((student - target) ** 2).mean((1, 2, 3))).mean(),
            "output": functional.mse_loss(student, teacher),
            "block": torch.stack(
                [functional.mse_loss(a.float(), b.float()) for a, b in pairs]
            ).mean(),
            "resource": (kept.mean().log() - np.log(budget)).abs(),
            "contrastive": -(wanted * log_p.clamp(min=-100) + (1 - wanted) * rest).mean(),
            "highest": 1 - kept.max(),
            "spread": -kept.std(),
        }
        return sum(getattr(section.losses, name) * loss for name, loss in parts.items())

    def run_step() -> float:
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return run_step


class _Gated:
    """diffusers' UNet with gates of every prompt, and the outputs of its blocks."""

    def __init__(self, case: Case, dtype: torch.dtype):
        self.layout, self.dtype = case.layout, dtype
        self.gates: dict[str, torch.Tensor] = {}
        self.blocks: list[torch.Tensor] = []
        self.model: Any = UNet2DConditionModel.from_config(case.model.unet.to_json())
        state = {
            convert.torch_key(path): torch.from_numpy(np.array(convert.to_torch(path, x))).to(dtype)
            for path, x in convert.flatten(case.frozen).items()
        }
        self.model.load_state_dict(state, assign=True)
        self.model = self.model.to(_DEVICE).eval().requires_grad_(False)
        for name in case.layout.width:
            module = self.model.get_submodule(name)
            if hasattr(module, "norm2"):
                module.norm2.register_forward_pre_hook(
                    lambda _, inputs, name=name: self._narrow(name, inputs[0])
                )
                continue
            is_attention = hasattr(module, "to_q")
            for layer in ("to_q", "to_k", "to_v") if is_attention else ("net.0.proj",):
                module.get_submodule(layer).register_forward_hook(
                    lambda _, __, output, name=name, halves=1 if is_attention else 2: self._narrow(
                        name, output, halves
                    )
                )
        for name in case.layout.depth:
            block = self.model.get_submodule(name.removesuffix(".depth"))
            block.register_forward_hook(
                lambda _, inputs, output, name=name: self._skip(name, inputs[0], output)
            )
        stages = [*self.model.down_blocks, self.model.mid_block, *self.model.up_blocks]
        for stage in stages:
            stage.register_forward_hook(self._keep)

    def __call__(self, latents, timestep, text, vector):
        layout, self.blocks = self.layout, []
        sizes = [*layout.units, *[1] * len(layout.depth)]
        parts = vector.to(self.dtype).split(sizes, -1) if vector is not None else ()
        self.gates = dict(zip((*layout.width, *layout.depth), parts, strict=False))
        out = self.model(latents.to(self.dtype), timestep, text.to(self.dtype)).sample
        return out.float(), self.blocks

    def _keep(self, _: Any, __: Any, output: Any) -> None:
        self.blocks.append(output[0] if isinstance(output, tuple) else output)

    def _narrow(self, name: str, x: torch.Tensor, halves: int = 1) -> torch.Tensor:
        """Gates of a site before its norm; a feed-forward's values and scales are two halves."""
        if name not in self.gates:
            return x
        axis = 1 if x.ndim == 4 else 2  # channels of an image, or of tokens
        gate, num = self.gates[name], x.shape[axis] // halves
        gate = gate.repeat_interleave(num // gate.shape[1], 1).repeat(1, halves)
        return x * (gate[:, :, None, None] if axis == 1 else gate[:, None])

    def _skip(self, name: str, x: torch.Tensor, output: Any) -> Any:
        if name not in self.gates:
            return output
        gate = self.gates[name][:, :, None, None]
        if isinstance(output, tuple):  # of a transformer
            return ((1 - gate) * x + gate * output[0],)
        return (1 - gate) * x[:, : output.shape[1]] + gate * output


if __name__ == "__main__":
    run()
