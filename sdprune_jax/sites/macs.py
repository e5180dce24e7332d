"""Multiply-accumulates (MACs) of the models, counted while they are traced: nothing is computed.

Two counters of the UNet stand side by side. `exact` counts products of matrices and nothing else.
`paper` is the counter behind the numbers of APTP: 1384.186267 G for Stable Diffusion 2.1 at a 96 x
96 latent and one text token. It differs from the exact one as follows:

- cross-attention counts as if a text had as many tokens as the image has positions;
- each softmax costs one more a logit, a group norm two an element, a layer norm one;
- biases of convolutions count at every position, those of linear layers once;
- every SiLU counts four an element, twice its cost: one counter was shared, and added twice.

Source of `paper`: the authors' code of APTP (https://arxiv.org/abs/2406.12042).
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdprune_jax import UserError, sites
from sdprune_jax.models import clip, unet, vae
from sdprune_jax.models.layers import Attention, GroupNorm, site_name

COUNTERS = ("exact", "paper")
# What SiLU feeds in the UNet.
_AFTER_SILU = ("conv1", "conv2", "time_emb_proj", "time_embedding.linear_2", "conv_out")


class Macs(NamedTuple):
    """Multiply-accumulates by what they are spent on; `sum` is the total.

    Projections of attention are linear; the other two are its products of queries with keys, and of
    their softmax with values, masked positions included. Norms, activations and biases are free.
    """

    linear: int = 0
    conv: int = 0
    self_attention: int = 0
    cross_attention: int = 0


def of_unet(config: unet.UNetConfig, latent_size: tuple[int, int], text_tokens: int = 77) -> Macs:
    """One call, batch 1; `latent_size` is height and width."""
    return _total(_unet_layers(config, latent_size, text_tokens))


class SiteMacs(NamedTuple):
    """MACs of a UNet call, by what removes them.

    Attributes:
        sites: by site, in the order of `sites.table`. A depth site has what its block costs beyond
            the width sites inside, so the values add up.
        always: what no gate removes.
    """

    sites: dict[str, int]
    always: int

    @property
    def removable(self) -> int:
        """What all gates together remove."""
        return sum(self.sites.values())

    @property
    def total(self) -> int:
        return self.always + self.removable


def by_site(
    config: unet.UNetConfig,
    latent_size: tuple[int, int],
    text_tokens: int = 77,
    counter: str = "exact",
) -> SiteMacs:
    """Splits the MACs of a UNet call, batch 1, among its sites.

    Args:
        config: dense or sliced.
        latent_size: height and width.
        text_tokens: length of the prompt; the paper's headline number has 1.
        counter: "exact" or "paper".

    Raises:
        ValueError: if the counter is unknown.
    """
    costs, total = _costs(config, latent_size, text_tokens, counter)
    found = {}
    for site in sites.table(config):  # the width sites come first
        if site.kind == "depth":
            block = site.name.removesuffix("depth")
            paths = [path for path in costs if path.startswith(block)]
            inside = sum(cost for name, cost in found.items() if f"{name}.".startswith(block))
        else:  # the layers at its members, and attention itself
            modules = {path.rpartition(".")[0] for path, _ in site.members}
            paths, inside = costs.keys() & {site.name, *modules}, 0
        found[site.name] = sum(costs[path] for path in paths) - inside
    return SiteMacs(found, total - sum(found.values()))


def by_operator(
    config: unet.UNetConfig,
    latent_size: tuple[int, int],
    text_tokens: int = 77,
    counter: str = "exact",
) -> SiteMacs:
    """Splits the MACs of a UNet call among its whole blocks, the sites of `sites.operators`.

    Args and errors as of `by_site`.
    """
    costs, total = _costs(config, latent_size, text_tokens, counter)
    found = {}
    for site in sites.operators(config):
        block = site.name.removesuffix("depth")
        found[site.name] = sum(cost for path, cost in costs.items() if path.startswith(block))
    return SiteMacs(found, total - sum(found.values()))


def of_text(config: clip.TextConfig) -> Macs:
    """One prompt, at full length."""
    ids = jax.ShapeDtypeStruct((1, config.max_position_embeddings), jnp.int32)
    return _total(_layers(clip.TextTower(config), "__call__", ids))


def of_decoder(config: vae.VAEConfig, latent_size: tuple[int, int]) -> Macs:
    """Latents to one image; `latent_size` is height and width."""
    latents = jax.ShapeDtypeStruct((1, *latent_size, config.latent_channels), jnp.float32)
    return _total(_layers(vae.VAE(config), "decode", latents))


def _costs(
    config: unet.UNetConfig, latent_size: tuple[int, int], text_tokens: int, counter: str
) -> tuple[dict[str, int], int]:
    """MACs of every layer by path, and of the whole UNet."""
    if counter not in COUNTERS:
        raise UserError(f"counter is {counter!r}, expected one of {COUNTERS}")
    layers = _unet_layers(config, latent_size, text_tokens)
    work = {path: getattr(layer, counter) for path, layer in layers.items()}
    costs = {path: sum(macs) if counter == "exact" else macs for path, macs in work.items()}
    total = sum(costs.values())
    if counter == "paper":
        total += 4 * sum(layer.activations for layer in layers.values())
    return costs, total


class _Layer(NamedTuple):
    """What one layer does. Attributes: exact, paper: MACs; activations: elements of SiLU before."""

    exact: Macs = Macs()
    paper: int = 0
    activations: int = 0


@functools.cache  # tracing a UNet takes seconds
def _unet_layers(
    config: unet.UNetConfig, latent_size: tuple[int, int], text_tokens: int
) -> dict[str, _Layer]:
    latents = jax.ShapeDtypeStruct((1, *latent_size, config.in_channels), jnp.float32)
    timestep = jax.ShapeDtypeStruct((1,), jnp.int32)
    text = jax.ShapeDtypeStruct((1, text_tokens, config.cross_attention_dim), jnp.float32)
    return _layers(unet.UNet(config), "__call__", latents, timestep, text)


def _layers(model: nn.Module, method: str, *inputs: jax.ShapeDtypeStruct) -> dict[str, _Layer]:
    """Every layer of a model, by path; seen while it is traced, so nothing is computed."""
    found = {}

    def record(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer, out = context.module, next_fun(*args, **kwargs)
        path = site_name(layer)
        if isinstance(layer, nn.Dense | nn.Conv):
            kernel, has_bias = layer.variables["params"]["kernel"], layer.use_bias
            is_linear, positions = isinstance(layer, nn.Dense), out.size // out.shape[-1]
            work, biases = kernel.size * positions, out.shape[-1] if is_linear else out.size
            exact = Macs(linear=work) if is_linear else Macs(conv=work)
            follows = args[0].size if path.endswith(_AFTER_SILU) else 0
            found[path] = _Layer(exact, work + biases * has_bias, follows)
        elif isinstance(layer, Attention):
            x, text = (*args, None)[:2]
            inner, n = 2 * layer.heads * layer.head_dim, x.shape[1]  # twice: logits, then values
            exact = Macs(self_attention=inner * n**2)
            if text is not None:
                exact = Macs(cross_attention=inner * n * text.shape[1])
            found[path] = _Layer(exact, (inner + layer.heads) * n**2)
        elif isinstance(layer, clip.SelfAttention):
            found[path] = _Layer(Macs(self_attention=2 * out.shape[-1] * out.shape[1] ** 2))
        elif isinstance(layer, GroupNorm | nn.LayerNorm):
            found[path] = _Layer(paper=out.size * (2 if isinstance(layer, GroupNorm) else 1))
        return out

    with nn.intercept_methods(record):
        jax.eval_shape(functools.partial(model.init, method=method), jax.random.key(0), *inputs)
    return found


def _total(layers: Mapping[str, _Layer]) -> Macs:
    kinds = zip(*(layer.exact for layer in layers.values()), strict=True)
    return Macs(*(sum(kind) for kind in kinds))
