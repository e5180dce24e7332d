"""sdprune convert --from aptp, on files of the layout that the authors of APTP publish."""

import json
import re
import shutil

import aptp_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdprune_jax import UserError, artefacts, config, sites
from sdprune_jax.aptp import gates, layout, router, router_training
from sdprune_jax.commands import aptp_files
from sdprune_jax.commands import convert as tool
from sdprune_jax.files import convert, model_directory
from sdprune_jax.models import unet
from sdprune_jax.stages import assign

LAYOUT, MESH = aptp_model.LAYOUT, aptp_model.MESH
WIDTHS = (*LAYOUT.units, len(LAYOUT.depth))
WIDTH = 12  # of the embeddings of prompts: the text encoder's
STEM = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return aptp_model.make(tmp_path_factory.mktemp("micro") / "model")


def _save(folder, tensors, values):
    folder.mkdir(parents=True)
    save_file(tensors, folder / STEM)
    (folder / "config.json").write_text(json.dumps(values))


def _structure():
    """Written down apart from the tool: ResNets of 4 groups, two attentions and 32 neurons."""
    two, four = [2, 2, 32], [4, 4, 32]
    blocks = [[4], two, [4], [4], [4], four, [4], [4], [4], [4], two, two]
    #         down 0    down 1  middle        up 0      up 1: its last ResNet and transformer can go
    depth = [1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1]
    return {"width": blocks, "depth": [[d] for d in depth]}


def _write(directory, num_codes=3, **changes):
    """A pruning; changes are of the quantizer's config."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    heads = {f"mh_fc.{i}.weight": draw(n, WIDTH) for i, n in enumerate(WIDTHS)}
    heads |= {f"mh_fc.{i}.bias": draw(n) - 3 for i, n in enumerate(WIDTHS)}
    values = {"_class_name": "HyperStructure", "input_dim": WIDTH, "linear_bias": True,
              "single_arch_param": False, "structure": _structure(), "wn_flag": False}  # fmt: skip
    _save(directory / "hypernet", heads, values)
    codes = draw(num_codes, LAYOUT.size) - 3
    noise = gates.gumbel(rng.random(codes.shape, np.float32))
    soft = np.asarray(gates.soft_gates(jnp.asarray(codes), noise, LAYOUT))
    order = [i - len(LAYOUT.depth) if i > 1 else i for i in LAYOUT.depth_order]
    values = {"_class_name": "StructureVectorQuantizer", "n_e": num_codes, "temperature": 0.4,
              "base": 3, "depth_order": order, "non_zero_width": True, "structure": _structure(),
              "resource_aware_normalization": False} | changes  # fmt: skip
    _save(directory / "quantizer", {"embedding.weight": codes, "embedding_gs": soft}, values)
    return heads, codes, soft


def _convert(source, target, model):
    how = ["--from", "aptp", "--config", str(model.directory), "--encoder", "text_encoder"]
    tool.main([str(source), str(target), *how])


def test_structure_of_stable_diffusion_2_is_the_published_one():
    found = aptp_files.structure(layout.layout_of(sites.table(unet.UNetConfig())))
    assert found["width"][:7] == [[32], [32], [5, 5, 32], [5, 5, 32], [32], [32], [10, 10, 32]]
    assert found["width"][12:17] == [[32], [32], [32], [32], [20, 20, 32]]
    assert [len(found[key]) for key in ("width", "depth")] == [38, 38]
    assert sum(sum(block) for block in found["width"]) == 1606
    depth = [i for i, (d,) in enumerate(found["depth"]) if d]
    assert depth == [1, 3, 5, 7, 9, 11, 13, 19, 22, 25, 28, 31, 34, 37]
    assert aptp_files.structure(LAYOUT) == _structure()


def test_router_predicts_and_cuts_as_the_published_one(model, tmp_path, capsys):
    heads, codes, soft = _write(tmp_path / "aptp")
    _convert(tmp_path / "aptp", tmp_path / "run", model)
    params, trained = router_training.load(tmp_path / "run", model, MESH)
    x = np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
    parts = [x @ heads[f"mh_fc.{i}.weight"].T + heads[f"mh_fc.{i}.bias"]
             for i in range(len(WIDTHS))]  # fmt: skip
    found = router.predict(params, jnp.asarray(x), LAYOUT)
    np.testing.assert_allclose(found, np.concatenate(parts, axis=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(params["codes"], codes)
    assert (trained.num_codes, trained.latent_size) == (3, (32, 32))
    costs = router_training.budget_costs(model, (32, 32), trained.mac_counter)
    kept = router_training.kept_shares(jnp.asarray(soft), LAYOUT, costs)
    assert trained.macs_budget == pytest.approx(float(kept.mean()), abs=5e-5)
    assert f"3 codes, which keep {kept[0]:.3f}" in capsys.readouterr().out

    run = config.Run(workdir=str(tmp_path / "run"), model=str(model.directory))
    few = {"num_images": 8, "captions_per_image": 1}
    aptp_model.rewrite(
        artefacts.output_of("router", run.workdir),
        lambda values: values["data"].update(few),
    )
    run.assign = config.Assign("published", "stored", "none", fit_budget="none")
    output = assign.run(run, MESH)
    np.testing.assert_array_equal(np.load(output / "architectures.npy"), soft >= 0.5)
    run.assign = config.Assign(final_codes="stored")
    with pytest.raises(ValueError, match="fit_budget moves logits"):
        assign.run(run, MESH)
    (tmp_path / "run" / "router" / "code_gates.npy").unlink()
    with pytest.raises(ValueError, match=r"code_gates\.npy is missing"):
        assign.run(run, MESH)


def test_normalised_weights_and_a_single_architecture_are_taken_over(tmp_path):
    heads, _, _ = _write(tmp_path / "plain")
    want = aptp_files.read_pruning(tmp_path / "plain", LAYOUT).params["predictor"]["heads"]
    for v, g in (("parametrizations.weight.original1", "parametrizations.weight.original0"),
                 ("weight_v", "weight_g")):  # fmt: skip
        parts = {}
        for i in range(len(WIDTHS)):
            w = heads[f"mh_fc.{i}.weight"]
            parts[f"mh_fc.{i}.{g}"] = np.linalg.norm(w, axis=1, keepdims=True)
            parts[f"mh_fc.{i}.{v}"] = w * np.float32(i + 2)  # its length does not count
        save_file(parts, tmp_path / "plain" / "hypernet" / STEM)
        path = tmp_path / "plain" / "hypernet" / "config.json"
        path.write_text(path.read_text().replace('"linear_bias": true', '"linear_bias": false'))
        found = aptp_files.read_pruning(tmp_path / "plain", LAYOUT).params["predictor"]["heads"]
        np.testing.assert_allclose(found["kernel"], want["kernel"], rtol=1e-5, atol=1e-6)
        assert not found["bias"].any()

    _write(tmp_path / "one", num_codes=8)
    arch = np.random.default_rng(2).normal(-3, 1, (1, LAYOUT.size)).astype(np.float32)
    values = {"input_dim": WIDTH, "single_arch_param": True, "structure": _structure()}
    shutil.rmtree(tmp_path / "one" / "hypernet")
    _save(tmp_path / "one" / "hypernet", {"arch": arch}, values)
    params, soft = aptp_files.read_pruning(tmp_path / "one", LAYOUT)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, WIDTH)).astype(np.float32))
    np.testing.assert_array_equal(router.predict(params, x, LAYOUT), np.repeat(arch, 4, axis=0))
    np.testing.assert_array_equal(params["codes"], arch)
    noise = gates.published_noise(1, LAYOUT)
    np.testing.assert_array_equal(soft, gates.soft_gates(jnp.asarray(arch), noise, LAYOUT))


def test_what_is_computed_in_another_way_is_refused_with_every_reason(model, tmp_path):
    _write(tmp_path / "aptp", temperature=0.1, base=2, resource_aware_normalization=None)
    path = tmp_path / "aptp" / "hypernet" / "config.json"
    path.write_text(path.read_text().replace("[4]", "[5]", 1))
    with pytest.raises(ValueError, match="not a pruning that can be taken over") as error:
        aptp_files.read_pruning(tmp_path / "aptp", LAYOUT)
    for text in ("temperature is 0.1, expected 0.4", "base is 2, expected 3.0",
                 "resource_aware_normalization is None, expected False",
                 "hypernet/config.json: its structure is of another UNet"):  # fmt: skip
        assert text in str(error.value)

    _, codes, _ = _write(tmp_path / "other")
    file = tmp_path / "other" / "quantizer" / STEM
    save_file({"embedding.weight": codes, "embedding_gs": codes}, file)
    with pytest.raises(ValueError, match="before its first training step"):
        aptp_files.read_pruning(tmp_path / "other", LAYOUT)
    save_file({"embedding.weight": codes}, file)
    heads = load_file(tmp_path / "other" / "hypernet" / STEM)
    heads["mh_fc.2.bias"] = heads["mh_fc.2.bias"][:1]
    save_file(heads, tmp_path / "other" / "hypernet" / STEM)
    with pytest.raises(ValueError, match="embedding_gs is missing") as error:
        aptp_files.read_pruning(tmp_path / "other", LAYOUT)
    assert "mh_fc.2.bias has shape (1,), expected (2,)" in str(error.value)
    with pytest.raises(UserError, match="needs --config"):
        tool.main([str(tmp_path / "other"), str(tmp_path / "run")])
    (tmp_path / "run" / "router").mkdir(parents=True)
    with pytest.raises(UserError, match=re.escape("router exists: choose another")):
        _convert(tmp_path / "other", tmp_path / "run", model)


def test_expert_is_read_by_the_shapes_of_its_tensors(model, tmp_path):
    keep = np.random.default_rng(0).random(LAYOUT.size) < 0.5
    keep[LAYOUT.starts] = True
    keep[LAYOUT.num_width :] = [True, False, True, False, True][: len(LAYOUT.depth)]
    architecture = layout.to_architecture(keep, LAYOUT)
    dense = jax.tree.map(np.asarray, model_directory.load(model, "unet"))
    params, unet_config = sites.slice_params(dense, model.unet, architecture)
    flat = {convert.torch_key(path): np.ascontiguousarray(convert.to_torch(path, x))
            for path, x in convert.flatten(params).items()}  # fmt: skip
    source = tmp_path / "arch1" / "checkpoint-30000"
    _save(source / "unet", flat, {"_class_name": "UNet2DConditionModelPruned"})
    (source / "arch_vector.pt").write_bytes(b"")
    tool.main([str(source), str(tmp_path / "00"), "--config", str(model.directory)])
    expert = model_directory.open_model(tmp_path / "00")
    assert expert.unet == unet_config
    assert dict(unet_config.kept_units)[LAYOUT.depth[1]] == 0
    jax.tree.map(np.testing.assert_array_equal, model_directory.load(expert, "unet"), params)
    name = "model.safetensors"
    assert (tmp_path / "00" / "text_encoder" / name).read_bytes() == (
        model.directory / "text_encoder" / name
    ).read_bytes()

    del flat["mid_block.resnets.0.conv1.bias"]
    save_file(flat, source / "unet" / STEM)
    with pytest.raises(UserError, match=r"mid_block\.resnets\.0\.conv1\.bias"):
        tool.main([str(source), str(tmp_path / "01"), "--config", str(model.directory)])
    with pytest.raises(UserError, match="no single file"):
        tool.main([str(source), str(tmp_path / "a.safetensors"), "--config", str(model.directory)])
