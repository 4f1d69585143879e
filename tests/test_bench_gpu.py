"""What runs on a GPU, without one: order, limits, reports; with a Python and tools that stand in."""

import os
import re
import sys
import time
from pathlib import Path
from threading import Event
from xml.etree import ElementTree

import pytest

from fusedcalib.bench.repository import gpu_check, gpu_log, gpu_parts, outcomes, pool
from fusedcalib.bench.repository.pool import Job

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
ROOT = Path(__file__).resolve().parents[1]

# -- what runs, in which order ----------------------------------------------------------------


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.setattr(gpu_parts, "tool", lambda name, python: f"/cuda/{name}")


def test_what_says_most_comes_first(tools, tmp_path):
    names = [job.name for job in gpu_parts.checks("python", tmp_path)]
    order = ["first-step", "test_kernels_rows 1/2", "test_kernels 1/12", "memcheck", "racecheck"]
    order += ["test_control 1/6", "test_faults 1/4", "test_chain 1/3", "test_noise 1/3", "test_contract 1/4"]
    assert [name for name in names if name in order] == order
    assert names[0] == order[0]
    assert len(set(names)) == len(names)


def test_without_a_gpu_only_what_can_be_interpreted_is_tried(tools, tmp_path):
    jobs = gpu_parts.checks("python", tmp_path, interpreted=True)
    assert {job.name.split()[0] for job in jobs} == {*gpu_parts.kernel_files()}
    assert all(gpu_parts.has_outcomes(job) for job in jobs)
    assert all(job.command[job.command.index("-k") + 1] == gpu_parts.HERE for job in jobs)


def test_every_file_of_kernel_tests_is_run(monkeypatch, tmp_path):
    """Those that are named in their order, then those that a later change has added."""
    names = [*gpu_parts.kernel_files()]
    known = gpu_parts.shares(gpu_parts.KERNELS)
    assert names[: len(known)] == [*known]  # they are there
    assert "test_bench_gpu_steps" in names
    assert all((ROOT / "tests" / f"{name}.py").exists() for name in gpu_parts.shares(gpu_parts.AROUND))
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    line = "from kernel_cases import GPU, {}, device_of\n"
    for name, what in {"new": "TRITON", "kernels": "BACKENDS", "other": "COVERING"}.items():
        (tmp_path / "tests" / f"test_{name}.py").write_text(f"import os\n{line.format(what)}")
    assert [*gpu_parts.kernel_files()] == ["test_kernels", "test_new"]


def test_no_test_is_left_out_between_the_shares(tools, tmp_path):
    shares = {}
    for job in filter(gpu_parts.has_outcomes, gpu_parts.checks("python", tmp_path)):
        number, of = map(int, job.command[job.command.index("--share") + 1].split("/"))
        shares.setdefault((job.command[-1], of), set()).add(number)
    assert all(numbers == set(range(1, of + 1)) for (_, of), numbers in shares.items())
    assert len({file for file, _ in shares}) == len(shares)


def test_tools_are_found_wherever_they_are_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    python = str(tmp_path / "venv" / "bin" / "python")
    assert gpu_parts.tool("no-such-tool", python) == ""
    in_packages = tmp_path / "venv/lib/python3.12/site-packages/nvidia/cuda_sanitizer/bin/no-such-tool"
    for path in (in_packages, tmp_path / "cuda/bin/no-such-tool", tmp_path / "no-such-tool"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o755)
        assert gpu_parts.tool("no-such-tool", python) == str(path)


# -- check ------------------------------------------------------------------------------------

TESTS = """
import os, pytest
@pytest.mark.parametrize("i", range(3))
def test_passes(i): pass
def test_crashes(): os.abort()
def test_last(): assert "GIVEN" not in os.environ, "seen " + "it"
"""


@pytest.fixture
def check(tmp_path):
    """`check(*jobs)`: what is wrong, the report, the log."""
    folder = tmp_path / "folder"
    folder.mkdir()

    def run(*jobs, seconds=60.0, stop=None):
        log = gpu_log.Log(tmp_path / "gpu.log")
        one = gpu_check.Check(tmp_path / "check.xml", folder, log, stop or Event())
        wrong = one.run(jobs, 2, time.monotonic() + seconds)
        return wrong, ElementTree.parse(tmp_path / "check.xml").getroot(), log.path.read_text()

    return run


def group(tmp_path, name, text=TESTS, seconds=60.0, **variables):
    """A job as `checks` has it, of a file of its own."""
    file = tmp_path / f"{name}.py"
    file.write_text(text)
    plugin = ("-p", gpu_parts.PLUGIN, "--outcomes", str(gpu_parts.outcomes_of(tmp_path / "folder", name)))
    options = ("-q", "-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider")
    variables |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    variables["PYTHONPATH"] = str(ROOT / "tests")
    command = (sys.executable, "-X", "faulthandler", "-m", "pytest", *plugin, *options, str(file))
    return Job(name, command, seconds, variables)


def command(name, code):
    return Job(name, (sys.executable, "-S", "-c", code), 60.0)


def test_a_group_that_crashes_goes_on_behind_the_crash(check, tmp_path):
    wrong, report, log = check(group(tmp_path, "one"), group(tmp_path, "two", "def test_it(): pass"))
    suites = {suite.get("name"): suite for suite in report}
    cases = {case.get("name"): case for case in suites["one"]}
    assert list(cases)[:5] == [*(f"test_passes[{i}]" for i in range(3)), "test_crashes", "test_last"]
    assert [name for name, case in cases.items() if case.find("failure") is not None] == ["test_crashes"]
    assert wrong == [
        "one: crashed: SIGABRT in one.py::test_crashes",
        "1 tests failed: see above, and check.xml",
    ]
    assert 'one.py", line 5 in test_crashes' in log  # where it was
    assert re.search(r"^two +1 passed, 0 failed, 0 skipped, \d+ s$", log, re.M)
    assert "1 x crashed: SIGABRT\n    one.py::test_crashes\n" in log
    assert log.endswith("5 passed, 1 failed, 0 skipped\n")


def test_a_group_that_hangs_says_where_and_goes_on(check, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "STAGES", tuple((name, 1.0) for name, _ in pool.STAGES))
    hangs = "import time\ndef test_hangs(): time.sleep(60)\ndef test_last(): pass"
    wrong, report, log = check(group(tmp_path, "one", hangs, seconds=6.0))
    assert re.fullmatch(r"one: stopped after \d+ s in one.py::test_hangs", wrong[0])
    assert "one.py:2: KeyboardInterrupt" in log
    assert 'one.py", line 2 in test_hangs' in log
    assert [case.get("name") for case in report.iter("testcase")] == ["test_hangs", "test_last"]


def test_the_report_is_there_after_each_group(check, tmp_path, monkeypatch):
    seen = []
    write = outcomes.write
    monkeypatch.setattr(
        outcomes, "write", lambda groups, path: (write(groups, path), seen.append(path.read_text()))
    )
    check(command("first", "pass"), command("second", "import time; time.sleep(0.5)"))
    assert ['name="second"' in text for text in seen] == [False, True]
    assert all('name="first"' in text for text in seen)


def test_a_command_is_one_test_and_a_tool_that_the_device_refuses_is_said(check):
    wrong, report, _ = check(
        command("step", "print('so far', flush=True); raise SystemExit('2 away from plain torch')"),
        command("memcheck", "print('Error: Device not supported'); raise SystemExit(1)"),
    )
    by_name = {case.get("classname"): case for case in report.iter("testcase")}
    assert by_name["step"].find("failure").get("message") == "exit status 1: 2 away from plain torch"
    assert by_name["memcheck"].find("skipped") is not None
    assert wrong[0] == "memcheck does not run here: Error: Device not supported"
    assert wrong[1] == "1 tests failed: see above, and check.xml"


def test_what_was_not_begun_is_named(check, monkeypatch):
    monkeypatch.setattr(pool, "STAGES", tuple((name, 0.3) for name, _ in pool.STAGES))
    long = "import time; time.sleep(60)"
    wrong, _, _ = check(*(command(name, long) for name in ("a", "b", "c")), seconds=0.3)
    assert wrong[-1] == "no time was left for c"


# -- the log ----------------------------------------------------------------------------------


def test_the_log_stays_below_its_size_and_its_last_lines_fit(tmp_path, capsys):
    log = gpu_log.Log(tmp_path / "log", 1000)
    log("begun")
    log.output("x" * 5000)
    log("the end")
    text = log.path.read_text()
    assert text.startswith("begun\nx")
    assert text.endswith("xthe end\n")
    assert len(text) < 800
    gpu_log.Log(log.path, 1000)("again")
    assert log.path.read_text().endswith("the end\nagain\n")
    assert len(log.path.read_text()) < 300
    assert capsys.readouterr().out == "begun\nthe end\nagain\n"


def test_of_long_output_beginning_and_end_are_kept():
    text = "".join(map(chr, range(65, 91)))
    assert gpu_log.shortened(text, 26) == text
    assert gpu_log.shortened(text, 10) == "ABCDE\n[16 characters are left out]\nVWXYZ"
