"""Programs of tools/ find the package by their path alone; commands explain themselves."""

import pathlib
import subprocess
import sys

import pytest

from sdprune_jax.commands import __main__ as commands

TOOLS = pathlib.Path(__file__).parents[1] / "tools"
# One interpreter for all, since each would import JAX anew; each ends where the package is found.
_START = """
import importlib.machinery, pathlib, runpy, sys

class Found(Exception):
    pass

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "sdprune_jax" and importlib.machinery.PathFinder.find_spec(name):
            raise Found

elsewhere = list(sys.path)
sys.meta_path.insert(0, Finder)
for path in sys.argv[1:]:
    sys.path[:] = [str(pathlib.Path(path).parent), *elsewhere]
    try:
        runpy.run_path(path)
    except Found:
        print("found", path)
    except ModuleNotFoundError as error:
        print("lacks", error.name, path)
"""


def test_programs_find_the_package_from_any_directory(tmp_path):
    programs = [str(p) for p in sorted(TOOLS.rglob("*.py")) if "__main__" in p.read_text()]
    assert len(programs) > 10
    command = [sys.executable, "-c", _START, *programs]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = [line.split() for line in ended.stdout.splitlines()]
    # What imports no more than torch and diffusers needs no package; Python 3.12 has no torch here.
    lacking = {words[1] for words in lines if words[0] == "lacks"}
    assert lacking <= {"torch", "resvg_py"}, ended.stdout
    assert sum(words[0] == "found" for words in lines) > 8


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_shows_how_it_is_used(name, capsys):
    if name == "torch":
        pytest.importorskip("torch")
    with pytest.raises(SystemExit) as ended:
        commands.main([name, "--help"])
    assert ended.value.code == 0
    usage, *text = capsys.readouterr().out.splitlines()
    assert usage.startswith(f"usage: sdprune {name} [-h]")
    assert any(line.startswith(f"    sdprune {name} ") for line in text)  # an example


def test_without_a_command_all_are_listed(capsys):
    for arguments, code in (["--help"], 0), ([], 0), (["prune"], 2):
        with pytest.raises(SystemExit) as ended:
            commands.main(arguments)
        assert ended.value.code == code
        listed = capsys.readouterr().out
        assert all(f"\n  {name} " in listed for name in commands.COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "nowhere.ckpt", "new"],
        ["pack", "nowhere", "new"],
        ["prepare-data", "coco", "nowhere", "new", "--split=val2014"],
        ["compare", "nowhere"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_mistake_takes_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        commands.main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())
