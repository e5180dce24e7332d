"""What a training was begun with, which it is held to when it goes on."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging

from sdprune_jax import UserError, sharding
from sdprune_jax.files import json_files

# What may change while a training goes on: when it ends, what it logs, and how it uses memory.
_MAY_CHANGE = ("num_steps", "cycles", "log_every", "save_every", "num_evals", "remat")
_FILE = "settings.json"


def keep(directory: pathlib.Path, settings: Mapping[str, Any], force: bool) -> bool:
    """Writes what the trainings below `directory` are begun with, or compares if they are.

    Every process calls it.

    Args:
        directory: where their checkpoints are, or will be.
        settings: all that their outcome depends on; values of JSON, by name.
        force: goes on with settings that differ; the file then lists every such change.

    Returns:
        Whether one of them has a checkpoint.

    Raises:
        UserError: listing what has changed and may not.
    """
    file = directory / _FILE
    now = dict(_flat(json.loads(json.dumps(settings))))
    begun = any(path.name.isdigit() for path in directory.glob("**/checkpoints/*"))
    values = json_files.read_json(file) if begun and file.exists() else {}
    sharding.wait_for_all(file.name)  # all have read it
    before, forced = values.get("settings", {}), values.get("forced", [])
    changes = [
        f"{key} was {before[key]}, is {now[key]}"
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key] and key.rpartition(".")[2] not in _MAY_CHANGE
    ]
    if sharding.of_first(lambda: bool(changes)) and not force:
        lines = json_files.listing(changes or ["see what the first process says"])
        raise UserError(
            f"{directory} was begun with other settings:\n  {lines}\n  put them back, or choose"
            " another workdir; to start anew, delete it; to train on from what is there with the"
            " new ones, say --force"
        )
    for change in changes:
        logging.warning("%s: %s, by --force", directory, change)
    if jax.process_index() == 0 and now != before:
        directory.mkdir(parents=True, exist_ok=True)
        json_files.write_json(file, {"settings": now, "forced": forced + changes})
    return begun


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
