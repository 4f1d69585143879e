"""Tests of several processes as one report; with tests of a file of ours, and a GPU that is none."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fusedcalib.bench.repository import outcomes
from fusedcalib.bench.repository.outcomes import Group, Outcome

HERE = Path(__file__).resolve().parent
# What the plugin asks of torch: a context that a kernel can ruin.
TORCH = """
class cuda:
    ruined = False
    def is_initialized(): return True
    def synchronize():
        if cuda.ruined: raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""
TESTS = """
import os, pytest, torch
@pytest.mark.parametrize("i", range(4))
def test_passes(i): pass
def test_skipped(): pytest.skip("not here")
def test_fails(): raise ValueError("seen " + "it")
def test_ruins(): torch.cuda.ruined = True
def test_after(): torch.cuda.synchronize()
def test_crashes(): os.abort()
def test_last(): pass
"""


@pytest.fixture
def session(tmp_path):
    """`session(...)`: a run of pytest over TESTS; the outcomes so far, its status, what it printed."""
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "test_it.py").write_text(TESTS)
    variables = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{tmp_path}"}
    variables |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    file = tmp_path / "outcomes.jsonl"

    def run(*arguments):
        plugin = ["-p", "outcomes_plugin", "--outcomes", str(file), "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *plugin, "-c", os.devnull, "--rootdir", str(tmp_path)]
        command += [*arguments, "test_it.py"]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        return outcomes.read(file), done.returncode, done.stdout + done.stderr

    return run


def names(found, outcome):
    return [one.test.partition("::test_")[2] for one in found if one.outcome == outcome]


def test_a_session_that_dies_goes_on_behind_the_test_in_which_it_died(session, tmp_path):
    found, _, output = session()
    assert "the GPU is lost to this process: CUDA error" in output
    assert names(found, "passed") == [f"passes[{i}]" for i in range(4)]
    assert names(found, "skipped") == ["skipped"]
    assert names(found, "failed") == ["fails", "ruins"]  # and not the test after it
    assert found[5].brief == "ValueError: seen it"
    assert "illegal memory access" in found[6].brief
    found, status, _ = session()
    assert status < 0
    assert names(found, "passed")[-1] == "after"
    assert names(found, "began") == ["crashes"]
    assert outcomes.close(tmp_path / "outcomes.jsonl", "crashed: SIGABRT") == "test_it.py::test_crashes"
    found, status, _ = session()
    assert [one.brief for one in found if one.test.endswith("crashes")] == ["crashed: SIGABRT"]
    assert (status, names(found, "passed")[-1]) == (0, "last")


def test_shares_are_all_of_the_tests_and_none_twice(session, tmp_path):
    got = []
    for share in ("1/3", "2/3", "3/3"):
        (tmp_path / "outcomes.jsonl").unlink(missing_ok=True)
        got.append([one.test for one in session("-k", "passes", "--share", share)[0]])
    assert [len(one) for one in got] == [2, 1, 1]
    assert len({test for one in got for test in one}) == 4


def test_a_file_that_cannot_be_imported_is_a_failure(session, tmp_path):
    (tmp_path / "test_it.py").write_text("import no_such_module")
    found, status, _ = session()
    assert status != 0
    (one,) = found
    assert one.outcome == "failed"
    assert "no_such_module" in one.text


def test_half_a_line_is_no_test(tmp_path):
    path = tmp_path / "lines"
    assert outcomes.read(path) == []
    path.write_text('{"test": "a", "outcome": "passed"}\n{"test": "b"}\n{"test": "b", "out')
    assert [(one.test, one.outcome) for one in outcomes.read(path)] == [("a", "passed"), ("b", "began")]


GROUPS = [
    Group("one", [Outcome("t.py::a", "passed", 1.5), Outcome("t.py::b", "skipped")], seconds=2),
    Group("three 1/2", [Outcome("v.py::x", "passed", 1)], seconds=4),
    Group("two", [Outcome("u.py::c", "failed", 1, "all of \x1b[31mit", "E: x")], ["crashed: SIGSEGV"]),
    Group("three 2/2", [Outcome(f"v.py::{i}", "failed", 1, "", "E: often") for i in range(3)]),
]


def test_one_file_of_all_groups(tmp_path):
    path = tmp_path / "report.xml"
    outcomes.write(GROUPS[:1], path)
    outcomes.write(GROUPS, path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.xml"]
    suites = list(ElementTree.parse(path).getroot())
    assert [(s.get("name"), s.get("tests"), s.get("failures")) for s in suites] == [
        ("one", "2", "0"),
        ("three 1/2", "1", "0"),
        ("two", "1", "1"),
        ("three 2/2", "3", "3"),
    ]
    case = suites[2].find("testcase")
    assert (case.get("classname"), case.get("name")) == ("u.py", "c")
    assert case.find("failure").text == "all of ?[31mit"
    assert suites[2].find("system-err").text == "crashed: SIGSEGV"


def test_the_summary_says_each_kind_of_failure_once():
    lines = outcomes.summary(GROUPS)
    assert lines[0] == "one    1 passed, 0 failed, 1 skipped, 2 s"
    assert lines[1] == "three  1 passed, 3 failed, 0 skipped, 4 s"
    assert lines[3].strip() == "two: crashed: SIGSEGV"
    assert lines.index("3 x E: often") < lines.index("1 x E: x")
    assert lines[lines.index("3 x E: often") + 1].strip() == "v.py::0"
    assert lines[-1] == "2 passed, 4 failed, 1 skipped"
    assert [group.is_well for group in GROUPS] == [True, True, False, False]
    many = [Group("g", [Outcome(str(i), "failed", brief=f"E{i}") for i in range(outcomes.FIRST + 2)])]
    assert "and 2 other kinds of failure" in outcomes.summary(many)
