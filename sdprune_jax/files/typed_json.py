"""Frozen dataclasses to JSON and back, with every value held against its annotation."""

import dataclasses
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from sdprune_jax import UserError
from sdprune_jax.files.json_files import listing

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Returns plain values for a dataclass, without fields whose default None was kept."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: to_json(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if not (getattr(value, field.name) is None and field.default is None)
        }
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value.item() if hasattr(value, "item") else value  # a NumPy scalar


def from_json(kind: type[T], values: Any, where: str) -> T:
    """Builds a dataclass from plain values; keys that it does not have are passed over.

    Args:
        kind: a dataclass whose fields are numbers, texts, dataclasses, and lists, tuples and
            mappings of these.
        values: as `json.loads` gives them.
        where: file name, for messages.

    Raises:
        UserError: naming every value that is missing or of another type.
    """
    problems = list(_misfits(kind, values, where))
    if problems:
        raise UserError(
            f"{where} is not what this version writes; run the stage again that wrote it:\n  "
            + listing(problems)
        )
    return _build(kind, values)


def _misfits(kind: Any, value: Any, where: str) -> Iterator[str]:
    """Says what in `value` has another form than `kind`."""
    kind, is_optional = _without_none(kind)
    if kind is Any or (value is None and is_optional):
        return
    plain: Any = typing.get_origin(kind) or kind
    items = typing.get_args(kind)
    if dataclasses.is_dataclass(plain):
        plain = dict
    elif plain in (tuple, list) or plain is typing.get_origin(typing.Sequence[int]):
        plain = list
    elif plain is typing.get_origin(typing.Mapping[str, int]):
        plain = dict
    expected: Any = (int, float) if plain is float else plain
    if not isinstance(value, expected) or (isinstance(value, bool) and plain is not bool):
        names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
        yield f"{where} is {reprlib.repr(value)}, expected {names.get(plain, 'a number')}"
    elif dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.name in value:
                yield from _misfits(hints[field.name], value[field.name], f"{where}: {field.name}")
            elif _is_required(field):
                yield f"{where}: {field.name} is missing"
    elif plain is dict and items:
        for key, item in value.items():
            yield from _misfits(items[1], item, f"{where}: {key}")
    elif plain is list and items:
        for i, item in enumerate(value):
            yield from _misfits(items[0], item, f"{where}[{i}]")


def _build(kind: Any, value: Any) -> Any:
    kind, _ = _without_none(kind)
    plain, items = typing.get_origin(kind) or kind, typing.get_args(kind)
    if value is None or kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = {name: _build(hints[name], value[name]) for name in hints if name in value}
        return kind(**known)
    if isinstance(value, dict):
        return {key: _build(items[1], item) if items else item for key, item in value.items()}
    if isinstance(value, list):
        built = [_build(items[0], item) if items else item for item in value]
        return tuple(built) if plain is tuple else built
    return float(value) if plain is float else value


def _without_none(kind: Any) -> tuple[Any, bool]:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (plain,) = [option for option in typing.get_args(kind) if option is not types.NoneType]
        return plain, True
    return kind, False


def _is_required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing
