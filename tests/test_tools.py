"""Every program of tools/ finds the package when it is started by its path alone."""

import pathlib
import subprocess
import sys

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
