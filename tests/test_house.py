"""What a reader may rely on: size, order and language of the package."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "sdprune_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
ABOVE = {"stages", "commands", "config", "main.py"}  # these may name sections of the config


def _trees(paths=FILES):
    return ((path, ast.parse(path.read_text())) for path in paths)


def test_the_top_of_the_package_is_seen_at_a_glance():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 24
    assert len([path for path in entries if path.suffix == ".py"]) <= 8
    assert len((PACKAGE / "main.py").read_text().splitlines()) <= 80


def test_no_entry_of_a_docstring_begins_with_of():
    entry = re.compile(r"^ {4}[\w*, ]+: (as )?of\b.*$", re.MULTILINE)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [
        f"{path.name}: {line[0].strip()}"
        for path, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, documented)
        for line in entry.finditer(ast.get_docstring(node) or "")
    ]
    assert not found


def test_no_function_below_the_stages_takes_a_section_of_the_config():
    found = []
    for path, tree in _trees():
        if path.relative_to(PACKAGE).parts[0] in ABOVE:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.args, *node.args.kwonlyargs]
                notes = [a.annotation for a in arguments if a.annotation] + [node.returns]
                found += [
                    f"{path.name}:{node.lineno} {ast.unparse(note)}"
                    for note in notes
                    if note and re.search(r"\bconfig\.[A-Z]", ast.unparse(note))
                ]
    assert not found


def test_what_an_output_is_made_from_is_the_affair_of_artefacts_and_stages():
    knowing = {p.relative_to(PACKAGE).parts[0] for p in FILES if "made_from" in p.read_text()}
    assert knowing <= {"artefacts.py", "stages"}


def test_guidance_is_written_once():
    found = [path.name for path in FILES if re.search(r"jnp\.split\(\w+, 2\)", path.read_text())]
    assert found == ["pipeline.py"]


def test_the_formatter_lays_out_all_but_tables_of_numbers():
    mark = "fmt: " + "skip"
    paths = [
        p for f in ("sdprune_jax", "tests", "tools", "configs") for p in (ROOT / f).rglob("*.py")
    ]
    assert sum(path.read_text().count(mark) for path in paths) <= 15


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_function_fits_a_screen(path):
    ((_, tree),) = _trees([path])
    lengths = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: n for name, n in lengths.items() if n > 60} == {}
