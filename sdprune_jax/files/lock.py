"""The directory of a run: one run at a time makes use of it, and leaves its config there."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax
from absl import logging

from sdprune_jax import UserError, sharding
from sdprune_jax.files import json_files


@contextlib.contextmanager
def alone(workdir: str) -> Iterator[None]:
    """Keeps other runs out of `workdir` meanwhile; a run that dies, however it does, keeps none.

    Raises:
        ValueError: in every process, if another run is at work there, or it cannot be written.
    """
    path, problem = pathlib.Path(workdir).absolute() / "lock", ""
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                problem = _lock(stack.enter_context(path.open("a+")), path)
            except OSError as error:
                problem = unwritable(workdir, error)
        if sharding.of_first(lambda: bool(problem)):
            raise UserError(problem or "the first process cannot use config.workdir, as it says")
        yield


def save_config(workdir: str, values: Mapping[str, Any]) -> None:
    """Writes `workdir/config.json`, whole or not at all, in the first process."""
    path = pathlib.Path(workdir) / "config.json"
    try:
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            json_files.write_json(path, values)
    except OSError as error:
        raise UserError(unwritable(workdir, error)) from error


def _lock(file: TextIO, path: pathlib.Path) -> str:
    """Locks an open file until it is closed; returns why it cannot."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return (
            f"config.workdir is {str(path.parent)!r}, where another run is at work:"
            f" {file.read().strip()}; wait for its end, choose another with"
            f" --config.workdir=DIRECTORY, or, if its machine is gone, delete {path}"
        )
    except OSError as error:  # a file system that has no locks
        logging.warning("%s cannot be locked (%s): start no other run there", path, error.strerror)
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return ""


def unwritable(workdir: str, error: OSError) -> str:
    """Says that the directory of a run cannot be written."""
    return (
        f"config.workdir is {workdir!r}, which cannot be written ({error.strerror});"
        " choose another with --config.workdir=DIRECTORY"
    )
