"""JSON objects in files: read with suspicion, written whole or not at all."""

import json
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sdprune_jax import UserError

MAX_BYTES = 10**7  # the header of all the weights of Stable Diffusion 2 has 2e5


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads one JSON object.

    Raises:
        ValueError: if the file is missing, enormous, nested without end, or no JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes, at most {MAX_BYTES}")
    return parse_json(path.read_bytes(), str(path))


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes an indented JSON object, which has its name only once it is whole."""
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def listing(problems: list[str], limit: int = 20) -> str:
    """Returns the first of `problems`, one a line, and how many more there are."""
    more = [f"... and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n  ".join(problems[:limit] + more)


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """Reads a JSON object in which no key occurs twice; errors begin with `what`."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]
            raise UserError(f"keys occur twice: {listing(twice)}")
        return values

    try:
        values = json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not JSON that can be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{what} is a JSON {type(values).__name__}, expected an object")
    return values
