"""tools/aot_compile.py, short of libtpu: the step it compiles, and how it reads what comes out."""

import collections
import dataclasses
import pathlib
import re
import sys
import types

import aptp_model
import jax
import numpy as np
import pytest

from sdprune_jax import config, sharding, sites
from sdprune_jax.aptp.layout import layout_of
from sdprune_jax.files import model_directory
from sdprune_jax.metrics import features
from sdprune_jax.training import encoded

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tools"))
import aot_compile
import aot_costs
import aot_programs

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


def _sent(run, mesh):
    """The results of the collectives of a compiled router step, by kind."""
    quick = {"xla_backend_optimization_level": 0}  # collectives are settled before
    compiled = aot_programs.lower(run, "router", mesh).compile(quick)
    sent: dict[str, list] = {}
    for kind, results in aot_costs.each_collective(compiled.as_text()):
        sent.setdefault(kind, []).extend(results)
    return sent


def _run(model, **changes):
    section = config.Router(num_codes=3, batch_size=16)
    return config.Run(model=str(model.directory), router=dataclasses.replace(section, **changes))


def test_collectives_are_counted_once_with_the_bytes_of_their_results():
    assert aot_costs.collectives(HLO) == {"all-gather": (2, 512 + 32), "all-reduce": (1, 44)}


def test_report_is_of_the_slowest_part():
    memory = types.SimpleNamespace(
        argument_size_in_bytes=2**30, temp_size_in_bytes=2**29, peak_memory_in_bytes=3 * 2**29
    )
    compiled = types.SimpleNamespace(
        memory_analysis=lambda: memory,
        cost_analysis=lambda: {"flops": 4e12, "bytes accessed": 1e9},
        as_text=lambda: HLO,
    )
    text = aot_compile.report(compiled, aot_costs.Chip(16, 2e14, 1e12, 1e11))
    assert "1.00 GiB of arguments, 0.50 GiB temporary; at most 1.50 GiB of 16 GiB" in text
    assert "4.00 TFLOP, 1.0 GB of memory traffic, 4000 FLOPs a byte" in text
    assert re.search(r"all-gather +2, 0\.0 MB\nall-reduce +1, 0\.0 MB\n", text)
    assert "20.0 ms by work, 1.0 ms by memory, 0.0 ms by network" in text
    assert text.endswith("a step takes 20.0 ms or more: limited by work")


def test_many_steps_take_what_one_does_many_times():
    work = aot_costs.Work(flops=1e12, moved=3e9, sent={"all-reduce": (1, 10**9)})
    chip = aot_costs.Chip(16, 1e14, 1e12, 1e11)  # 10 ms of work, 3 of memory, 10 of network
    lines = aot_costs.scaling(work, "v5e", chip, 256, 360_000, 0.5).splitlines()
    assert "256 v5e   1.0 h, 256 chip-hours at the roofline; 2.0 h, 512 chip-hours" in lines[1]
    hours = 360_000 * 1e12 * 256 / 16 / 312e12 / 3600  # of 16 A100s
    assert f" 16 A100  {hours:.1f} h, {hours * 16:,.0f} chip-hours at the roofline" in lines[2]


def test_topologies_have_the_names_that_clouds_give_them():
    assert aot_compile.topology_name("v5e-16") == "v5e:4x4"
    assert aot_compile.topology_name("v4:2x2x4") == "v4:2x2x4"
    for text in ("v5e-17", "v5e", "h100-8", "v5e:4"):
        with pytest.raises(ValueError, match="expected v5e-N or v6e-N with N of 4, 8, 16"):
            aot_compile.topology_name(text)


def test_step_that_cannot_be_is_refused(model):
    mesh = sharding.make_mesh(2, 4)
    with pytest.raises(ValueError, match=r"config.finetune is not set"):
        aot_programs.lower(_run(model), "finetune", mesh)
    with pytest.raises(ValueError, match=r"config.prune.unet.method to one of wanda, sparsegpt"):
        aot_programs.lower(dataclasses.replace(_run(model), prune=config.Prune()), "prune", mesh)
    with pytest.raises(ValueError, match=r"a batch of 12 is not split over 8.*such as 16"):
        aot_programs.lower(_run(model, batch_size=12), "router", mesh)


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
    batch = encoded.Examples(**fields).batch(np.arange(16), [0])
    shapes = aot_programs.batch_shapes(model, 16, size, "finetune", sharding.make_mesh(), 12)
    assert {k: (x.shape, x.dtype) for k, x in shapes.items()} == {
        k: (x.shape, x.dtype) for k, x in batch.items()
    }


def test_lowered_step_takes_the_state_the_frozen_unet_and_a_batch(model):
    lowered = aot_programs.lower(_run(model), "router", sharding.make_mesh(2, 4))
    state, frozen, batch, _ = lowered.in_avals[0]
    assert int(np.prod(state.params["codes"].shape)) == 3 * state.params["codes"].shape[1]
    assert jax.tree.structure(frozen) == jax.tree.structure(
        model_directory.param_shapes(model, "unet")
    )
    assert batch["warms_up"].shape == (16,)


def test_stages_have_programs_with_the_arguments_of_the_run(model):
    run, mesh = _run(model), sharding.make_mesh(2, 4)
    run.router.data = config.RouterData(dataset="coco", image_size=32)
    run.finetune = config.Finetune(training=config.Training(batch_size=8))
    run.pretrain = config.Pretrain(
        unet=config.PretrainUNet(widths=(8, 16), heads=(1, 2)),
        clip=config.PretrainCLIP(width=16, heads=2),
    )
    run.prune = config.Prune(
        unet=config.PruneComponent(method="sparsegpt"),
        calibration=config.Calibration(batch_size=8, num_steps=2),
    )
    run.generate = config.Generate(batch_size=8, num_steps=2, height=32)
    run.evaluate = config.Evaluate()
    shapes = {
        stage: jax.tree.leaves(aot_programs.lower(run, stage, mesh).in_avals[0])
        for stage in ("finetune", "pretrain", "prune", "generate", "features")
    }
    shapes = {stage: [leaf.shape for leaf in leaves] for stage, leaves in shapes.items()}
    assert (8, 4, 4, 4) in shapes["finetune"]  # trained at the size of the router
    assert (64, 16, 16, 4) in shapes["pretrain"]
    size, width = model.unet.sample_size, model.unet.block_out_channels[0]
    states = (8, model.text_encoder.max_position_embeddings, model.text_encoder.hidden_size)
    assert {(8, size, size, 4), states, (width, width)} <= set(shapes["prune"])
    assert (8, 4, 8, 4) in shapes["generate"]
    assert (8 * features.CHUNK, 299, 299, 3) in shapes["features"]


def test_router_step_sends_what_the_algorithm_needs_and_each_split_weight_once(model, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_BYTES", 2048)
    run, mesh = _run(model), sharding.make_mesh(2, 4)
    sent = _sent(run, mesh)
    assert sent.keys() == {"all-gather", "all-reduce"}

    width, num_gates = model.text_encoder.hidden_size, layout_of(sites.table(model.unet)).size
    unet = model_directory.param_shapes(model, "unet")
    places = jax.tree.leaves(sharding.fsdp_shardings(unet, mesh))
    split = [
        leaf.shape
        for leaf, place in zip(jax.tree.leaves(unet), places, strict=True)
        if not place.is_fully_replicated
    ]
    assert 0 < len(split) < len(places)
    # The heads are split too. The contrastive loss compares all prompts and all their gates.
    wanted = [*split, (width, num_gates), (16, width), (16, num_gates)]
    gathered = collections.Counter(tuple(sorted(shape)) for _, shape in sent["all-gather"])
    assert gathered == collections.Counter(tuple(sorted(shape)) for shape in wanted)

    # Of the heads, of the codes by routing and by their pull, and of the gates that were gathered:
    # gradients. All else is a number, or one of each code: of Sinkhorn, the losses, the metrics.
    large = sorted(shape for _, shape in sent["all-reduce"] if len(shape) > 1)
    heads, codes = (num_gates, width), (3, num_gates)
    assert large == sorted([heads, codes, codes, (16, num_gates)])
    others = [shape for _, shape in sent["all-reduce"] if len(shape) < 2]
    assert set(others) == {(), (3,), (num_gates,)}
    assert others.count((num_gates,)) == 1  # the heads' biases


def test_router_step_gathers_nothing_of_a_unet_that_every_device_holds(model, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_BYTES", 0)
    sent = _sent(_run(model), sharding.make_mesh(8, 1))
    assert sent.keys() == {"all-gather", "all-reduce"}
    num_gates = layout_of(sites.table(model.unet)).size
    # All prompts and all their gates, for the contrastive loss.
    wanted = [(16, model.text_encoder.hidden_size), (16, num_gates)]
    assert sorted(sorted(shape) for _, shape in sent["all-gather"]) == sorted(map(sorted, wanted))
