"""The router's training step in PyTorch, which `bench/router.py` compares with ours."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional

from sdprune_jax import config
from sdprune_jax.aptp import gates, losses, router
from sdprune_jax.aptp.layout import Layout
from sdprune_jax.files import convert, model_directory
from sdprune_jax.models import noise_schedule
from sdprune_jax.training import encoded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    """What both sides start from."""

    model: model_directory.ModelConfig  # configs of the model
    section: config.Router  # how the router is trained
    layout: Layout  # where gates lie in a vector
    costs: Any  # MACs of every site
    params: dict[str, Any]  # parameters of the router
    frozen: dict[str, Any]  # parameters of the UNet
    batch: dict[str, Any]  # the examples of the step


def step(case: Case, dtype: str) -> Callable[[], float]:
    """Returns a function that does the step, with noise that is drawn before, as ours draws it."""
    section, batch = case.section, case.batch
    keys = jax.random.split(jax.random.key(0))
    schedule = case.model.schedule
    noisy = encoded.draw_noisy(
        jax.tree.map(jnp.asarray, batch), keys[0], schedule, case.model.vae.scaling_factor
    )
    alpha = np.asarray(noisy.alpha_cumprod)
    snr, kind = alpha / (1 - alpha), schedule.prediction_type
    weight = _put(noise_schedule.min_snr_weight(snr, section.min_snr_gamma, kind))
    image = lambda x: _put(x).permute(0, 3, 1, 2).contiguous()
    latents, target = image(noisy.latents), image(noisy.target)
    timestep = torch.from_numpy(np.array(noisy.timestep)).to(DEVICE)
    embedding, text = _put(batch["embedding"]), _put(batch["text"])
    num, shape = len(embedding), case.params["codes"].shape
    noise = [
        _put(gates.gumbel(jax.random.uniform(key, (rows, shape[1]))))
        for key, rows in zip(jax.random.split(keys[1], 3), (num, shape[0], num), strict=True)
    ]
    denoiser, routes = _Gated(case, getattr(torch, dtype)), _Router(case)
    heads = case.params["predictor"]["heads"]
    kernel, bias, codes = (
        torch.nn.Parameter(_put(x)) for x in (heads["kernel"], heads["bias"], case.params["codes"])
    )
    optimizer = torch.optim.Adam((kernel, bias, codes), lr=section.learning_rate)

    def loss_fn() -> torch.Tensor:
        logits = embedding @ kernel + bias
        prompt_gates, code_gates = routes.soft(logits, noise[0]), routes.soft(codes, noise[1])
        with torch.no_grad():
            chosen = routes.assign(routes.soft(logits, noise[2]), code_gates)
            teacher, teacher_blocks = denoiser(latents, timestep, text, None)
        student, blocks = denoiser(latents, timestep, text, code_gates[chosen])
        distances = [
            functional.mse_loss(ours.float(), other.float())
            for ours, other in zip(blocks, teacher_blocks, strict=True)
        ]
        parts = {
            "denoising": (weight * ((student - target) ** 2).mean((1, 2, 3))).mean(),
            "output": functional.mse_loss(student, teacher),
            "block": torch.stack(distances).mean(),
            **routes.losses(prompt_gates, code_gates[chosen], embedding),
        }
        return sum(getattr(section.losses, name) * loss for name, loss in parts.items())

    def run_step() -> float:
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return run_step


class _Router:
    """Gates from logits, assignment of prompts to codes, and the losses of gates."""

    def __init__(self, case: Case):
        layout, index = case.layout, lambda x: torch.as_tensor(x, device=DEVICE)
        self.epsilon, self.split = case.section.epsilon, layout.num_width
        self.sums = _put(np.repeat(np.eye(len(layout.units)), layout.units, axis=0))
        self.units = _put(layout.units)
        self.shares = _put(losses.site_shares(case.costs, layout))
        self.budget = losses.removable_budget(case.costs, case.section.macs_budget)
        self.rank = index(np.argsort(layout.depth_order))
        self.owner = index(layout.depth_of)
        self.gate_owner = index(np.repeat(layout.depth_of, layout.units))
        self.starts = index(layout.starts)
        self.scale = _put(np.repeat(np.array(layout.units, float) ** -0.5, layout.units))

    def soft(self, logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        split = self.split
        width = torch.sigmoid((logits[:, :split] + noise[:, :split] + gates.OFFSET) / 0.4)
        lift = torch.zeros_like(width)
        lift[:, self.starts] = 0.5 * (((width >= 0.5).float() @ self.sums) == 0)
        stay = torch.softmax(logits[:, split:], -1).cumsum(-1).flip(-1).clamp(max=1)
        stay = torch.log(stay + 1e-6) - torch.log1p(1e-6 - stay)
        depth = torch.sigmoid((stay + noise[:, split:] + gates.OFFSET) / 0.4)
        return torch.cat([width + lift, depth[:, self.rank]], -1)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        inside = x[:, : self.split] * x[:, self.split :][:, self.gate_owner.clamp(min=0)]
        width = torch.where(self.gate_owner >= 0, inside, _hard(x)[:, : self.split])
        return torch.cat([width * self.scale, _hard(x)[:, self.split :]], -1)

    def assign(self, prompt_gates: torch.Tensor, code_gates: torch.Tensor) -> torch.Tensor:
        similarity = _cosines(self.features(prompt_gates), self.features(code_gates))
        plan = torch.exp(similarity / self.epsilon).T
        for _ in range(router.ITERATIONS):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        return plan.argmax(0)

    def losses(
        self, prompt_gates: torch.Tensor, chosen: torch.Tensor, embedding: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        opened = _hard(chosen)
        width = (opened[:, : self.split] @ self.sums) / self.units
        depth = opened[:, self.split :]
        width = width * torch.where(self.owner >= 0, depth[:, self.owner.clamp(min=0)], 1.0)
        kept = torch.cat([width, depth], -1) @ self.shares
        wanted = torch.softmax(_cosines(embedding, embedding) / 0.03, -1)
        features = self.features(prompt_gates)
        log_p = torch.log_softmax(_cosines(features, features) / 0.03, -1)
        rest = torch.log1p(-log_p.exp().clamp(max=1 - 2**-24))
        return {
            "resource": (kept.mean().log() - np.log(self.budget)).abs(),
            "contrastive": -(wanted * log_p.clamp(min=-100) + (1 - wanted) * rest).mean(),
            "highest": 1 - kept.max(),
            "spread": -kept.std(),
        }


def _put(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(x, np.float32)).to(DEVICE)


def _hard(x: torch.Tensor) -> torch.Tensor:
    return (x >= 0.5).float() + x - x.detach()


def _cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return functional.normalize(a, dim=-1) @ functional.normalize(b, dim=-1).T


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
        self.model = self.model.to(DEVICE).eval().requires_grad_(False)
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
        blocks = [*self.model.down_blocks, self.model.mid_block, *self.model.up_blocks]
        for block in blocks:
            block.register_forward_hook(self._keep)

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
        if isinstance(output, tuple):  # a transformer's
            return ((1 - gate) * x + gate * output[0],)
        return (1 - gate) * x[:, : output.shape[1]] + gate * output
