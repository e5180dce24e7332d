"""One training loop for every model: only the loss and the data differ."""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key
from tqdm import tqdm

from sdprune_jax import NotFiniteError, UserError, config, sharding
from sdprune_jax.data.order import rows_of_batch as rows_of_batch
from sdprune_jax.models.initial import ends_a_block as ends_a_block
from sdprune_jax.models.initial import init_params as init_params
from sdprune_jax.training import metrics_log, orbax_checkpoints, signals

Params = Any
Batch = Mapping[str, Any]
Metrics = dict[str, Float[Array, ""]]
_SIGNAL = "signal"  # in the batch, of every process; in the metrics, the highest
_MAX_SKIPPED = 10  # in a row

# (trainable, frozen, batch, key) -> (loss, metrics)
LossFn = Callable[[Params, Params, Batch, Key[Array, ""]], tuple[Float[Array, ""], Metrics]]


class TrainState(NamedTuple):
    """Everything that changes during training and is saved to resume it.

    Attributes:
        step: optimizer steps done.
        params: what the optimizer moves.
        ema: their exponential moving average, which is what gets used.
        opt_state: of the optax optimizer.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: optax.OptState


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

    Source of cycles: SGDR, ICLR 2017 (https://arxiv.org/abs/1608.03983).
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
        ema_decay: of the moving average, in [0, 1); shortened at the start of the training.

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


def fit_section(
    section: config.Training,
    loss_fn: LossFn,
    params: Params,
    batch_at: Callable[[int], Batch],
    frozen: Params,
    evaluate: Callable[[Params], dict[str, float]],
    seed: int,
    mesh: Mesh,
    directory: pathlib.Path,
) -> Params:
    """`fit` as a section of the config says."""
    optimizer = adamw(
        section.learning_rate,
        section.warmup_steps,
        section.num_steps,
        section.weight_decay,
        section.clip_norm,
        section.cycles,
    )
    return fit(
        loss_fn, params, optimizer, batch_at, frozen,
        mesh=mesh, num_steps=section.num_steps, ema_decay=section.ema_decay, seed=seed,
        directory=directory, log_every=section.log_every, save_every=section.save_every,
        evaluate=evaluate if section.num_evals else None,
        eval_every=max(section.num_steps // max(section.num_evals, 1), 1),
    )  # fmt: skip


def fit(
    loss_fn: LossFn,
    params: Params,
    optimizer: optax.GradientTransformation,
    batch_at: Callable[[int], Batch],
    frozen: Params,
    *,
    mesh: Mesh,
    num_steps: int,
    ema_decay: float,
    seed: int,
    directory: pathlib.Path,
    log_every: int,
    save_every: int,
    evaluate: Callable[[Params], dict[str, float]] | None = None,
    eval_every: int = 0,
) -> Params:
    """Trains to `num_steps`, or resumes from the newest intact checkpoint below `directory`.

    Writes `metrics.jsonl` and TensorBoard events beside the checkpoints. When a process gets
    SIGTERM or Ctrl-C, all of them save the same step and exit; a second signal kills at once. A
    step whose loss or gradient is not finite is skipped and counted; 10 in a row end the training.

    Args:
        loss_fn: `(params, frozen, batch, key) -> (loss, metrics)`.
        params: where to start.
        optimizer: an optax optimizer.
        batch_at: the batch of a step, the same whenever it is asked for.
        frozen: parameters that the loss reads and nothing moves.
        mesh: of `sharding.make_mesh`.
        num_steps: optimizer steps in all.
        ema_decay: of the moving average of the parameters.
        seed: of the noise that `loss_fn` draws.
        directory: of this training alone.
        log_every: steps between log lines.
        save_every: steps between checkpoints; the last step is saved too.
        evaluate: figures of the averaged parameters, logged every `eval_every` steps.
        eval_every: steps; 0 evaluates at the end only.

    Returns:
        The moving average of the parameters.

    Raises:
        FloatingPointError: if so many steps were skipped; nothing of them is in any checkpoint.
        SystemExit: after a signal, with status 128 + its number: 143 for SIGTERM.
        ValueError: if there are checkpoints, but all are damaged, of another training, or of a
            later step; or there is no room for them.
    """
    key, name = jax.random.key(seed), directory.name
    checkpoints = directory.absolute() / "checkpoints"
    abstract = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    shardings = sharding.fsdp_shardings(abstract, mesh)
    step_fn = make_train_step(_pass_signal(loss_fn), optimizer, mesh, shardings, ema_decay)
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(signals.noted())
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        start, state = orbax_checkpoints.restore(checkpoints, like) or (0, None)
        if start > num_steps:
            raise UserError(
                f"{directory} has trained to step {start}, past num_steps, {num_steps}: ask for"
                " more, or choose another workdir"
            )
        if state is None:
            state = sharding.place(init_state(params, optimizer), shardings)
        if start < num_steps:
            orbax_checkpoints.check_space(checkpoints, abstract)
        manager = stack.enter_context(orbax_checkpoints.open_manager(checkpoints))
        log = stack.enter_context(contextlib.closing(metrics_log.Log(directory, start)))
        recent = metrics_log.Recent()
        arrived: list[Any] = [0]  # signals, by step
        bar = stack.enter_context(
            tqdm(total=num_steps, initial=start, desc=name, disable=not sys.stderr.isatty())
        )
        for step in range(start, num_steps):
            batch = sharding.place(batch_at(step), sharding.batch_sharding(mesh))
            batch = {**batch, _SIGNAL: sharding.of_processes(caught(), mesh)}
            state, metrics = step_fn(state, frozen, batch, key)
            arrived.append(metrics.pop(_SIGNAL))
            recent.add(step + 1, metrics)
            bar.update()
            done, last = step + 1, step + 1 == num_steps
            number = int(arrived.pop(0))  # of the step before: not to wait for this one
            logs, saves = done % log_every == 0 or last, done % save_every == 0 or last or number
            if logs or saves:
                skipped, bad = recent.fetch()
                if skipped >= min(_MAX_SKIPPED, num_steps):
                    raise NotFiniteError(
                        f"{name}: {', '.join(bad)} not finite in {skipped} steps in a row before"
                        f" step {done}; lower the learning rate, then run again with --force: it"
                        f" resumes from the checkpoint of step {manager.latest_step() or 0}"
                    )
            if logs:
                log.write(done, num_steps, recent.means())
            if evaluate and not number and ((eval_every and done % eval_every == 0) or last):
                log.write(done, num_steps, evaluate(state.ema))
            if saves:
                orbax_checkpoints.save(manager, done, state)
            if number and not last:
                manager.wait_until_finished()
                logging.warning("%s: saved step %d and stops: signal %d", name, done, number)
                raise SystemExit(128 + number)
    return state.ema


def _pass_signal(loss_fn: LossFn) -> LossFn:
    """Sends signals through the step with the batch, so that all processes stop at one step."""

    def loss_and_signal(
        params: Params, frozen: Params, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        rest = {name: x for name, x in batch.items() if name != _SIGNAL}
        loss, metrics = loss_fn(params, frozen, rest, key)
        return loss, metrics | {_SIGNAL: jnp.max(batch[_SIGNAL])}

    return loss_and_signal
