"""bench/gpu.sh: its three parts, what they leave, and what is said where one cannot run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusedcalib.bench import cli
from fusedcalib.bench.repository import gpu, gpu_log, gpu_parts, pool

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
ROOT = Path(__file__).resolve().parents[1]

# It writes what the commands write, fails where it is told to, and says what it was asked.
PYTHON = f"""#!{sys.executable} -S
import os, sys
given = sys.argv[1:]
text = " ".join(given)
if "is_available" in text:
    print(os.environ.get("ANSWER", "yes Fake GPU"))
elif "env --json" in text:
    print('{{"problems": []}}')
else:
    name = next((word for word in given if "fusedcalib" in word or "pytest" in word), "tool")
    print("ran", text, flush=True)
    for option, default in (("--json", None), ("--out", "results.json")):
        if option in given:
            path = given[given.index(option) + 1]
            if os.path.isdir(path):
                path = os.path.join(path, "variants.json" if "variants" in text else default)
            open(path, "w").write("{{}}")
    if os.environ.get("BREAK", "nothing") in text:
        sys.exit("broken")
"""


@pytest.fixture
def work(monkeypatch, tmp_path):
    """`work(*parts)`: the exit status, what it wrote, the log; with a Python that does nothing."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setattr(gpu_parts, "tool", lambda name, _: str(python))
    monkeypatch.setattr(gpu.bootstrap, "prepare", lambda *needed: (str(python), dict(os.environ)))
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = cli.main(["gpu", *arguments])
        files = sorted(path.name for path in (tmp_path / "out").iterdir())
        return status, files, (tmp_path / "out" / "gpu.log").read_text()

    return run


FILES = ["check.xml", "env.json", "gpu.log", "ncu.txt", "profile.json", "results.json", "trace.json.gz"]


def test_all_parts_in_turn_and_no_more_than_eight_files(work, tmp_path):
    status, files, log = work()
    assert status == 0, log
    assert files == [*FILES, "variants.json"]
    parts = [line for line in log.splitlines() if line.startswith("== ") and "at most" in line]
    assert [re.match(r"== (\w+): at most 460 s", line)[1] for line in parts] == [
        "check",
        "measure",
        "explain",
    ]
    assert log.endswith("all is well\n")
    assert json.loads((tmp_path / "out" / "env.json").read_text()) == {"problems": []}
    order = [log.index(word) for word in ("fusedcalib profile", "cli suite", "cli variants", "steps trace")]
    assert order == sorted(order)
    watched = re.findall(
        r"regex:(\w+) .* fusedcalib\.bench\.cli steps (\w+)", (tmp_path / "out/ncu.txt").read_text()
    )
    assert watched == [
        ("norm_kernel", "norm"),
        ("step_kernel", "flat"),
        ("step_kernel", "8192"),
        ("step_kernel", "14336"),
    ]


@pytest.mark.parametrize(
    ("part", "breaks", "goes_on"),
    [
        ("measure", "fusedcalib profile", "ran -X faulthandler -m fusedcalib.bench.cli suite"),
        ("explain", "cli variants", "ran -X faulthandler -m fusedcalib.bench.cli steps trace"),
    ],
)
def test_what_fails_is_said_at_the_end_and_the_rest_is_run(work, monkeypatch, part, breaks, goes_on):
    monkeypatch.setenv("BREAK", breaks)
    status, _, log = work(part)
    assert status == 1
    assert goes_on in log
    assert log.splitlines()[-1] == f"FAILED: {breaks.split()[-1].split('.')[-1]}: exit status 1: broken"


@pytest.mark.parametrize("part", gpu.PARTS)
def test_without_a_gpu_each_part_says_so_and_runs_nothing(work, monkeypatch, part):
    monkeypatch.setenv("ANSWER", "no torch 9.9 sees none")
    status, files, log = work(part)
    assert status == 1
    assert "GPU: torch 9.9 sees none\n" in log
    assert "FAILED: there is no GPU here that torch sees: nothing was run" in log
    assert "ran " not in log
    assert files == (["env.json", "gpu.log"] if part == "check" else ["gpu.log"])


def test_tools_that_are_missing_are_named(work, monkeypatch):
    monkeypatch.setattr(gpu_parts, "tool", lambda name, _: "")
    status, files, log = work("explain", "check", "--only", "test_row_totals")
    assert status == 1
    for sentence in (
        "compute-sanitizer is not here: no memory is checked",
        "ncu is not here: no counter of a kernel is read",
    ):
        assert f"FAILED: {sentence}\n" in log
    assert "trace.json.gz" in files


def test_how_long_a_part_may_take_is_a_variable(work, monkeypatch):
    monkeypatch.setenv("MEASURE_SECONDS", "100")
    _, _, log = work("measure")
    assert "== measure: at most 100 s" in log
    (seconds,) = re.findall(r"cli suite .* --seconds (\d+)", log)
    assert 10 <= int(seconds) <= 100 - pool.GRACE - gpu_parts.LAST_SECONDS


def test_only_some_groups(work):
    _, _, log = work("check", "--only", "test_kernels 1/|first")
    assert "2 groups of tests" in log


def test_a_file_that_is_too_large_is_said(work, monkeypatch):
    monkeypatch.setattr(gpu_log, "MOST", 10)
    status, _, log = work("explain")
    assert status == 1
    assert "FAILED: gpu.log is larger than 16 MiB" in log


def test_when_it_is_ended_the_log_says_so_and_no_part_begins(work, monkeypatch):
    monkeypatch.setattr(gpu.Work, "measure", lambda self, seconds: self.on_signal(15, None))
    status, _, log = work("measure", "explain")
    assert status == gpu.INTERRUPTED
    assert "FAILED: measure was interrupted" in log
    assert "== explain" not in log


def test_a_part_that_does_not_exist(capsys):
    assert cli.main(["gpu", "chekc"]) == 2
    assert "there is no part 'chekc'; there are check, measure, explain" in capsys.readouterr().err


def test_the_script_hands_on_what_it_is_given(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" "$OUT"; exit 7\n')
    python.chmod(0o755)
    script = [str(ROOT / "bench" / "gpu.sh"), "check", "--only", "a b"]
    variables = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "OUT": "here"}
    done = subprocess.run(script, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, f"{ROOT}/bench/cli.py gpu check --only a b here\n")
