"""Fine-tuning of experts: from what it starts, what it sees, and where it goes on."""

import dataclasses
import json

import aptp_model
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdprune_jax import artefacts, config
from sdprune_jax.files import checksums, model_directory
from sdprune_jax.models import unet
from sdprune_jax.stages import assign, finetune, materialise
from sdprune_jax.training import encoded

MESH = aptp_model.MESH
_STEPS = {"num_steps": 4, "warmup_steps": 1, "log_every": 2, "save_every": 2}
TRAINING = config.Training(batch_size=8, learning_rate=2e-4, ema_decay=0.5, num_evals=1, **_STEPS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return aptp_model.make(tmp_path_factory.mktemp("micro") / "model", aptp_model.ONE_LEVEL)


def _work(model, workdir, prompts_of=(0, 2)):
    """A run of three experts, some of which have prompts."""
    aptp_model.write_router(workdir, model)
    # Denoising would lead away from a teacher that is random: the distance to it alone shall fall.
    run = config.Run(
        workdir=str(workdir),
        model=str(model.directory),
        assign=config.Assign(),
        materialise=config.Materialise(),
        finetune=config.Finetune(denoising=0.0, training=TRAINING),
    )
    assign.run(run, MESH)
    for split, count in (("train", 48), ("val", 24)):
        found = np.resize(np.array(prompts_of, np.int32), count)
        name = f"experts_{split}.npy"
        np.save(workdir / "assign" / name, found)
        state = checksums.sha256(workdir / "assign" / name)
        aptp_model.rewrite(
            artefacts.output_of("assign", workdir),
            lambda values, name=name, state=state: values["files"].update({name: state}),
        )
    materialise.run(run, MESH)
    return run


def test_experts_learn_and_those_without_prompts_are_skipped(model, tmp_path, monkeypatch):
    run, batches = _work(model, tmp_path, prompts_of=(2,)), []
    batch = encoded.Examples.batch

    def fails_once(self, rows, seed):
        batches.append((len(self.states), rows, tuple(seed)))
        if seed == [0, 3] and sum(b[2] == (0, 3) for b in batches) == 1:
            raise KeyboardInterrupt
        return batch(self, rows, seed)

    monkeypatch.setattr(encoded.Examples, "batch", fails_once)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(run, MESH)
    assert not (tmp_path / "finetuned").exists()
    with pytest.raises(ValueError, match=r"output was 0.5, is 0.1(?s:.*)say --force"):
        finetune.run(
            dataclasses.replace(run, finetune=dataclasses.replace(run.finetune, output=0.1)), MESH
        )
    output = finetune.run(run, MESH)
    steps = [b[2][1] for b in batches if b[0] == 48]
    assert steps == [0, 1, 2, 3, 2, 3]  # resumed from the checkpoint of step 2
    record = json.loads((output / "finetune.json").read_text())
    assert record["skipped"] == ["00", "01"]
    (row,) = record["experts"]
    assert row["directory"] == "02"
    assert row["prompts"] == {"train": 48, "val": 24}
    assert row["after"]["val_output"] < row["before"]["val_output"]
    before, after = (
        model_directory.open_model(tmp_path / d / "02") for d in ("experts", "finetuned")
    )
    assert before.unet == after.unet
    assert before.unet.kept_units
    old, new = (jax.tree.leaves(model_directory.load(m, "unet")) for m in (before, after))
    change = max(float(jnp.abs(a - b).max()) for a, b in zip(old, new, strict=True))
    assert 1e-5 < change < 4 * 2e-4 + 1e-4  # by Adam's steps; it is not started anew
    prompts = [(tmp_path / d / "02" / "prompts.json").read_text() for d in ("experts", "finetuned")]
    assert prompts[0] == prompts[1]

    count = len(batches)
    assert finetune.run(run, MESH) == output  # complete
    assert len(batches) == count


def test_batches_are_of_the_experts_own_prompts(model, tmp_path, monkeypatch):
    run, rows_seen = _work(model, tmp_path), {}

    def train_expert(task, source, target, rows):
        del task, target
        rows_seen[source.name] = rows
        return {"prompts": {}, "before": {}, "after": {}}

    monkeypatch.setattr(finetune, "_train_expert", train_expert)
    output = finetune.run(run, MESH)
    record = json.loads((output / "finetune.json").read_text())
    assert record["skipped"] == ["01"]
    np.testing.assert_array_equal(rows_seen["00"]["train"], np.arange(0, 48, 2))
    np.testing.assert_array_equal(rows_seen["02"]["val"], np.arange(1, 24, 2))

    calls = len(rows_seen)
    rows_seen.clear()
    changed = dataclasses.replace(run, finetune=config.Finetune(training=TRAINING, output=0.1))
    finetune.run(changed, MESH)  # of another config: nothing of the old one is kept
    assert len(rows_seen) == calls


def test_an_undamaged_student_has_nothing_to_distil(model):
    section = config.Finetune(denoising=0.0, caption_dropout=0.5)
    loss_fn = finetune.make_loss(section, model, model.unet)
    params = aptp_model.random_params(unet.param_shapes(model.unet), 5)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    batch = {"text": draw(8, 5, 12), "mean": draw(8, 8, 8, 4), "log_variance": draw(8, 8, 8, 4)}
    frozen = {"teacher": params, "null": jnp.zeros((1, 5, 12))}
    other = jax.tree.map(lambda p: 0.9 * p, params)
    loss_of = jax.jit(loss_fn)
    loss, parts = loss_of(params, frozen, batch, jax.random.key(0))
    assert float(loss) == 0
    assert float(parts["denoising"]) > 0
    loss, parts = loss_of(other, frozen, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, 0.5 * parts["output"] + 0.5 * parts["block"], rtol=1e-6)
    assert float(loss) > 0


def test_published_rate_stays_after_its_ramp():
    moves = {}
    for schedule in ("constant", "cosine"):
        training = dataclasses.replace(TRAINING, num_steps=50, warmup_steps=2, weight_decay=0.0)
        optimizer = finetune.make_optimizer(config.Finetune(schedule=schedule, training=training))
        params = {"w": jnp.zeros(2)}
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for _ in range(40):
            updates, state = update({"w": jnp.ones(2)}, state, params)
            params = optax.apply_updates(params, updates)
        moves[schedule] = abs(float(updates["w"][0]))
    assert moves["constant"] == pytest.approx(TRAINING.learning_rate, rel=1e-4)
    assert moves["cosine"] < 5e-4


def test_missing_experts_are_refused(model, tmp_path):
    run = config.Run(workdir=str(tmp_path), model=str(model.directory), finetune=config.Finetune())
    with pytest.raises(ValueError, match=r"no experts: .*--config\.materialise=build"):
        finetune.run(run, MESH)
