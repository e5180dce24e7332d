"""Experts in `generate` and `evaluate`: each prompt by its own, else as every other model."""

import functools
import json
import shutil

import aptp_model
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from sdprune_jax import artefacts, config, pipeline
from sdprune_jax.aptp import assignment, expert_files, routed
from sdprune_jax.data import captions
from sdprune_jax.evaluate import images, measuring, task
from sdprune_jax.files import model_directory
from sdprune_jax.stages import assign, evaluate, generate

MESH = aptp_model.MESH
GENERATE = config.Generate(num_prompts=11, batch_size=8, guidance_scale=3.0)
TEXTS = captions.drawn("train", 11, 0)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return aptp_model.make(tmp_path_factory.mktemp("micro") / "model")


@pytest.fixture(scope="module")
def assigned(model, tmp_path_factory):
    """A run with a router made by hand, and 48 prompts shared by its three codes."""
    work = tmp_path_factory.mktemp("assigned") / "run"
    aptp_model.write_router(work, model)
    run = config.Run(workdir=str(work), model=str(model.directory), assign=config.Assign())
    assign.run(run, MESH)
    return work


@pytest.fixture
def work(model, assigned, tmp_path):
    """That run with three experts, which a shift tells apart; the second is fine-tuned."""
    shutil.copytree(assigned / "router", tmp_path / "router")
    shutil.copytree(assigned / "assign", tmp_path / "assign")
    for index in range(3):
        _write(model, tmp_path / "experts" / f"{index:02d}", 1.0 + index)
    _write(model, tmp_path / "finetuned" / "01", 5.0)
    return tmp_path


def _write(model, directory, shift):
    shapes = model_directory.param_shapes(model, "unet")
    params = aptp_model.random_params(shapes, 0)
    params["conv_in"]["bias"][:] = shift
    model_directory.save(model, {"unet": params}, directory, dtype=np.float32, overwrite=True)


def _load(model, *_):
    """Instead of all weights: what `_write` wrote, which is all that a picture depends on here."""
    path = model.directory / "unet" / "diffusion_pytorch_model.safetensors"
    return {"shift": float(safetensors.numpy.load_file(path)["conv_in.bias"].mean())}


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Pictures without a network; the calls: by program, the shift of each."""
    made = []

    def make_sample(*_, **__):
        drawn = []
        made.append(drawn)

        def sample(params, ids, negative, noise, scale):
            del negative, scale
            drawn.append(params["shift"])
            x = noise + params["shift"] / 8 + ids.sum(axis=1)[:, None, None, None] / 4e4
            return pipeline.Sampled(x, jnp.tanh(x[..., :3]).repeat(8, 1).repeat(8, 2))

        return sample

    monkeypatch.setattr(pipeline, "sample_program", functools.cache(make_sample))
    monkeypatch.setattr(pipeline, "load", _load)
    return made


def _run(model, work, **sections):
    return config.Run(workdir=str(work), model=str(model.directory), **sections)


def _pictures(work, name, folder="images"):
    paths = sorted((work / folder / name).glob("*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def _record(work, name="images/generate.json"):
    return json.loads((work / name).read_text())


def test_every_prompt_is_drawn_by_its_expert_with_the_noise_of_every_model(model, work, calls):
    expert = assignment.assign(work, model, TEXTS, MESH)
    assert len(set(expert)) == 3
    generate.run(_run(model, work, generate=GENERATE), MESH)
    shifts = np.array([1.0, 5.0, 3.0])
    # One program for all of this one architecture, and each expert loaded once: in order.
    assert len(calls) == 1
    assert list(dict.fromkeys(calls[0][2:])) == [1.0, 5.0, 3.0]
    found = _pictures(work, "routed")
    for index, shift in enumerate(shifts):
        alone = work / f"alone_{index}"
        _write(model, alone / "experts" / "00", shift)
        generate.run(_run(model, alone, generate=GENERATE), MESH)  # an expert without a router
        mine = expert == index
        np.testing.assert_array_equal(found[mine], _pictures(alone, "routed")[mine])
        assert (found[~mine] != _pictures(alone, "routed")[~mine]).any(axis=(1, 2, 3)).all()
        np.testing.assert_array_equal(_pictures(alone, "dense"), _pictures(work, "dense"))


def test_record_says_who_drew_what(model, work):
    expert = assignment.assign(work, model, TEXTS, MESH)
    generate.run(_run(model, work, generate=GENERATE), MESH)
    found = _record(work)["models"]
    assert list(found) == ["dense", "routed"]
    assert found["dense"]["directory"] == str(model.directory)
    assert found["routed"]["expert"] == expert.tolist()
    assert found["routed"]["experts"] == [
        {"directory": str(work / path), "prompts": int((expert == i).sum())}
        for i, path in enumerate(("experts/00", "finetuned/01", "experts/02"))
    ]
    assert len(found["routed"]["psnr_to_dense"]) == len(found["routed"]["files"]) == 11
    # Batches of 8: of eleven prompts three come after the first; no expert has a second batch.
    assert "seconds_per_image" in found["dense"]
    assert "seconds_per_image" not in found["routed"]
    assert found["routed"]["first_batch_seconds"] == found["routed"]["seconds"]


def test_pictures_are_made_again_when_an_expert_or_the_assignment_changes(model, work, calls):
    run = _run(model, work, generate=GENERATE)
    generate.run(run, MESH)
    (drawn,) = calls
    once = len(drawn)
    generate.run(run, MESH)
    assert len(drawn) == once
    _write(model, work / "finetuned" / "00", 7.0)
    generate.run(run, MESH)
    assert len(drawn) == 2 * once
    assert _record(work)["models"]["routed"]["experts"][0]["directory"].endswith("finetuned/00")
    run.assign = config.Assign(balance="none")
    assign.run(run, MESH)
    generate.run(run, MESH)
    assert len(drawn) > 2 * once
    assert len(calls) == 1


@pytest.fixture
def evaluation(monkeypatch):
    asked = task.Task(TEXTS, None, None, 0, None, "")
    monkeypatch.setattr(task, "load", lambda *_: asked)
    monkeypatch.setattr(measuring, "load_networks", lambda *_: {})
    measure = lambda *args: {name: {"num": {"value": 1.0}} for name in args[4]}
    monkeypatch.setattr(measuring, "measure", measure)
    return config.Evaluate(num_images=11, batch_size=8, num_resamples=5)


def test_an_interrupted_evaluation_of_experts_goes_on(model, work, calls, evaluation, monkeypatch):
    run, complete = _run(model, work, evaluate=evaluation), images.complete

    def dies(folder, drawn_by, *args, **settings):
        if drawn_by.directory.name == "02":
            raise KeyboardInterrupt
        complete(folder, drawn_by, *args, **settings)

    monkeypatch.setattr(images, "complete", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(run, MESH)
    (drawn,) = calls
    before = len(drawn)
    monkeypatch.setattr(images, "complete", complete)
    evaluate.run(run, MESH)
    assert set(drawn[before:]) == {3.0}  # of the last expert alone
    record = _record(work, "evaluate.json")["models"]
    assert set(record["routed"]["figures"]) > {"num", "psnr_to_dense"}
    values = np.load(work / "evaluate" / evaluate.VALUES)
    for name in ("latent_mse_to_dense", "psnr_to_dense", "ssim_to_dense"):
        each, said = values[f"routed/{name}"], record["routed"]["figures"][name]
        assert len(each) == said["num"] == 11
        assert each.mean() == pytest.approx(said["value"])
    assert [row["prompts"] for row in record["routed"]["experts"]] == np.bincount(
        assignment.assign(work, model, TEXTS, MESH), minlength=3
    ).tolist()
    [folder] = (work / "evaluate" / "pictures").glob("routed-*")
    generate.run(_run(model, work, generate=GENERATE), MESH)
    np.testing.assert_array_equal(
        _pictures(work, folder.name, "evaluate/pictures"), _pictures(work, "routed")
    )
    whole = sum(map(len, calls))
    evaluate.run(run, MESH)
    assert sum(map(len, calls)) == whole  # complete: nothing is drawn again


def test_evaluation_of_other_experts_has_other_pictures(model, work, evaluation):
    run = _run(model, work, evaluate=evaluation)
    evaluate.run(run, MESH)
    _write(model, work / "finetuned" / "00", 7.0)
    evaluate.run(run, MESH)
    assert len(list((work / "evaluate" / "pictures").glob("routed-*"))) == 2
    assert len(list((work / "evaluate" / "pictures").glob("dense-*"))) == 1


def test_experts_that_do_not_belong_together_are_refused(model, work):
    run = _run(model, work, generate=GENERATE)
    stages = ("materialise", "finetune", "assign")
    cut, trained, assigned = (artefacts.output_of(stage, work) for stage in stages)
    identity = artefacts.identity(assigned)
    artefacts.seal(cut, {"assign": identity}, {})
    artefacts.seal(trained, {"experts": "old"}, {})
    with pytest.raises(ValueError, match=r"is of other experts than .*: .*finetune=build"):
        generate.run(run, MESH)
    trained.record.unlink()
    artefacts.seal(cut, {"assign": "old"}, {})
    with pytest.raises(ValueError, match=r"3 experts of another assignment .*materialise=build"):
        generate.run(run, MESH)
    artefacts.seal(cut, {"assign": identity}, {})
    _write(model, work / "experts" / "03", 1.0)
    with pytest.raises(ValueError, match="has 4 experts of another assignment"):
        generate.run(run, MESH)
    shutil.rmtree(work / "experts" / "03")
    anew = lambda values: values["made_from"].update({"by": "another hand"})
    aptp_model.rewrite(artefacts.output_of("router", work), anew)
    with pytest.raises(ValueError, match=r"not of the router beside it: .*assign=build"):
        generate.run(run, MESH)
    shutil.rmtree(work / "assign")
    with pytest.raises(ValueError, match="no assignment of prompts"):
        generate.run(run, MESH)
    assert not (work / "images").exists()


def test_models_of_a_run_are_those_it_has_made(model, work):
    directories = expert_files.models_of_run(str(model.directory), work)
    assert list(directories) == ["dense", "routed"]
    (work / "pruned").mkdir()
    (work / "experts" / "00_dense").mkdir()  # zero-padded: the same model in another shape
    (work / "experts" / "100").mkdir()
    directories = expert_files.models_of_run(str(model.directory), work)
    assert list(directories) == ["dense", "pruned", "routed"]
    assert [path.name for path in directories["routed"]] == ["00", "01", "02", "100"]
    first, last = work / "experts" / "00", work / "experts" / "02"
    drawn = routed.Drawn(directories["routed"], np.array([2, 0, 2], np.int32))
    assert drawn.parts() == [(first, [1]), (last, [0, 2])]
    assert list(expert_files.models_of_run("embedded", work / "nowhere")) == ["dense"]
