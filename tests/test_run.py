"""The test command itself: two processes, one verdict."""

import os
import signal
import sys

import pytest
from runner import bootstrap
from runner import run as runner

REPORT = """<testsuites><testsuite tests="6">
<testcase/><testcase><properties/><system-out/></testcase>
<testcase><failure/></testcase><testcase><error/></testcase>
<testcase><skipped/></testcase><testcase><skipped/></testcase><testcase><skipped/></testcase>
</testsuite></testsuites>"""


def test_the_report_is_read(tmp_path):
    report = tmp_path / "report.xml"
    assert runner.read(report) == []
    report.write_text(REPORT)
    assert runner.verdict([1], runner.read(report)) == (1, "2 passed, 2 failed, 3 skipped")


@pytest.mark.parametrize(
    ("codes", "outcomes", "code", "line"),
    [
        ([0, 0], ["passed", "skipped"], 0, "1 passed, 0 failed, 1 skipped"),
        ([0, 5], ["passed"], 0, "1 passed, 0 failed, 0 skipped"),
        ([5, 0], ["passed"], 0, "1 passed, 0 failed, 0 skipped"),
        ([5, 5], [], 5, "0 passed, 0 failed, 0 skipped"),
        ([0, 1], ["passed", "failed"], 1, "1 passed, 1 failed, 0 skipped"),
        ([5, -11], [], -11, "0 passed, 1 failed, 0 skipped"),
        ([0, 2], ["passed"], 2, "1 passed, 1 failed, 0 skipped"),
    ],
)
def test_the_verdict_on_both_processes(codes, outcomes, code, line):
    assert runner.verdict(codes, outcomes) == (code, line)


def test_who_sets_the_number_of_threads_knows_better():
    expected = {"OMP_NUM_THREADS": "7", "NUMBA_NUM_THREADS": "2"}
    assert runner.threaded({"OMP_NUM_THREADS": "7"}, 2) == expected


def test_interrupts_are_not_ignored_here_whoever_started_the_tests():
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


TESTS = """
import os, pytest
def test_plain(): assert "TRITON_INTERPRET" not in os.environ
@pytest.mark.interpreted
def test_interpreted():
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "1"
@pytest.mark.skip
def test_skipped(): pass
@pytest.mark.slow
def test_slow(): pass
@pytest.mark.skipif("BREAK" not in os.environ, reason="on demand")
def test_failing(): raise ValueError("seen " + "it")
"""
# Of one file that cannot be imported the others are run all the same, in both modes.
BROKEN = "import os\nif 'BREAK' in os.environ: import no_such_module\n"


@pytest.mark.parametrize(
    ("gpu", "arguments", "line"),
    [
        ("", [], "2 passed, 0 failed, 2 skipped"),
        ("", ["--all"], "3 passed, 0 failed, 2 skipped"),
        ("", ["--quick"], "1 passed, 0 failed, 0 skipped"),
        ("nvidia", [], "1 passed, 0 failed, 2 skipped"),
        ("", ["-k", "test_interpreted"], "1 passed, 0 failed, 0 skipped"),
        ("", ["tests/test_it.py", "-k", "test_failing"], "0 passed, 1 failed, 0 skipped"),
        ("", ["-k", "test_plain or test_failing"], "1 passed, 3 failed, 0 skipped"),
    ],
)
def test_both_modes_run_and_are_counted(monkeypatch, tmp_path, capfd, gpu, arguments, line):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    (tmp_path / "tests" / "test_broken.py").write_text(BROKEN)
    settings = '[tool.pytest.ini_options]\ntestpaths = ["tests"]\nmarkers = ["interpreted", "slow"]\n'
    options = 'addopts = "--strict-markers -p no:cacheprovider"\n'
    (tmp_path / "pyproject.toml").write_text(settings + options)
    # As in a Python that lacks every plugin.
    variables = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    for name in ("TRITON_INTERPRET", "OMP_NUM_THREADS"):
        variables.pop(name, None)
    fails = "test_failing" in " ".join(arguments)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "QUICK", {"plain": ["-k", "test_plain"], "interpreted": ["-k", "no_test"]})
    monkeypatch.setattr(bootstrap, "gpu", lambda: gpu)
    monkeypatch.setattr(bootstrap, "missing", lambda *names: ["pytest-benchmark", "pytest-xdist"])
    monkeypatch.setattr(
        bootstrap,
        "prepare",
        lambda *needed: (sys.executable, variables | ({"BREAK": "1"} if fails else {})),
    )
    assert runner.work(arguments) == int(fails)
    output = capfd.readouterr().out
    assert output.splitlines()[-1] == line
    assert ("ValueError: seen it" in output) == fails
    assert ("no interpreted run" in output) == bool(gpu)
    assert ("\ninterpreted run:" in output) == (not gpu)


def test_the_smoke_test_is_of_files_that_are_there():
    for arguments in runner.QUICK.values():
        files = [argument for argument in arguments if argument.startswith("tests/")]
        assert files
        assert all((bootstrap.ROOT / file).exists() for file in files)


@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help_names_what_is_not_pytests(argument, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap, "prepare", None)  # it comes before any set-up
    assert runner.work([argument]) == 0
    assert {"--all", "--quick"} <= {*capsys.readouterr().out.split()}
