"""A full-width block of Stable Diffusion 2, compiled for 16 TPU chips that are not there."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax import sharding
from sdprune_jax.models import unet
from sdprune_jax.scoring import masks

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tools"))
import aot_compile
import aot_costs

pytest.importorskip("libtpu")
_Shape = jax.ShapeDtypeStruct


@pytest.fixture(scope="module")
def mesh():
    """The chips of a v5e-16, all of one FSDP group."""
    level = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O0")  # same memory, same collectives
    yield sharding.make_mesh(1, 16, aot_compile.devices("v5e:4x4", 1))
    jax.config.update("jax_optimization_level", level)


def _sharded(tree, mesh):
    places = sharding.fsdp_shardings(tree, mesh)
    return jax.tree.map(lambda x, place: x.update(sharding=place), tree, places)


def test_a_block_sends_its_weights_and_their_gradients_alone(mesh):
    compute = unet.Compute(jnp.bfloat16, remat=False, gate_position="post_norm")
    kind = {"level": 1, "has_attention": True, "num_resnets": 1, "downsample": False}
    block = unet.DownBlock(unet.UNetConfig(), compute=compute, **kind)
    split = sharding.batch_sharding(mesh)
    inputs = [
        _Shape(shape, jnp.float32, sharding=split)
        for shape in ((64, 16, 16, 320), (64, 1280), (64, 77, 1024))
    ]
    params = jax.eval_shape(lambda *xs: block.init(jax.random.key(0), *xs, {}), *inputs)["params"]
    params = _sharded(params, mesh)

    def loss(params, *xs):
        out = block.apply({"params": sharding.gather(params, mesh)}, *xs, {})
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(out))

    places = jax.tree.map(lambda x: x.sharding, params)
    step = jax.jit(jax.grad(loss), out_shardings=places)
    compiled = aot_compile.compile_step(step.lower(params, *inputs))
    sent = aot_costs.collectives(compiled.as_text())
    num_split = sum(not place.is_fully_replicated for place in jax.tree.leaves(places))
    assert 0 < num_split < len(jax.tree.leaves(places))
    assert sent.keys() <= {"all-gather", "all-reduce", "reduce-scatter"}  # nothing is permuted
    assert sent["all-gather"][0] <= 2 * num_split
    assert compiled.memory_analysis().peak_memory_in_bytes < 2**30
    work = aot_costs.work_of(compiled)
    assert work.flops > 2e9 * 3 * 4  # of a forward pass of 4 examples, and twice as much back


def test_pruning_sends_counts_alone(mesh):
    kernel = _Shape((5120, 1280), jnp.float32)
    (place,) = jax.tree.leaves(sharding.fsdp_shardings([kernel], mesh))
    number = _Shape((), jnp.int32, sharding=sharding.replicated(mesh))

    @jax.jit
    def prune(kernel, number):
        return jnp.where(masks.lowest(jnp.abs(kernel), number), kernel, 0)

    compiled = aot_compile.compile_step(prune.lower(kernel.update(sharding=place), number))
    assert not place.is_fully_replicated
    for kind, results in aot_costs.each_collective(compiled.as_text()):
        assert kind == "all-reduce"
        assert max(np.prod(shape, dtype=int) for _, shape in results) <= 1024
