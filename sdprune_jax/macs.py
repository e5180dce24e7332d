"""Multiply-accumulates (MACs) of the models, counted while they are traced: nothing is computed."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdprune_jax import sites
from sdprune_jax.models import clip, unet, vae
from sdprune_jax.models.layers import Attention, site_name


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


def per_unit(
    config: unet.UNetConfig, latent_size: tuple[int, int], text_tokens: int = 77
) -> dict[str, int]:
    """What removing one unit of each site saves of a UNet call, by site name.

    For a depth site that is the whole block, so it contains the width sites inside.
    """
    layers = _unet_layers(config, latent_size, text_tokens)
    found = {}
    for site in sites.table(config):
        if site.kind == "depth":
            block = site.name.removesuffix("depth")
            paths = [path for path in layers if path.startswith(block)]
        else:  # the work of a layer at a member, and attention itself, is the same for every unit
            modules = {path.rpartition(".")[0] for path, _ in site.members}
            paths = layers.keys() & {site.name, *modules}
        found[site.name] = sum(sum(layers[path]) for path in paths) // site.units
    return found


def of_text(config: clip.TextConfig) -> Macs:
    """One prompt, at full length."""
    ids = jax.ShapeDtypeStruct((1, config.max_position_embeddings), jnp.int32)
    return _total(_layers(clip.TextTower(config), "__call__", ids))


def of_decoder(config: vae.VAEConfig, latent_size: tuple[int, int]) -> Macs:
    """Latents to one image; `latent_size` is height and width."""
    latents = jax.ShapeDtypeStruct((1, *latent_size, config.latent_channels), jnp.float32)
    return _total(_layers(vae.VAE(config), "decode", latents))


@functools.cache  # tracing a UNet takes seconds
def _unet_layers(
    config: unet.UNetConfig, latent_size: tuple[int, int], text_tokens: int
) -> dict[str, Macs]:
    latents = jax.ShapeDtypeStruct((1, *latent_size, config.in_channels), jnp.float32)
    timestep = jax.ShapeDtypeStruct((1,), jnp.int32)
    text = jax.ShapeDtypeStruct((1, text_tokens, config.cross_attention_dim), jnp.float32)
    return _layers(unet.UNet(config), "__call__", latents, timestep, text)


def _layers(model: nn.Module, method: str, *inputs: jax.ShapeDtypeStruct) -> dict[str, Macs]:
    """MACs of every layer of a model, by path; seen while it is traced, so nothing is computed."""
    found = {}

    def record(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer, out = context.module, next_fun(*args, **kwargs)
        path = site_name(layer)
        if isinstance(layer, nn.Dense | nn.Conv):
            kernel = layer.variables["params"]["kernel"]
            kind = "linear" if isinstance(layer, nn.Dense) else "conv"
            found[path] = Macs(**{kind: kernel.size * (out.size // out.shape[-1])})
        elif isinstance(layer, Attention):
            x, text = (*args, None)[:2]
            inner = 2 * layer.heads * layer.head_dim  # twice: the logits, then the mean of values
            if text is None:
                found[path] = Macs(self_attention=inner * x.shape[1] ** 2)
            else:
                found[path] = Macs(cross_attention=inner * x.shape[1] * text.shape[1])
        elif isinstance(layer, clip.SelfAttention):
            found[path] = Macs(self_attention=2 * out.shape[-1] * out.shape[1] ** 2)
        return out

    with nn.intercept_methods(record):
        jax.eval_shape(functools.partial(model.init, method=method), jax.random.key(0), *inputs)
    return found


def _total(layers: Mapping[str, Macs]) -> Macs:
    return Macs(*(sum(kind) for kind in zip(*layers.values(), strict=True)))
