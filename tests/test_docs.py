"""The pages of the optimizers are made from the classes, are up to date and leave nothing out."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

import fusedcalib
from fusedcalib.options import EXTRAS, WHOLE, Options

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted(DOCS.glob("*.md"))]
WHOLE_NAMES = {option.name for option in WHOLE}
SHARED = {"params", *WHOLE_NAMES, *EXTRAS, *inspect.signature(Options).parameters} - {"own"}
OPTIMIZERS = pytest.mark.parametrize(("name", "cls"), fusedcalib.optimizers().items())


@pytest.fixture
def build(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script puts the package there
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_up_to_date(build):
    assert build.main(["--check"]) == 0


def test_what_is_out_of_date_is_named(build, monkeypatch, capsys):
    made = build.files()
    (page, *_) = made
    monkeypatch.setattr(build, "files", lambda: {**made, page: "older"})
    assert build.main(["--check"]) == 1
    assert f"out of date: {page.relative_to(ROOT)};" in capsys.readouterr().err


@OPTIMIZERS
def test_every_option_is_on_the_page(build, name, cls):
    own = set(inspect.signature(cls).parameters) - SHARED
    entries = re.findall(r"^- `([\w, ]+)`: .+", build.page(name, cls), re.MULTILINE)
    assert sorted(option for entry in entries for option in entry.split(", ")) == sorted(own)


@OPTIMIZERS
def test_every_state_and_its_cost_is_on_the_page(build, name, cls):
    text = build.page(name, cls)
    for states in cls.rule.states.values():
        names = ", ".join(f"`{state}`" for state in states) or "none"
        looked = 4 * len(cls.rule.trust.reads) if cls.rule.trust else 0  # for norms, before the step
        assert f"| {names} | {4 * len(states)} | {12 + 8 * len(states) + looked} |" in text
    assert "```math" in text
    assert "Source: " in text
    assert ".. math::" not in text
    assert ":math:" not in text


def test_shared_options_are_on_their_page(build):
    entries = re.findall(r"^- `([\w, ]+)`: .+", build.options_page(), re.MULTILINE)
    assert {option for entry in entries for option in entry.split(", ")} == SHARED


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)#:\s]+)\)", path.read_text())
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_of_the_package_exist(path):
    """What a page calls `fusedcalib.x.y` can be called so."""
    for dotted in re.findall(r"`fusedcalib\.([\w.]+)", path.read_text()):
        thing = fusedcalib
        for part in dotted.split("."):
            thing = getattr(thing, part)
