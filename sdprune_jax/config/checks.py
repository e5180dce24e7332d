"""What a run may say: types, ranges, neighbours, and the keys that the command line may set."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from sdprune_jax import UserError, config

_WITH_BATCHES = ("router", "generate", "evaluate")


def check(run: config.Run) -> None:
    """Checks every field of `run` against its type, its legal values and its neighbours.

    Raises:
        ValueError: naming every key that is wrong, what it is, and what it may be.
    """
    problems = _problems(run, "config") or run.check()  # neighbours only once each is sound
    if problems:
        raise UserError("the config is not possible:\n  " + "\n  ".join(problems))


def check_devices(run: config.Run, num_devices: int) -> None:
    """Checks that what every stage computes at once divides among the devices.

    Raises:
        ValueError: naming every batch that does not.
    """
    sections: dict[str, Any] = {name: getattr(run, name) for name in _WITH_BATCHES}
    sections["finetune.training"] = run.finetune and run.finetune.training
    sections["sweep.measure"] = run.sweep and run.sweep.measure
    for name, part in run.pretrain.trainings().items() if run.pretrain else ():
        sections[f"pretrain.{name}"] = part
    problems = [
        f"config.{name}.batch_size is {part.batch_size}, expected a multiple of the {num_devices}"
        " devices"
        for name, part in sections.items()
        if part and part.batch_size % num_devices
    ]
    if problems:
        raise UserError("the batches are not possible:\n  " + "\n  ".join(problems))


def check_keys(run: config.Run, overrides: Mapping[str, str]) -> None:
    """Checks dotted keys, as given on the command line, against the fields of `run`.

    Args:
        run: as the config file made it.
        overrides: keys without the leading `config.`, and the text given for each.

    Raises:
        ValueError: naming every unknown key with the nearest spelling and the legal names, and
            every key of a section that is not set.
    """
    problems = [found for key in overrides if (found := _key_problem(run, key, overrides))]
    if problems:
        raise UserError("the command line cannot be followed:\n  " + "\n  ".join(problems))


def _key_problem(run: config.Run, key: str, overrides: Mapping[str, str]) -> str | None:
    node, path, words, unset = run, "config", key.split("."), []
    for depth, word in enumerate(words):
        fields = {field.name: field for field in dataclasses.fields(node)}
        if word not in fields:
            near = difflib.get_close_matches(word, fields, n=1)
            near = near or [k for k in _keys(config.Run) if k.endswith(f".{words[-1]}")][:3]
            hint = f"did you mean {' or '.join(f'`{k}`' for k in near)}? " if near else ""
            return f"{path} has no field `{word}`; {hint}it has {', '.join(fields)}"
        path += f".{word}"
        given = overrides.get(".".join(words[: depth + 1]))
        section, last = section_of(fields[word]), depth == len(words) - 1
        if section and last:
            may = ("build", "none") if is_optional(fields[word]) else ("build",)
            if given not in may:
                names = ", ".join(field.name for field in dataclasses.fields(section))
                say = " or ".join(f"`{text}`" for text in may)
                return f"{path} is {given!r}, but it is a section: say {say}, or set its {names}"
        elif section:
            if given == "none":
                return f"config.{key} has nothing to set, as {path}=none leaves that section out"
            node = section() if given == "build" else getattr(node, word)
            if node is None:
                node = section()
                unset.append(f"--{path}=build")
        elif not last:
            return f"{path} is a value, it has no field `{words[depth + 1]}`"
    missing = f"config.{key} is in a section that is not set; put {' '.join(unset)} before it"
    return missing if unset else None


def _keys(node: Any, path: str = "") -> Iterator[str]:
    """The dotted key of every value and section."""
    for field in dataclasses.fields(node):
        yield path + field.name
        if section := section_of(field):
            yield from _keys(section, f"{path}{field.name}.")


def section_of(field: dataclasses.Field) -> Any:
    """The dataclass that a field holds, or None for a plain value."""
    return next((t for t in _options(field.type) if dataclasses.is_dataclass(t)), None)


def is_optional(field: dataclasses.Field) -> bool:
    return types.NoneType in _options(field.type)


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    if isinstance(annotation, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _problems(node: Any, path: str) -> list[str]:
    found = []
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), f"{path}.{field.name}"
        if not any(_fits(value, option) for option in _options(field.type)):
            found.append(f"{key} is {value!r}, expected {_spelled(field)}")
        elif dataclasses.is_dataclass(value):
            found += _problems(value, key)
        elif _is_row(value) and dataclasses.is_dataclass(value[0]):
            for i, part in enumerate(value):
                found += _problems(part, f"{key}[{i}]")
        elif "legal" in field.metadata and value not in field.metadata["legal"]:
            names = [str(x) for x in field.metadata["legal"] if x is not None]
            near = difflib.get_close_matches(str(value), names, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            found.append(f"{key} is {value!r}, expected {_spelled(field)}{hint}")
        elif "low" in field.metadata and value is not None:
            low, high = field.metadata["low"], field.metadata["high"]
            if not all(low <= x <= high for x in (value if _is_row(value) else [value])):
                hint = ""
                if field.name == "sparsity" and 1 < value < 100:
                    hint = f"; it is a fraction, so {value:g} % is {value / 100:g}"
                found.append(f"{key} is {value!r}, expected {_spelled(field)}{hint}")
    return found


def _fits(value: Any, annotation: Any) -> bool:
    if annotation is types.NoneType:
        return value is None
    if typing.get_origin(annotation) is tuple:
        of = typing.get_args(annotation)[0]
        return _is_row(value) and len(value) > 0 and all(_fits(x, of) for x in value)
    if annotation is float:
        return type(value) in (int, float)
    return type(value) is annotation


def _is_row(value: Any) -> bool:
    return isinstance(value, tuple | list)  # a config file may well say [8, 16]


def _spelled(field: dataclasses.Field) -> str:
    """What a field may be, as a user would type it."""
    none = " or none" if is_optional(field) else ""
    plain = next(t for t in _options(field.type) if t is not types.NoneType)
    if "legal" in field.metadata:
        names = [str(x) for x in field.metadata["legal"] if x is not None]
        return "one of " + ", ".join(names) + none
    limits = ""
    if "low" in field.metadata:
        limits = f" from {field.metadata['low']} to {field.metadata['high']}"
    if typing.get_origin(plain) is tuple:
        of = typing.get_args(plain)[0]
        example = ", as in (8, 16)" if of is int else ""
        return f"one or more {of.__name__}{limits}{example}{none}"
    return f"{plain.__name__}{limits}{none}"
