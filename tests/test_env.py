"""What is told of an environment, whatever is missing in it."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedcalib import __main__ as command
from fusedcalib.bench.env import env
from fusedcalib.bench.env import problems as env_problems

ROOT = Path(__file__).resolve().parents[1]
# A machine on which all is well.
WELL = {
    "versions": {"torch": "2.11.0+cu130", "triton": "3.6.0", "numba": "0.68.1", "numpy": "2.4.6"},
    "gpus": {
        "driver_sees": "NVIDIA H200",
        "driver": "580.1",
        "cuda": "13.0",
        "hip": None,
        "torch_sees": [{"name": "NVIDIA H200", "capability": "9.0", "gigabytes": 141.0}],
    },
    "compiler": {
        "CC": None,
        "path": "/usr/bin/gcc",
        "Python.h": "/usr/include/Python.h",
        "looked_in": "/usr",
    },
    "caches": {"triton": "/cache", "triton_writable": True},
    "variables": {},
}
NEEDS = {("torch", "triton"): "==3.6.0", ("numba", "numpy"): "<2.6,>=1.22"}


@pytest.fixture(autouse=True)
def needs(monkeypatch):
    monkeypatch.setattr(env_problems, "required", lambda package, of: NEEDS[package, of])


def problems(section=None, **changes):
    found = copy.deepcopy(WELL)
    if section:
        found[section] |= changes
    return [problem for check in env_problems.PROBLEMS if (problem := check(found))]


def test_where_all_is_well_there_is_no_problem():
    assert problems() == []


@pytest.mark.parametrize(
    ("section", "changes", "what", "mend"),
    [
        ("versions", {"torch": "2.10.0"}, "torch 2.10.0 is older than 2.11", "pip install 'torch>=2.11'"),
        ("versions", {"triton": None}, "triton is missing", "pip install 'triton>=3.6'"),
        ("versions", {"triton": "3.7.1"}, "is made for Triton ==3.6.0, here is 3.7.1", "'triton==3.6.0'"),
        ("versions", {"numpy": "2.6.0"}, "takes NumPy <2.6,>=1.22, here is 2.6.0", "'numpy<2.6,>=1.22'"),
        ("versions", {"numba": None}, "steps on the CPU are plain torch", "pip install numba"),
        ("versions", {"error": "ImportError: x"}, "fusedcalib cannot be imported: ImportError", "mend"),
        ("compiler", {"path": None}, "no C compiler", "apt install gcc"),
        ("compiler", {"path": None, "CC": "icc"}, "CC is 'icc', which is not there", "unset CC"),
        ("compiler", {"Python.h": None}, "Python.h is not in /usr", f"python3.{sys.version_info.minor}-dev"),
        ("gpus", {"torch_sees": [], "cuda": None}, "torch is a build without CUDA", "pytorch.org"),
        ("gpus", {"torch_sees": []}, "does not see it with driver 580.1", "update the driver"),
        (
            "gpus",
            {"torch_sees": [{"name": "V100", "capability": "7.0"}]},
            "V100 has compute capability 7.0",
            "8.0",
        ),
        ("caches", {"triton_writable": False}, "/cache cannot be written", "TRITON_CACHE_DIR"),
        ("variables", {"TRITON_INTERPRET": "1"}, "kernels are interpreted", "unset"),
    ],
)
def test_a_problem_is_told_with_its_mend(section, changes, what, mend):
    (problem,) = problems(section, **changes)
    assert what in problem["what"]
    assert mend in problem["mend"]


@pytest.mark.parametrize("changes", [{"path": None}, {"Python.h": None}])
def test_without_a_gpu_nothing_is_launched_that_would_need_a_compiler(changes):
    found = copy.deepcopy(WELL)
    found["gpus"] = {"torch_sees": [], "driver_sees": None}
    found["versions"]["triton"] = None
    found["compiler"] |= changes
    assert not any(check(found) for check in env_problems.PROBLEMS)


@pytest.mark.parametrize(
    ("version", "required", "fits"),
    [
        ("3.6.0", "==3.6.0", True),
        ("3.6.0+git1", "==3.6.0", True),
        ("3.7.1", "==3.6.0", False),
        ("2.5.9", "<2.6,>=1.22", True),
        ("2.6", "<2.6,>=1.22", False),
        ("2.6.1", "<2.6,>=1.22", False),
        ("1.21", "<2.6,>=1.22", False),
        ("2.6.1", "<=2.6", True),
        ("2.6", ">2.6", False),
        ("9", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version, required, fits):
    assert env_problems.allowed(env_problems.numbers(version), required) is fits


def test_what_a_package_requires_is_read_from_its_metadata(monkeypatch):
    lines = ["numpy-stl>=1", "numpy<2.6,>=1.22", "triton==3.6.0; platform_system == 'Linux'"]
    monkeypatch.undo()
    monkeypatch.setattr(env_problems.importlib.metadata, "requires", lambda package: lines)
    assert env_problems.required("numba", "numpy") == "<2.6,>=1.22"
    assert env_problems.required("torch", "triton") == "==3.6.0"
    assert env_problems.required("torch", "scipy") == ""


# -- the command


def test_everything_is_told(capsys):
    assert command.main(["env"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name}:" in f"\n{said}" for name in (*env.PROBES, "problems"))
    assert f"python: {sys.version.split()[0]}" in said
    assert command.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {*env.PROBES, "problems"}
    assert not any("error" in found[name] for name in env.PROBES)
    assert set(found["backends"]["cpu"]) == set(env.DTYPES)


@pytest.mark.parametrize("broken", env.PROBES)
@pytest.mark.parametrize("error", [ImportError("no such thing"), SystemExit(3)])
def test_a_probe_that_fails_fails_nothing_else(broken, error, monkeypatch, capsys):
    def fails():
        raise error

    monkeypatch.setitem(env.PROBES, broken, fails)
    assert command.main(["env"]) == 0
    said = capsys.readouterr().out
    assert f"{broken}:\n  error: {type(error).__name__}: {error}" in said
    assert said.count("error:") == 1
    assert "problems:" in said


def test_a_compiler_is_found_as_triton_finds_it(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(env.shutil, "which", lambda name: {"clang": "/bin/clang"}.get(name))
    assert env.compiler()["path"] == "/bin/clang"
    monkeypatch.setenv("CC", "absent")
    assert env.compiler()["path"] is None
    monkeypatch.setattr(env.sysconfig, "get_paths", lambda scheme: {"include": "/nowhere"})
    assert env.compiler()["Python.h"] is None


def test_a_cache_is_where_triton_has_it(monkeypatch, tmp_path):
    triton = pytest.importorskip("triton")
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert env.caches()["triton"] == triton.knobs.cache.dir
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert env.caches()["triton"] == triton.knobs.cache.dir == str(tmp_path / ".triton" / "cache")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "a" / "b"))
    assert env.caches() == {"triton": str(tmp_path / "a" / "b"), "triton_writable": True, "numba": None}


def test_a_python_that_has_nothing_is_told_so():
    """-S: no site-packages."""
    script = [sys.executable, "-S", "-I", str(ROOT / "bench" / "cli.py"), "env", "--json"]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(script, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] is None
    assert "torch is missing" in found["problems"][0]["what"]
