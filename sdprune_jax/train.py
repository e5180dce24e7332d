"""One training loop for every model: only the loss and the data differ."""

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorboardX
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key
from tqdm import tqdm

from sdprune_jax import config, sharding

Params = Any
Batch = Mapping[str, Any]
Metrics = dict[str, Float[Array, ""]]
_RUN = 24  # rows of one group that follow each other

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


def init_params(shapes: Params, seed: int, zero: Callable[[str], bool] = lambda _: False) -> Params:
    """Random parameters: kernels normal with variance 1 / fan-in, scales 1, biases 0.

    Drawn by numpy: compiling hundreds of random operations takes longer than a small training.

    Args:
        shapes: a tree of `jax.ShapeDtypeStruct`s.
        seed: of every draw.
        zero: says of a dotted path whether its kernel starts at 0.
    """
    rng = np.random.default_rng(seed)

    def init(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = ".".join(key.key for key in path)
        if name.endswith("scale") and leaf.ndim == 1:
            return np.ones(leaf.shape, np.float32)
        if name.endswith("bias") or zero(name):
            return np.zeros(leaf.shape, np.float32)
        fan_in = leaf.shape[-1] if name.endswith("embedding") else math.prod(leaf.shape[:-1])
        return rng.normal(size=leaf.shape, scale=fan_in**-0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(init, shapes)


def ends_a_block(path: str) -> bool:
    """Whether a kernel is the last to write into a residual stream: it starts at 0, as in DDPM."""
    return path.endswith(("conv2.kernel", "proj_out.kernel"))


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
        and `key` may be the same for every step: the step number is folded in.
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
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (_, metrics), grads = grad_fn(state.params, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return train_step


def rows_of_batch(
    num_rows: int,
    batch_size: int,
    step: int,
    seed: int,
    groups: Int[np.ndarray, " rows"] | None = None,
) -> Int[np.ndarray, " batch"]:
    """The rows of batch `step`: every row once an epoch, reshuffled each epoch.

    A function of the step alone, so that a resumed run sees what an uninterrupted one sees.

    Args:
        num_rows: of the data.
        batch_size: rows.
        step: from 0.
        seed: of the order.
        groups: of each row; rows of one group then come in runs of 24.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(positions // num_rows):
        here = positions // num_rows == epoch
        rng = np.random.default_rng([seed, int(epoch)])
        order = rng.permutation(num_rows)
        if groups is not None:
            order = order[np.argsort(groups[order], kind="stable")]
            runs = np.array_split(order, -(-num_rows // _RUN))
            order = np.concatenate([runs[i] for i in rng.permutation(len(runs))])
        rows[here] = order[positions[here] % num_rows]
    return rows


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
        evaluate=evaluate, eval_every=max(section.num_steps // section.num_evals, 1),
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
    """Trains to `num_steps`, or resumes from the newest checkpoint below `directory`.

    Writes `metrics.jsonl` and TensorBoard events beside the checkpoints.

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
        FloatingPointError: if the loss or the gradient is not finite; nothing of it is saved.
    """
    abstract = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    shardings = sharding.fsdp_shardings(abstract, mesh)
    step_fn = make_train_step(loss_fn, optimizer, mesh, shardings, ema_decay)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    key, name = jax.random.key(seed), directory.name
    checkpoints = directory.absolute() / "checkpoints"
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(ocp.CheckpointManager(checkpoints, options=options))
        start = manager.latest_step() or 0
        if start:
            like = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
            )
            state = manager.restore(start, args=ocp.args.StandardRestore(like))
        else:
            state = jax.device_put(init_state(params, optimizer), shardings)
        log = stack.enter_context(contextlib.closing(_Log(directory, start)))
        pending: list[Metrics] = []
        bar = stack.enter_context(
            tqdm(total=num_steps, initial=start, desc=name, disable=not sys.stderr.isatty())
        )
        for step in range(start, num_steps):
            state, metrics = step_fn(state, frozen, batch_at(step), key)
            pending.append(metrics)
            bar.update()
            done, last = step + 1, step + 1 == num_steps
            if done % log_every == 0 or last:
                figures = _mean(pending)
                pending = []
                bad = [k for k, value in figures.items() if not math.isfinite(value)]
                if bad:
                    raise FloatingPointError(
                        f"{name}: {', '.join(bad)} not finite between steps {done - log_every} and"
                        f" {done}; lower the learning rate, then run again: it resumes from the"
                        f" checkpoint of step {manager.latest_step() or 0}"
                    )
                log.write(done, num_steps, figures)
            if evaluate and ((eval_every and done % eval_every == 0) or last):
                log.write(done, num_steps, evaluate(state.ema))
            if done % save_every == 0 or last:
                manager.save(done, args=ocp.args.StandardSave(state))
    return state.ema


def _mean(metrics: list[Metrics]) -> dict[str, float]:
    fetched = jax.device_get(metrics)
    return {key: float(np.mean([m[key] for m in fetched])) for key in fetched[0]}


class _Log:
    """Appends figures to `metrics.jsonl` and to TensorBoard; drops what a resumed run repeats."""

    def __init__(self, directory: pathlib.Path, start: int):
        self._name, self._start, self._since = directory.name, start, time.monotonic()
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._events = tensorboardX.SummaryWriter(str(directory), purge_step=start + 1)

    def write(self, step: int, num_steps: int, figures: dict[str, float]) -> None:
        if not self._writes:
            return
        seconds = time.monotonic() - self._since
        left = seconds / max(step - self._start, 1) * (num_steps - step)
        self._file.write(json.dumps({"step": step, "seconds": round(seconds, 1)} | figures) + "\n")
        self._file.flush()
        for key, value in figures.items():
            self._events.add_scalar(key, value, step)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
        tqdm.write(f"{self._name} {step}/{num_steps}  {shown}  {left / 60:.1f} min left")

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._events.close()
