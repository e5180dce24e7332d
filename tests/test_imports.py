"""Imports point one way, so the package can be read in the order of LAYERS."""

import ast
import importlib.metadata
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAYERS = (
    "config models sharding",
    "files",
    "artefacts",
    "data sites",
    "pipeline",
    "training",
    "metrics scoring",
    "aptp pretrain pruning slicing",
    "evaluate report",
    "sweep",
    "stages",
    "commands main",
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer.split()}
FILES = {p: p.relative_to(ROOT / "sdprune_jax") for p in (ROOT / "sdprune_jax").rglob("*.py")}


def _imports(path: pathlib.Path) -> set[str]:
    """Dotted names of all that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} says `.`; write the whole name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(FILES[path]))
def test_module_imports_only_from_earlier_layers(path):
    here = FILES[path].parts[0].removesuffix(".py")
    if here == "__init__":
        return
    assert here in RANK, f"{here} has no place in LAYERS"
    ours = {name.split(".")[1] for name in _imports(path) if name.startswith("sdprune_jax.")}
    ours -= {"UserError", "NotFiniteError"}
    late = {name for name in ours - {here} if RANK.get(name, 99) >= RANK[here]}
    assert not late, f"{here} may not import {late}"


def _roots(paths) -> set[str]:
    return {name.split(".")[0] for path in paths for name in _imports(path)}


def test_package_imports_what_requirements_name_and_they_name_nothing_else():
    text = (ROOT / "requirements.txt").read_text()
    required = {re.split("[=;]", line)[0].lower() for line in text.splitlines() if line[:1] != "#"}
    sold_as = importlib.metadata.packages_distributions()
    packages = lambda root: {name.lower() for name in sold_as.get(root, [root])}
    roots = _roots(FILES) - set(sys.stdlib_module_names) - {"sdprune_jax"}
    missing = {root for root in roots - {"torch"} if not required & packages(root)}
    assert not missing, f"not in requirements.txt: {missing}"
    unused = required - set().union(*map(packages, roots)) - {"importlib_resources"}
    assert not unused, f"in requirements.txt for nothing: {unused}"


def test_torch_is_imported_by_the_command_for_it_alone():
    torch_side = ROOT / "sdprune_jax" / "commands" / "torch_model.py"
    assert not _roots(set(FILES) - {torch_side}) & {"torch", "tensorflow"}
