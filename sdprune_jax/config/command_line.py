"""From the command line to a run that is known to be possible, and what to say when it is not.

A mistake of the user ends in one message that says what to change; a traceback is a bug of ours.
"""

import contextlib
import difflib
import itertools
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from sdprune_jax import UserError, config
from sdprune_jax.config import checks

_USAGE = "say --config=configs/NAME.py[:tiny] [--config.KEY=VALUE ...] [--dry_run] [--force]"


class Command(NamedTuple):
    """What the user asks for."""

    run: config.Run
    dry_run: bool


def parse(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> Command:
    """Reads `--config` and its overrides.

    Args:
        argv: the words of the command line, the program's name first.
        values: where to define the flags.

    Raises:
        ValueError: for anything that a run cannot start from, before it starts.
    """
    argv = list(argv)
    dry_run = flags.DEFINE_bool(
        "dry_run", False, "Print what would be done, and stop.", flag_values=values
    )
    force = flags.DEFINE_bool(
        "force", False, "Train on though the settings of a training changed.", flag_values=values
    )
    chosen = config_flags.DEFINE_config_file(
        "config", None, _USAGE, flag_values=values, sys_argv=argv
    )
    for kind in (int, float, str):
        config_flags.register_flag_parser_for_type(kind, _Plain(kind))
    given = _given(argv)
    if path := given.pop("config", None):  # ours first: ml_collections stops at the first mistake
        overrides = {key.removeprefix("config."): text for key, text in given.items()}
        checks.check_keys(load(path), overrides)
    try:
        rest = values(argv)[1:]
    except flags.Error as error:
        raise UserError(f"{error}\n  {_USAGE}") from error
    if rest:
        raise UserError(f"`{rest[0]}` is not a flag\n  {_USAGE}")
    if not path:
        raise UserError(f"no config is given\n  {_USAGE}")
    checks.check(chosen.value)
    chosen.value.force |= force.value
    return Command(chosen.value, dry_run.value)


def load(path: str) -> config.Run:
    """The run of a config file.

    Args:
        path: `file.py` or `file.py:size`; the size goes to its `get_config`.

    Raises:
        ValueError: if there is no such file, or it does not make a `config.Run`.
    """
    name, _, size = path.partition(":")
    file = pathlib.Path(name)
    if not file.is_file():
        beside = sorted(str(p) for p in file.parent.glob("*.py"))
        near = difflib.get_close_matches(name, beside, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        here = f"; {file.parent} has {', '.join(beside)}" if beside and not near else ""
        raise UserError(f"there is no config file {name} in {pathlib.Path.cwd()}{hint}{here}")
    try:
        get_config = runpy.run_path(name).get("get_config", lambda *_: None)
        run = get_config(*([size] if size else []))
    except Exception as error:  # whatever a user's file may raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == name]
        where = f"{name}, line {lines[-1]}" if lines else name
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    if not isinstance(run, config.Run):
        raise UserError(f"{name} needs a function get_config(size=None) that returns a config.Run")
    return run


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """Ends the program with a message and status 2 for a mistake of the user."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _given(argv: Sequence[str]) -> dict[str, str]:
    """The text given for `config` and for every `config.key`, the last one if there are more."""
    found = {}
    for word, following in itertools.pairwise([*argv, ""]):
        if match := re.fullmatch(r"--?(config(?:\..*?)?)(?:=(.*))?", word, re.DOTALL):
            found[match[1]] = following if match[2] is None else match[2]
    return found


class _Plain(flags.ArgumentParser):
    """Reads a number or text, `none` as None, and leaves what it cannot read to `checks.check`."""

    def __init__(self, kind: type):
        super().__init__()
        self.kind = kind

    def parse(self, argument: Any) -> Any:
        if isinstance(argument, str) and argument.lower() == "none":
            return None
        try:
            return self.kind(argument)
        except ValueError:
            return argument

    def flag_type(self) -> str:
        return self.kind.__name__
