"""The documents: what they link to and name exists, and the Python in them runs."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import typing

import pytest
from absl import flags

from sdprune_jax import config, main
from sdprune_jax.commands.__main__ import COMMANDS
from sdprune_jax.config import command_line

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "configs/README.md")
    ),
    *sorted((ROOT / "docs").glob("*.md")),
]
RUN = [page for page in PAGES if page.parent.name == "docs" or page.name == "README.md"]

NOTEBOOK = ROOT / "notebooks" / "prune.ipynb"

_FOLDERS = "configs|docs|notebooks|sdprune_jax|tests|tools"
_PLACEHOLDER = re.compile(r"\b(NAME|TASK|METHOD)\b")


def _name(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def _joined(page: pathlib.Path) -> str:
    """The text of a page, commands over several lines as one."""
    return page.read_text().replace("\\\n", " ")


def _blocks(page: pathlib.Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def _anchors(page: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{_name(page)} links to {target}"
        assert not anchor or anchor in _anchors(linked), f"{_name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_paths_exist(page):
    text = page.read_text().partition("### Removed")[0]  # of the changes
    for path in re.findall(rf"(?<![\w./-])(?:{_FOLDERS})/[\w./*-]*[\w/*]", text):
        if not _PLACEHOLDER.search(path):
            assert any(ROOT.glob(path.rstrip("/"))), f"{_name(page)} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_can_be_given(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = re.sub(r":\$\w+", ":ours", _joined(page))
    for line in re.findall(r"--config=configs/[^`\n]*", text):
        if not _PLACEHOLDER.search(line.split()[0]):
            words = [word for word in line.replace('"', "").split() if word.startswith("--config")]
            command_line.parse(["main", *words], flags.FlagValues())
    for key in re.findall(r"--config\.([a-z_.]+[a-z_])", text):
        assert _is_field(key), f"{_name(page)} sets config.{key}"
    for name in re.findall(
        r"(?:`|^ +|\$ )(?:sdprune|python -m sdprune_jax\.commands) ([a-z-]+)", text
    ):
        assert name in COMMANDS, f"{_name(page)} runs sdprune {name}"


def _is_field(key: str) -> bool:
    section: typing.Any = config.Run
    for word in key.split("."):
        types = {field.name: field.type for field in dataclasses.fields(section or config.Mesh)}
        if section is None or word not in types:
            return False
        options = typing.get_args(types[word]) or (types[word],)
        section = next((t for t in options if dataclasses.is_dataclass(t)), None)
    return True


def test_every_config_and_command_is_in_the_documents():
    text = "".join(map(_joined, PAGES))
    missing = [path.name for path in (ROOT / "configs").glob("*.py") if path.name not in text]
    missing += [name for name in COMMANDS if f"sdprune {name}" not in text]
    assert not missing


def test_stage_of_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name, source in re.findall(
        r"`(\w+\.py)`[^`]*:\n\n```python\n(.*?)^```$", text, re.M | re.S
    ):
        (tmp_path / name).write_text(source)
    run = command_line.parse(["main", "--config=count.py"], flags.FlagValues()).run
    (record,) = main.run_stages(run)
    assert json.loads(record.read_text())["parameters"] == 5_659_044


def test_python_runs(tmp_path):
    """As a reader runs it: on one device, in a process that checks no types."""
    documents = {_name(page): blocks for page in RUN if (blocks := _blocks(page))}
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "keep the notebook without outputs"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    documents[NOTEBOOK.name] = ["".join(cell["source"]) for cell in code]
    if not all(map(importlib.util.find_spec, ("torch", "diffusers"))):
        for blocks in documents.values():
            blocks[:] = [block for block in blocks if "import torch" not in block]
    command = [sys.executable, "-W", "ignore", "-c", _READER, json.dumps(documents)]
    path = {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


# One process for all, since each would trace and import anew. Every page starts in a directory that
# has what the quickstart writes.
_READER = """
import json, os, sys
import sdprune_jax as sp

methods = {"unet": sp.Magnitude(0.35), "text_encoder": sp.Magnitude(0.475)}
pruned = sp.prune(sp.load("embedded"), **methods)
for page, blocks in json.loads(sys.argv[1]).items():
    folder = page.replace("/", "-")
    sp.save(pruned, f"{folder}/runs/quickstart/pruned", dtype="float16")
    os.chdir(folder)
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    os.chdir("..")
"""
