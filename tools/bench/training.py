"""Samples a second of each training of the embedded model, and how far that is from the machine.

    python tools/bench/training.py

Forward, and forward with backward, of the shipped architectures at the batch sizes of
`configs/pretrain_embedded.py`, on random data; beside them a large matrix product and a copy, and
the same models in the forms that GPUs and TPUs get, in the same run. Other jobs slow all of them,
so read the ratios.
"""

import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from sdprune_jax import pipeline, sharding
from sdprune_jax.data import tokenizer
from sdprune_jax.files import model_directory
from sdprune_jax.metrics import embedded
from sdprune_jax.models import clip, unet, vae


def run() -> None:
    sharding.keep_freed_memory()
    peak, copy = _machine()
    print(f"matrix product {peak:.0f} GFLOP/s, copy {copy:.1f} GB/s read and written")
    directory = model_directory.directory_of("embedded")
    model = model_directory.open_model(directory)
    params = pipeline.load(model, sharding.make_mesh())
    scorer = embedded.load_scorer(directory / "clip", tokenizer.load(directory / "tokenizer"))
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    size, length = model.unet.sample_size, model.text_encoder.max_position_embeddings
    ids = jnp.asarray(rng.integers(1, 2000, size=(192, length)), jnp.int32)
    text = draw(64, length, model.text_encoder.hidden_size)
    timestep = jnp.arange(64, dtype=jnp.int32)
    cases = {
        "clip": (clip.CLIP(scorer.model.config), scorer.params, (ids, draw(192, 64, 64, 3))),
        "vae": (vae.VAE(model.vae), params["vae"], (draw(16, 64, 64, 3),)),
        "unet": (unet.UNet(model.unet), params["unet"], (draw(64, size, size, 4), timestep, text)),
    }
    for name, (module, tree, inputs) in cases.items():
        batch = len(inputs[0])
        own = _compile(module, tree, inputs)
        with mock.patch("jax.lax.platform_dependent", _default):
            plain_forms = _compile(module, tree, inputs)
        for kind, compiled in own.items():
            seconds = _seconds(partial(compiled, tree, *inputs))
            plain = _seconds(partial(plain_forms[kind], tree, *inputs))
            cost = compiled.cost_analysis() or {}
            rate = cost.get("flops", float("nan")) / seconds / 1e9
            moved = cost.get("bytes accessed", float("nan")) / seconds / 1e9
            print(
                f"{name:5} {kind:13} {batch / seconds:6.0f} samples/s  {rate:5.0f} GFLOP/s"
                f" ({rate / peak:.0%} of the product)  {moved:5.1f} GB/s between operations;"
                f" plain forms {plain / seconds:.2f} times as long"
            )


def _compile(module: Any, tree: Any, inputs: Sequence[Any]) -> dict[str, Any]:
    def loss(tree, *inputs):
        outputs = jax.tree.leaves(module.apply({"params": tree}, *inputs))
        return sum(jnp.mean(x**2) for x in outputs)

    forms = {"forward": loss, "and backward": jax.grad(loss)}
    return {kind: jax.jit(form).lower(tree, *inputs).compile() for kind, form in forms.items()}


def _default(*args: Any, default: Callable[..., Any], **others: Any) -> Any:
    """Takes the form that `jax.lax.platform_dependent` has for other platforms."""
    del others
    return default(*args)


def _machine() -> tuple[float, float]:
    """Measures GFLOP/s of a large matrix product, and GB/s that a copy reads and writes."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2048, 2048)), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    peak = 2 * 2048**3 / _seconds(lambda: product(x)) / 1e9
    y = jnp.zeros(2**26, jnp.float32)
    add = jax.jit(lambda y: y + 1)
    return peak, 2 * y.nbytes / _seconds(lambda: add(y)) / 1e9


def _seconds(work: Callable[[], object]) -> float:
    """Times the fastest of five calls, after one that is not counted."""
    taken = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(work())
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


if __name__ == "__main__":
    run()
