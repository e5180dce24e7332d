"""Which units go: scores against brute force, the budget within one unit, whole blocks."""

import dataclasses
import functools

import aptp_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdprune_jax import pipeline, sharding, sites
from sdprune_jax.files import convert
from sdprune_jax.models import samplers, unet
from sdprune_jax.scoring.settings import CalibrationSettings
from sdprune_jax.sites import macs
from sdprune_jax.slicing import bksdm, operators, structured
from sdprune_jax.training import distillation

UNET = aptp_model.UNET
COSTS = macs.by_site(UNET, (8, 8), 24)
TALL = dataclasses.replace(  # with more ResNets than one a block, and a level to lose
    UNET,
    block_out_channels=(16, 32, 32),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=2,
    attention_head_dim=(2, 4, 4),
)


@pytest.fixture(scope="module")
def params():
    return aptp_model.random_params(unet.param_shapes(UNET), 0)


def _inputs(batch=2):
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.normal(size=(batch, *shape)).astype(np.float32)
    return draw(8, 8, 4), np.resize([10, 700], batch).astype(np.int32), draw(5, 12)


@functools.cache
def _compiled(config):
    return jax.jit(unet.UNet(config).apply)


def _scores(params, criterion):
    if criterion in ("uniform", "random"):
        return getattr(structured, criterion)(UNET, 0)
    return structured.norm(params, UNET)


@pytest.mark.parametrize("criterion", ["uniform", "random", "norm"])
@pytest.mark.parametrize("macs_budget", [0.95, 0.6])
def test_budget_is_kept_within_one_unit(params, criterion, macs_budget):
    keep = structured.within_budget(_scores(params, criterion), COSTS, macs_budget)
    _, config = sites.slice_params(params, UNET, keep)
    kept = sum(macs.of_unet(config, (8, 8), 24))
    largest = max(COSTS.sites[name] / len(units) for name, units in keep.items())
    assert 0 <= macs_budget * COSTS.total - kept < largest
    assert all(units.any() for units in keep.values())
    assert not any(name.endswith(".depth") for name in keep)


def test_lowest_scores_go_first_and_one_unit_of_a_site_stays(params):
    scores = _scores(params, "norm")
    first = next(iter(scores))
    scores[first] = -1 - np.arange(len(scores[first]), dtype=float)
    keep = structured.within_budget(scores, COSTS, 0.7)
    np.testing.assert_array_equal(keep[first], np.arange(len(keep[first])) == 0)
    others = [name for name in keep if name != first and keep[name].sum() > 1]
    gone = [scores[name][~keep[name]] for name in others]
    stay = [scores[name][keep[name]] for name in others]
    assert np.concatenate(gone).max() <= np.concatenate(stay).min()


def test_uniform_takes_the_same_share_of_every_site_and_random_does_not():
    shares = {}
    for criterion in ("uniform", "random"):
        keep = structured.within_budget(_scores(None, criterion), COSTS, 0.75)
        shares[criterion] = [units.mean() for units in keep.values() if len(units) == 4]
    assert max(shares["uniform"]) - min(shares["uniform"]) <= 1 / 4
    assert max(shares["random"]) - min(shares["random"]) >= 2 / 4


def test_criteria_and_seeds_differ(params):
    vectors = [
        np.concatenate(list(structured.within_budget(scores, COSTS, 0.7).values()))
        for scores in (
            *(_scores(params, name) for name in ("uniform", "random", "norm")),
            structured.uniform(UNET, 1),
            structured.random(UNET, 1),
        )
    ]
    assert len({vector.tobytes() for vector in vectors}) == 5


def test_budget_below_the_least_is_refused_with_the_least(params):
    with pytest.raises(ValueError, match=r"macs_budget is 0\.1, .* expected\s+from 0\.\d{4}, all"):
        structured.within_budget(_scores(params, "norm"), COSTS, 0.1)


def test_norm_is_the_sum_of_squares_of_a_units_kernels_over_its_sites_mean(params):
    found, flat = structured.norm(params, UNET), convert.flatten(params)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    head = [np.square(flat[f"{block}.attn1.to_{n}.kernel"][:, 8:16]).sum() for n in "qkv"]
    head.append(np.square(flat[f"{block}.attn1.to_out.0.kernel"][8:16]).sum())
    other = [np.square(flat[f"{block}.attn1.to_{n}.kernel"][:, :8]).sum() for n in "qkv"]
    other.append(np.square(flat[f"{block}.attn1.to_out.0.kernel"][:8]).sum())
    mean = (sum(head) + sum(other)) / 2
    np.testing.assert_allclose(found[f"{block}.attn1"][1], sum(head) / mean, rtol=1e-6)
    run = slice(2, 4)  # the second of 32 units of 64 neurons, in both halves of GEGLU
    both, out = flat[f"{block}.ff.net.0.proj.kernel"], flat[f"{block}.ff.net.2.kernel"]
    unit = np.square(both[:, run]).sum() + np.square(both[:, 66:68]).sum()
    unit += np.square(out[run]).sum()
    whole = (np.square(both).sum() + np.square(out).sum()) / 32
    np.testing.assert_allclose(found[f"{block}.ff"][1], unit / whole, rtol=1e-6)


def test_taylor_is_the_change_of_the_loss_when_a_units_parameters_shrink(params):
    inputs = [jnp.asarray(x) for x in _inputs()]

    def loss(params):
        return jnp.mean(unet.UNet(UNET).apply({"params": params}, *inputs) ** 2)

    loss_of = jax.jit(jax.value_and_grad(loss))
    _, grads = loss_of(params)
    found = structured.taylor(params, grads, UNET)
    without = structured.taylor(params, grads, UNET, signs_cancel=False)
    share = 0.01  # of a unit's parameters, up and down: the error is of third order
    for site in sites.table(UNET):
        if site.kind == "depth" or ".0.attn2" in site.name:
            continue
        values = []
        for sign in (1, -1):
            flat = convert.flatten(params)
            for path, axis in site.members:
                scale = np.ones(flat[path].shape[axis] // site.unit_size, np.float32)
                scale[1 :: site.units] += sign * share
                shape = [-1 if i == axis else 1 for i in range(flat[path].ndim)]
                flat[path] = flat[path] * np.repeat(scale, site.unit_size).reshape(shape)
            values.append(float(loss_of(convert.unflatten(flat, params))[0]))
        slope = abs(values[0] - values[1]) / (2 * share)
        floor = 2e-4 * values[0]  # rounding of the loss
        np.testing.assert_allclose(found[site.name][1], slope, rtol=0.03, atol=floor)
        assert (without[site.name] >= found[site.name]).all()
    assert all((without[name] > 0).all() for name in found)


def test_every_operator_that_a_gate_closes_can_be_cut(params):
    names = [site.name for site in sites.operators(UNET)]
    assert {s.name for s in sites.table(UNET) if s.kind == "depth"} < set(names)
    assert "mid_block.attentions.0.depth" in names
    assert "up_blocks.1.resnets.0.depth" not in names  # 32 channels to 16
    closed = {"mid_block.resnets.1.depth", "up_blocks.0.resnets.0.depth", names[0]}
    gates = {name: np.full((2, 1), name not in closed, np.float32) for name in names}
    gated = _compiled(UNET)({"params": params}, *_inputs(), gates)
    keep = {name: np.array([name not in closed]) for name in names}
    sliced, config = sites.slice_params(params, UNET, keep)
    found = _compiled(config)({"params": sliced}, *_inputs())
    np.testing.assert_allclose(found, gated, rtol=0, atol=1e-5 * np.abs(gated).max())
    costs = macs.by_operator(UNET, (8, 8), 24)
    saved = sum(costs.sites[name] for name in closed)
    assert sum(macs.of_unet(config, (8, 8), 24)) == costs.total - saved
    assert len(sites.operators(config)) == len(names) - 3


def test_ld_pruner_scores_what_a_removal_does_to_the_latents(params, tmp_path):
    model = aptp_model.make(tmp_path / "model")
    rng, mesh = np.random.default_rng(0), sharding.make_mesh()
    text = rng.normal(size=(10, 5, 12)).astype(np.float32)
    names = [site.name for site in sites.operators(UNET)][:3]
    walk = CalibrationSettings(num_steps=1, sampler="ddim", guidance_scale=1.0, batch_size=8)
    same = jax.tree.map(np.copy, params)
    for leaf in ("kernel", "bias"):  # of a ResNet that adds nothing, and whose input stands in
        same["down_blocks.0"]["resnets.0"]["conv2"][leaf][:] = 0
    found = operators.score(model, same, mesh, text, names, 0, walk)
    assert names[0] == "down_blocks.0.resnets.0.depth"
    assert found[names[0]][0] < 1e-5 < 1e-2 < found[names[1]][0]

    noise = pipeline.image_noise(jax.random.key(0), jnp.arange(9), (8, 8, 4))
    table = samplers.timetable(model.schedule, "ddim", 1)
    row = jax.tree.map(lambda x: x[0], table)
    latents = []
    for gate in (1, 0):
        gates = {name: np.full((9, 1), float(gate) if name == names[1] else 1.0) for name in names}
        timestep = np.full(9, row.timestep, np.int32)
        out = _compiled(UNET)({"params": same}, noise, timestep, text[:-1], gates)
        latents.append(np.asarray(samplers.step(samplers.start(noise), row, out).x, np.float64))
    before, after = latents
    mean = np.linalg.norm(before.mean(axis=0) - after.mean(axis=0))
    std = np.linalg.norm(before.std(axis=0) - after.std(axis=0))
    np.testing.assert_allclose(found[names[1]][0], mean + std, rtol=1e-4)
    with pytest.raises(ValueError, match="a multiple of the 8 devices"):
        operators.score(model, same, mesh, text, names, 0, dataclasses.replace(walk, batch_size=9))


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("base", 583_480_964), ("small", 485_787_524), ("tiny", 326_825_604)],
)
def test_bksdm_of_stable_diffusion_2_has_the_published_size(size, parameters):
    shapes = unet.param_shapes(bksdm.student(unet.UNetConfig(), size))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters


@pytest.mark.parametrize("size", bksdm.SIZES)
def test_bksdm_students_are_made_of_their_teachers_first_and_last_blocks(size):
    teacher = aptp_model.random_params(unet.param_shapes(TALL), 0)
    params, config, kept = bksdm.cut(teacher, TALL, size)
    assert unet.UNetConfig.from_json(config.to_json()) == config
    flat, whole, missing = convert.flatten(params), convert.flatten(teacher), int(size == "tiny")
    assert any(path.startswith("mid_block") for path in flat) == (size == "base")
    for name, source in (
        ("down_blocks.1.attentions.0.norm.scale", "down_blocks.1.attentions.0.norm.scale"),
        ("up_blocks.0.resnets.0.conv1.kernel", f"up_blocks.{missing}.resnets.0.conv1.kernel"),
        ("up_blocks.0.resnets.1.conv1.kernel", f"up_blocks.{missing}.resnets.2.conv1.kernel"),
        ("up_blocks.1.attentions.1.norm.scale", f"up_blocks.{1 + missing}.attentions.2.norm.scale"),
    ):
        np.testing.assert_array_equal(flat[name], whole[source])

    left = {name.rpartition(".transformer")[0] or name for name, units in kept.items() if units}
    assert ("mid_block.resnets.0" in left) == (size == "base")
    assert ("up_blocks.0.resnets.2" in left) == (size != "tiny")
    assert {"up_blocks.1.attentions.2.depth", "up_blocks.1.attentions.0"} <= left
    assert not {"up_blocks.1.attentions.1", "down_blocks.0.resnets.1.depth"} & left
    assert set(kept) == {site.name for site in sites.table(TALL)}

    blocks, of_teacher = (
        jax.eval_shape(
            functools.partial(unet.UNet(c).apply, return_blocks=True), {"params": p}, *_inputs()
        )[1]
        for c, p in ((config, params), (TALL, teacher))
    )
    pairs = distillation.common_blocks(config, TALL)
    assert len(pairs) == {"base": 7, "small": 6, "tiny": 3}[size]
    assert pairs[-1] == (len(blocks) - 1, 6)
    assert all(blocks[i].shape == of_teacher[j].shape for i, j in pairs)


def test_diffusers_runs_a_bksdm_student_as_it_is():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    teacher = aptp_model.random_params(unet.param_shapes(TALL), 0)
    params, config, _ = bksdm.cut(teacher, TALL, "tiny")
    reference = diffusers.UNet2DConditionModel.from_config(config.to_json())
    state = {
        convert.torch_key(path): torch.from_numpy(np.array(convert.to_torch(path, x)))
        for path, x in convert.flatten(params).items()
    }
    reference.load_state_dict(state)  # nothing is missing, nothing left over
    x, timestep, text = _inputs()
    arrays = (x.transpose(0, 3, 1, 2).copy(), timestep, text)
    with torch.no_grad():
        want = reference(*map(torch.from_numpy, arrays)).sample.numpy()
    found = np.asarray(_compiled(config)({"params": params}, x, timestep, text))
    found = found.transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_bksdm_of_what_has_none_is_refused_with_all_reasons():
    config = dataclasses.replace(UNET, kept_units=(("mid_block.resnets.0", 1),))
    with pytest.raises(ValueError, match="no bksdm-tiny: it has lost blocks or units") as error:
        bksdm.student(config, "tiny")
    assert "one ResNet in each down block" in str(error.value)
    assert "the widths (16, 32)" in str(error.value)
