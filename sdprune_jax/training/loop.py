"""One training loop for every model: only the loss and the data differ."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key
from tqdm import tqdm

from sdprune_jax import NotFiniteError, UserError, sharding
from sdprune_jax.training import metrics_log, orbax_checkpoints, signals

Params = Any
Batch = Mapping[str, Any]
Metrics = dict[str, Float[Array, ""]]
Evaluate = Callable[[Params], dict[str, float]]
_SIGNAL = "signal"  # name of a process's signal in the batch, and of the highest in the metrics
_MAX_SKIPPED = 10  # skipped steps in a row that end a training

# (trainable, frozen, batch, key) -> (loss, metrics)
LossFn = Callable[[Params, Params, Batch, Key[Array, ""]], tuple[Float[Array, ""], Metrics]]


class TrainState(NamedTuple):
    """Everything that changes during training and is saved to resume it."""

    step: Int[Array, ""]  # optimizer steps done
    params: Params  # what the optimizer moves
    ema: Params  # exponential moving average of the parameters, which is what gets used
    opt_state: optax.OptState  # what the optimizer remembers, such as moments


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """One training: how long, on what devices, and where."""

    optimizer: optax.GradientTransformation  # what moves the parameters
    num_steps: int  # optimizer steps in all
    batch_size: int  # examples a step, over all devices
    ema_decay: float  # decay of the moving average of the parameters, in [0, 1)
    log_every: int  # steps between lines of the log
    save_every: int  # steps between checkpoints; the last step is saved too
    num_evals: int  # evaluations of the averaged parameters, the last one at the end; 0 for none
    seed: int  # seed of the noise that the loss draws, and of the order of the data
    mesh: Mesh  # the devices; batches are split over all of its axes
    directory: pathlib.Path  # a directory that this training has for itself


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    ema = jax.tree.map(jnp.copy, params)  # donated buffers must not be shared
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def adamw(
    learning_rate: float,
    warmup_steps: int,
    num_steps: int,
    weight_decay: float,
    clip_norm: float,
    cycles: int = 1,
) -> optax.GradientTransformation:
    """AdamW with linear warm-up, cosine decay to zero, and gradients clipped by global norm.

    Source: SGDR, ICLR 2017 (https://arxiv.org/abs/1608.03983), for the cycles.
    """
    length = num_steps // cycles
    schedule = optax.join_schedules(
        [optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, length)] * cycles,
        [length * i for i in range(1, cycles)],
    )
    decayed = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b2=0.99, weight_decay=weight_decay, mask=decayed),
    )


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state_shardings: TrainState,
    ema_decay: float,
) -> Callable[[TrainState, Params, Batch, Key[Array, ""]], tuple[TrainState, Metrics]]:
    """Compiles one optimizer step.

    Args:
        loss_fn: differentiated with respect to its first argument only.
        optimizer: the one `state.opt_state` was made with.
        mesh: batches arrive split over all of its axes.
        state_shardings: a `TrainState` with a sharding in place of every array.
        ema_decay: decay of the moving average, in [0, 1), which is less in the first steps.

    Returns:
        `(state, frozen, batch, key) -> (state, metrics)`. The input state's buffers are donated,
        and `key` may be the same for every step: the step number is folded in. If any metric or
        the gradient is not finite, nothing but the step number moves, and `skipped` is 1.
    """

    @partial(
        jax.jit,
        in_shardings=(state_shardings, None, sharding.batch_sharding(mesh), None),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
        donate_argnames="state",
    )
    def train_step(
        state: TrainState, frozen: Params, batch: Batch, key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        whole = lambda params: sharding.gather(params, mesh)
        grad_fn = jax.value_and_grad(lambda p, *rest: loss_fn(whole(p), *rest), has_aux=True)
        (_, metrics), grads = grad_fn(state.params, whole(frozen), batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
        is_finite = jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))).all()
        moved = TrainState(state.step, params, ema, opt_state)
        state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), moved, state)
        return state._replace(step=state.step + 1), metrics | {metrics_log.SKIPPED: ~is_finite}

    return train_step


def fit(
    training: TrainingSettings,
    loss_fn: LossFn,
    params: Params,
    batch_at: Callable[[int], Batch],
    frozen: Params,
    evaluate: Evaluate | None = None,
) -> Params:
    """Trains to the last step, or resumes from the newest intact checkpoint.

    Writes `metrics.jsonl` and TensorBoard events beside the checkpoints. When a process gets
    SIGTERM or Ctrl-C, all of them save the same step and exit; a second signal kills at once. A
    step whose loss or gradient is not finite is skipped and counted; 10 in a row end the training.

    Args:
        training: how long, on what devices and where.
        loss_fn: `(params, frozen, batch, key) -> (loss, metrics)`.
        params: where to start.
        batch_at: returns the batch of a step, the same whenever it is called.
        frozen: parameters that the loss reads and nothing moves.
        evaluate: returns figures of the averaged parameters, which are logged.

    Returns:
        The moving average of the parameters.

    Raises:
        NotFiniteError: if so many steps were skipped; nothing of them is in any checkpoint.
        SystemExit: after a signal, with status 128 + its number: 143 for SIGTERM.
        UserError: if there are checkpoints, but all are damaged, of another training, or of a
            later step; or there is no room for them.
    """
    mesh, key = training.mesh, jax.random.key(training.seed)
    abstract = jax.eval_shape(lambda p: init_state(p, training.optimizer), params)
    shardings = sharding.fsdp_shardings(abstract, mesh)
    step_fn = make_train_step(
        _pass_signal(loss_fn), training.optimizer, mesh, shardings, training.ema_decay
    )
    with signals.noted() as noted:
        start, state = _restore_or_init(training, params, abstract, shardings)
        with _open_outputs(training, start) as outputs:
            signal_before = 0
            for step in range(start, training.num_steps):
                batch = sharding.place(batch_at(step), sharding.batch_sharding(mesh))
                batch = {**batch, _SIGNAL: sharding.of_processes(noted(), mesh)}
                state, metrics = step_fn(state, frozen, batch, key)
                # Read after the next step has begun, so that the devices need not wait.
                signal, signal_before = int(signal_before), metrics.pop(_SIGNAL)
                outputs.recent.add(step + 1, metrics)
                outputs.bar.update()
                _finish_step(training, outputs, step + 1, state, signal, evaluate)
    return state.ema


def _restore_or_init(
    training: TrainingSettings, params: Params, abstract: TrainState, shardings: TrainState
) -> tuple[int, TrainState]:
    """Returns the steps that are done, and the state after them."""
    directory, num_steps = training.directory, training.num_steps
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    like = jax.tree.map(place, abstract, shardings)
    start, state = orbax_checkpoints.restore(_checkpoints(directory), like) or (0, None)
    if start > num_steps:
        raise UserError(
            f"{directory} has trained to step {start}, past num_steps, {num_steps}: ask for"
            " more, or choose another workdir"
        )
    if state is None:
        state = sharding.place(init_state(params, training.optimizer), shardings)
    if start < num_steps:
        orbax_checkpoints.check_space(_checkpoints(directory), abstract)
    return start, state


class _Outputs(NamedTuple):
    """What a training writes to."""

    manager: ocp.CheckpointManager
    log: metrics_log.Log
    recent: metrics_log.Recent
    bar: tqdm


@contextlib.contextmanager
def _open_outputs(training: TrainingSettings, start: int) -> Iterator[_Outputs]:
    directory, shows = training.directory, sys.stderr.isatty()
    with (
        orbax_checkpoints.open_manager(_checkpoints(directory)) as manager,
        contextlib.closing(metrics_log.Log(directory, start)) as log,
        tqdm(
            total=training.num_steps, initial=start, desc=directory.name, disable=not shows
        ) as bar,
    ):
        yield _Outputs(manager, log, metrics_log.Recent(), bar)


def _finish_step(
    training: TrainingSettings,
    outputs: _Outputs,
    done: int,
    state: TrainState,
    signal: int,
    evaluate: Evaluate | None,
) -> None:
    """Logs, evaluates and saves where it is time to, and stops after a signal."""
    manager, name, num_steps = outputs.manager, training.directory.name, training.num_steps
    is_last = done == num_steps
    logs = done % training.log_every == 0 or is_last
    saves = done % training.save_every == 0 or is_last or signal
    eval_every = max(num_steps // max(training.num_evals, 1), 1)
    evaluates = training.num_evals and (done % eval_every == 0 or is_last) and not signal
    if logs or saves:
        skipped, bad = outputs.recent.fetch()
        if skipped >= min(_MAX_SKIPPED, num_steps):
            raise NotFiniteError(
                f"{name}: {', '.join(bad)} not finite in {skipped} steps in a row before"
                f" step {done}; lower the learning rate, then run again with --force: it"
                f" resumes from the checkpoint of step {manager.latest_step() or 0}"
            )
    if logs:
        outputs.log.write(done, num_steps, outputs.recent.means())
    if evaluate and evaluates:
        outputs.log.write(done, num_steps, evaluate(state.ema))
    if saves:
        orbax_checkpoints.save(manager, done, state)
    if signal and not is_last:
        manager.wait_until_finished()
        logging.warning("%s: saved step %d and stops: signal %d", name, done, signal)
        raise SystemExit(128 + signal)


def _checkpoints(directory: pathlib.Path) -> pathlib.Path:
    return directory.absolute() / "checkpoints"


def _pass_signal(loss_fn: LossFn) -> LossFn:
    """Sends signals through the step with the batch, so that all processes stop at one step."""

    def loss_and_signal(
        params: Params, frozen: Params, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        rest = {name: x for name, x in batch.items() if name != _SIGNAL}
        loss, metrics = loss_fn(params, frozen, rest, key)
        return loss, metrics | {_SIGNAL: jnp.max(batch[_SIGNAL])}

    return loss_and_signal
