"""tools/aot_compile.py, short of libtpu: the step it compiles, and how it reads what comes out."""

import dataclasses
import pathlib
import sys
import types

import aptp_model
import jax
import numpy as np
import pytest

from sdprune_jax import checkpoint, config, sharding
from sdprune_jax.aptp import data

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tools"))
import aot_compile

HLO = """
  %a = f32[16,8]{1,0} all-gather(f32[2,8]{1,0} %p), replica_groups={{0,1}}
  %b = (bf16[4,2]{1,0}, bf16[8,2]{1,0}) all-gather-start(bf16[4,2]{1,0} %q), dimensions={0}
  %c = bf16[8,2]{1,0} all-gather-done((bf16[4,2]{1,0}, bf16[8,2]{1,0}) %b)
  %d = (f32[10]{0}, f32[]) all-reduce(f32[10]{0} %r, f32[] %s), to_apply=%sum
  %e = f32[10]{0} add(f32[10]{0} %r, f32[10]{0} %r)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return aptp_model.make(tmp_path_factory.mktemp("micro") / "model", aptp_model.ONE_LEVEL)


def _run(model, **changes):
    section = config.Router(num_codes=3, batch_size=16)
    return config.Run(model=str(model.directory), router=dataclasses.replace(section, **changes))


def test_collectives_are_counted_once_with_the_bytes_of_their_results():
    assert aot_compile.collectives(HLO) == {"all-gather": (2, 512 + 32), "all-reduce": (1, 44)}


def test_report_is_of_the_slowest_part():
    memory = types.SimpleNamespace(
        argument_size_in_bytes=2**30, temp_size_in_bytes=2**29, peak_memory_in_bytes=3 * 2**29
    )
    compiled = types.SimpleNamespace(
        memory_analysis=lambda: memory,
        cost_analysis=lambda: {"flops": 4e12, "bytes accessed": 1e9},
        as_text=lambda: HLO,
    )
    text = aot_compile.report(compiled, aot_compile.Chip(16, 2e14, 1e12, 1e11))
    assert "1.00 GiB of arguments, 0.50 GiB temporary; at most 1.50 GiB of 16 GiB" in text
    assert "4.00 TFLOP, 1.0 GB of memory traffic, 4000 FLOPs a byte" in text
    assert "20.0 ms by work, 1.0 ms by memory, 0.0 ms by network" in text
    assert text.endswith("a step takes 20.0 ms or more: limited by work")


def test_topologies_have_the_names_that_clouds_give_them():
    assert aot_compile.topology_name("v5e-16") == "v5e:4x4"
    assert aot_compile.topology_name("v4:2x2x4") == "v4:2x2x4"
    for text in ("v5e-17", "v5e", "h100-8", "v5e:4"):
        with pytest.raises(ValueError, match="expected v5e-N or v6e-N with N of 4, 8, 16"):
            aot_compile.topology_name(text)


def test_step_that_cannot_be_is_refused(model):
    mesh = sharding.make_mesh(2, 4)
    with pytest.raises(ValueError, match=r"config.finetune is not set"):
        aot_compile.lower_step(_run(model), "finetune", mesh)
    with pytest.raises(ValueError, match=r"a batch of 12 is not split over 8.*such as 16"):
        aot_compile.lower_step(_run(model, batch_size=12), "router", mesh)


def test_program_that_is_too_large_names_what_to_change():
    def compile_it():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in HBM (41.04G)")

    with pytest.raises(ValueError, match=r"41.04G(?s:.*)mesh.fsdp.*remat"):
        aot_compile.compile_step(types.SimpleNamespace(compile=compile_it))


def test_batches_are_those_of_the_training(model):
    size, text = model.unet.sample_size, model.text_encoder
    zeros = lambda *shape: np.zeros(shape, np.float32)
    states = zeros(16, text.max_position_embeddings, text.hidden_size).astype(np.float16)
    fields = {
        "embedding": zeros(16, text.hidden_size),
        "states": states,
        "mean": zeros(16, 2, size, size, 4),
        "log_variance": zeros(16, 2, size, size, 4),
        "null": states[:1],
    }
    batch = data.Examples(**fields).batch(np.arange(16), [0])
    shapes = aot_compile.batch_shapes(model, 16, size, "finetune", sharding.make_mesh())
    assert {k: (x.shape, x.dtype) for k, x in shapes.items()} == {
        k: (x.shape, x.dtype) for k, x in batch.items()
    }


def test_lowered_step_takes_the_state_the_frozen_unet_and_a_batch(model):
    lowered = aot_compile.lower_step(_run(model), "router", sharding.make_mesh(2, 4))
    state, frozen, batch, _ = lowered.in_avals[0]
    assert int(np.prod(state.params["codes"].shape)) == 3 * state.params["codes"].shape[1]
    assert jax.tree.structure(frozen) == jax.tree.structure(checkpoint.param_shapes(model, "unet"))
    assert batch["warms_up"].shape == (16,)
