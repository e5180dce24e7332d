"""Checkpoints of a training: committed whole, with a checksum of every leaf, read with suspicion.

A step is a directory that Orbax renames into place once it is complete. What happens to it later,
on a disk or on its way to another, Orbax does not notice: it restores a flipped bit, and fails at
a directory that is cut short. So every leaf is compared with its checksum, and a step that is
damaged gives way to the one before it.
"""

import gc
import pathlib
import shutil
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Array, Shaped, UInt32

from sdprune_jax import UserError
from sdprune_jax.files import json_files, tensors

_STATE, _CHECKSUMS = "default", "checksums"  # directories of a step; Orbax's name of a sole item
_NUM_KEPT = 2


def open_manager(directory: pathlib.Path) -> ocp.CheckpointManager:
    """Opens a manager that keeps the newest two steps; closing it waits for the last save.

    What a save that was killed has left there is removed.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=_NUM_KEPT, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def check_space(directory: pathlib.Path, state: Any) -> None:
    """Refuses a disk that the checkpoints of a training do not fit on.

    Args:
        directory: where checkpoints go; it may have some, or not be there yet.
        state: what will be saved, or its shapes.

    Raises:
        UserError: saying what is needed, and what is free.
    """
    size = sum(tensors.num_bytes(leaf) for leaf in jax.tree.leaves(state))
    count = _NUM_KEPT + 1  # the oldest goes when the newest is whole
    held = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    there = next(path for path in (directory, *directory.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < count * size - held:
        raise UserError(
            f"{there} has {free / 1e9:.3g} GB free, and {count} checkpoints of {size / 1e9:.3g} GB"
            " are to fit there; make room, or choose another workdir"
        )


def save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Copies `state` and its checksums, and writes them while the training goes on.

    Every process calls it. Checksums are taken on the devices, before anything is copied.
    """
    sums = checksums(state)
    items = {_STATE: ocp.args.StandardSave(state), _CHECKSUMS: ocp.args.JsonSave(sums)}
    manager.save(step, args=ocp.args.Composite(**items))


def restore(directory: pathlib.Path, like: Any) -> tuple[int, Any] | None:
    """Returns the newest step that is intact, and its state; None if there is no step.

    Steps that are damaged are named in a warning and moved to `damaged` beside `directory`. Every
    process calls it, before a manager of the directory is open.

    Args:
        directory: where the checkpoints are.
        like: a tree of `jax.ShapeDtypeStruct`s with shardings, on any mesh.

    Raises:
        UserError: if there are steps, but none is intact; they stay where they are.
    """
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    problems: dict[int, str] = {}
    for step in sorted((int(name) for name in names if name.isdigit()), reverse=True):
        state, problem = _read(directory / str(step), like)
        if not problem:
            _set_aside(directory, problems)
            return step, state
        problems[step] = problem
        logging.warning("checkpoint %s is skipped: %s", directory / str(step), problem)
    if problems:
        lines = [f"step {step}: {problem}" for step, problem in problems.items()]
        raise UserError(
            f"no checkpoint in {directory} can be restored:\n  {json_files.listing(lines)}\n"
            "  if the config has changed, choose another workdir; to start anew, delete them"
        )
    return None


def checksums(state: Any) -> dict[str, int]:
    """Returns a number of 32 bits for every leaf, by its path: the same on every mesh.

    One changed word of a leaf always changes it; any other change does with a chance of 1 - 2^-32.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    sums = {jax.tree_util.keystr(path): _checksum(leaf) for path, leaf in leaves}
    return {name: int(value) for name, value in jax.device_get(sums).items()}


@jax.jit
def _checksum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Adds up words mixed with their positions, so that every device adds up what it holds."""
    bits = 8 * x.dtype.itemsize
    assert bits <= 32, f"{x.dtype} has {bits} bits: half of them would go unseen"
    words = x.view(f"uint{bits}").astype(jnp.uint32)
    positions = jnp.zeros(x.shape, jnp.uint32)
    for axis, length in enumerate(x.shape):
        positions = positions * length + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = (words ^ (positions * np.uint32(0x9E3779B1))) * np.uint32(0x85EBCA77)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0xC2B2AE3D)  # every line is a bijection of words
    return jnp.sum(mixed, dtype=jnp.uint32)


def _read(path: pathlib.Path, like: Any) -> tuple[Any, str]:
    """Reads the state of one step, and says what is wrong with it; all processes say the same."""
    state, expected, problem = None, {}, ""
    try:
        # Not by the manager: its processes wait for each other, for minutes if one has failed.
        handler: Any = ocp.StandardCheckpointHandler()  # its types do not name pathlib's paths
        _check_shapes(handler.metadata(path / _STATE), like)
        state = handler.restore(path / _STATE, args=ocp.args.StandardRestore(like))
        expected = json_files.read_json(path / _CHECKSUMS / "metadata")
    except Exception as error:  # a damaged file makes Orbax raise anything, Exception itself too
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if problem:  # Orbax leaves coroutines that nobody awaits, of which Python would warn later
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()
    if not _on_every_process(not problem):
        return None, problem or "another process could not read it"
    return state, _differences(state, expected)


def _check_shapes(saved: Any, like: Any) -> None:
    """Compares shapes before anything is read: a read that fails leaves other readers behind."""
    there, wanted = _shapes(saved), _shapes(like)
    wrong = [
        f"{name} is {there.get(name, 'absent')}, not {wanted.get(name, 'known')}"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name) != wanted.get(name)
    ]
    if wrong:
        raise UserError(f"of another configuration: {json_files.listing(wrong)}")


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _differences(state: Any, expected: Mapping[str, int]) -> str:
    sums = checksums(state)
    wrong = [name for name in sorted(sums) if sums[name] != expected.get(name)]
    return f"not as it was saved: {json_files.listing(wrong)}" if wrong else ""


def _on_every_process(is_so: bool) -> bool:
    if jax.process_count() == 1:
        return is_so
    return bool(np.all(multihost_utils.process_allgather(np.array([is_so]))))


def _set_aside(directory: pathlib.Path, steps: Mapping[int, str]) -> None:
    """Moves steps out of the way of those that the training will save again."""
    if not steps:
        return
    if jax.process_index() == 0:
        damaged = directory.with_name("damaged")
        damaged.mkdir(exist_ok=True)
        for step in steps:
            shutil.rmtree(damaged / str(step), ignore_errors=True)  # of an earlier time
            (directory / str(step)).rename(damaged / str(step))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
