"""The set-up behind bench/run.py and tests/run.py, with the machine around it replaced."""

import ast
import hashlib
import io
import os
import re
import subprocess
import sys
import time
import urllib.request
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from runner import ROOT, bootstrap

CPU_TORCH = "torch==2.13.0+cpu"


def sentence(function, *arguments) -> str:
    """What `function` gives up with: one line, for Python to print before it exits with 1."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert isinstance(stop.value.code, str)
    assert re.fullmatch(r"fusedcalib: [^\n]+", stop.value.code)
    return stop.value.code


# Making an environment


class Machine:
    """A bare Linux machine: `fails` says which commands fail, `ran` is what was run."""

    def __init__(self, root: Path):
        self.root, self.ran, self.kind = root, [], ""
        self.fails = lambda command: False

    def run(self, *command: str):
        self.ran.append(" ".join(command))
        error = "noise\nERROR: No matching distribution found\n"
        return subprocess.CompletedProcess(command, int(self.fails(self.ran[-1])), "", error)

    def create(self, folder, **_):
        python = bootstrap.python_in(Path(folder))
        python.parent.mkdir()
        python.touch()

    def installs(self) -> list[str]:
        return [command for command in self.ran if "--only-binary" in command]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    machine = Machine(tmp_path / "repository")
    machine.root.mkdir()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(bootstrap, "ROOT", machine.root)
    monkeypatch.setattr(bootstrap, "missing", lambda *names: ["torch"])
    monkeypatch.setattr(bootstrap, "gpu", lambda: machine.kind)
    monkeypatch.setattr(bootstrap, "run", machine.run)
    monkeypatch.setattr(venv, "create", machine.create)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return machine


def made(machine: Machine) -> Path:
    """Set up; the folder that the Python is in."""
    python, variables = bootstrap.prepare("pytest")
    assert variables["PYTHONPATH"] == str(machine.root)
    return Path(python).parents[1]


def test_a_python_that_has_everything_is_used_as_it_is(machine, monkeypatch):
    monkeypatch.setattr(bootstrap, "missing", lambda *names: [])
    monkeypatch.setenv("PYTHONPATH", "theirs")
    python, variables = bootstrap.prepare("pytest")
    assert python == sys.executable
    assert variables["PYTHONPATH"] == os.pathsep.join([str(machine.root), "theirs"])
    assert not machine.ran
    assert not (machine.root / ".venv").exists()


def test_the_second_time_nothing_is_run_or_written(machine, monkeypatch):
    assert made(machine) == machine.root / ".venv"
    first = list(machine.ran)
    assert first
    monkeypatch.delattr(bootstrap, "writable_folder")
    assert made(machine) == machine.root / ".venv"
    assert machine.ran == first


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_one_of_two_set_ups_at_the_same_time_waits(machine, monkeypatch):
    create = machine.create
    monkeypatch.setattr(venv, "create", lambda *a, **k: (time.sleep(0.2), create(*a, **k)))
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(made, [machine, machine]))
    assert folders == [machine.root / ".venv"] * 2
    assert len(machine.installs()) == 3


def test_torch_comes_first_and_stays(machine):
    made(machine)
    torch, rest, frameworks = machine.installs()
    assert torch.endswith(CPU_TORCH)
    for later in (rest, frameworks):  # without the pin pip may put another torch in its place
        assert f" {CPU_TORCH} " in later
    assert "triton==3.7.1" in rest
    assert "numba" in rest
    assert frameworks.endswith(f"{CPU_TORCH} {' '.join(bootstrap.FRAMEWORKS)}")


def test_frameworks_that_cannot_be_had_are_done_without(machine, capsys):
    machine.fails = lambda command: "accelerate" in command
    assert made(machine) == machine.root / ".venv"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "set-up: not installed (No matching distribution found): tests that need them are skipped"
    machine.ran.clear()
    made(machine)
    assert not machine.ran


@pytest.mark.parametrize("change", ["requirements", "version", "interpreter", "no python"])
def test_an_environment_that_no_longer_fits_is_made_again(machine, monkeypatch, change):
    folder = made(machine)
    (folder / "old").touch()
    if change == "requirements":
        machine.kind = "nvidia"
    elif change == "version":
        monkeypatch.setattr(sys, "version_info", (3, 99, 0))
    elif change == "interpreter":
        monkeypatch.setattr(sys, "_base_executable", "/another/python", raising=False)
    else:
        bootstrap.python_in(folder).unlink()
    machine.ran.clear()
    assert made(machine) == folder
    assert machine.installs()
    assert not (folder / "old").exists()


@pytest.mark.parametrize("inside", [False, True], ids=["", "run by its own Python"])
@pytest.mark.parametrize("asked", ["", "nvidia"], ids=["as before", "as cut short"])
def test_a_set_up_that_was_cut_short_is_not_believed(machine, monkeypatch, asked, inside):
    def interrupt(command):
        if "pytest" in command:
            raise KeyboardInterrupt
        return False

    made(machine)  # a whole one, which then has to be made again
    machine.kind, machine.fails = "nvidia", interrupt
    with pytest.raises(KeyboardInterrupt):
        made(machine)
    if inside:  # what it has may look like enough
        monkeypatch.setattr(bootstrap, "missing", lambda *names: [])
        monkeypatch.setattr(sys, "prefix", str(machine.root / ".venv"))
    machine.ran.clear()
    machine.kind, machine.fails = asked, lambda command: False
    assert made(machine) == machine.root / ".venv"
    assert len(machine.installs()) == 3


@pytest.mark.parametrize("obstacle", ["not writable", "somebody else's"])
def test_the_cache_folder_serves_where_the_repository_cannot(machine, tmp_path, obstacle):
    place = machine.root / ".venv"
    if obstacle == "not writable":
        place.touch()
    else:
        place.mkdir()
        (place / "pyvenv.cfg").touch()
    before = list(machine.root.rglob("*"))
    assert tmp_path / "cache" in made(machine).parents
    assert list(machine.root.rglob("*")) == before
    machine.ran.clear()
    made(machine)
    assert not machine.ran


def test_no_place_for_an_environment(machine, tmp_path):
    (machine.root / ".venv").touch()
    (tmp_path / "cache").touch()
    assert "writable" in sentence(made, machine)


def test_the_cpu_index_is_asked_only_after_what_pip_is_set_to(machine):
    machine.fails = lambda command: CPU_TORCH in command and bootstrap.CPU_INDEX not in command
    sentence(made, machine)  # the second install fails too; here only the first matters
    assert [bootstrap.CPU_INDEX in command for command in machine.installs()] == [
        False,
        True,
        False,
    ]


def test_without_a_cpu_build_there_is_no_torch(machine):
    machine.fails = lambda command: "--only-binary" in command
    assert "No matching distribution found" in sentence(made, machine)
    assert len(machine.installs()) == 2
    assert all(command.endswith(CPU_TORCH) for command in machine.installs())


# A Python in parts


def test_pip_of_the_running_python_stands_in_for_ensurepip(machine):
    machine.fails = lambda command: "ensurepip" in command
    made(machine)
    assert [f"--python {machine.root}" in command for command in machine.ran[:2]] == [False, True]
    assert len(machine.ran) == 5


CONTENT = b"a wheel"
PAGE = f'<a href="../../files/{bootstrap.PIP}#sha256=0">'


@pytest.mark.parametrize(
    ("web", "problem"),
    [
        ({"i/pip/": PAGE, f"files/{bootstrap.PIP}": CONTENT}, None),
        ({"i/pip/": PAGE, f"files/{bootstrap.PIP}": b"another"}, "not the file it should be"),
        ({"i/pip/": "<a href='pip-1.0.whl'>"}, "no such page"),
        ({}, "no such page"),
    ],
)
def test_pip_is_downloaded_where_there_is_none(machine, monkeypatch, web, problem):
    def urlopen(url, timeout):
        found = web.get(url.removeprefix("https://mirror.test/"))
        if found is None:
            raise OSError("no such page")
        return io.BytesIO(found.encode() if isinstance(found, str) else found)

    machine.fails = lambda command: "ensurepip" in command or "--python" in command
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(bootstrap, "PIP_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.test/i/")
    if problem:
        assert problem in sentence(made, machine)
        return
    wheel = made(machine) / bootstrap.PIP
    assert wheel.read_bytes() == CONTENT
    assert f"{wheel}/pip install --no-index {wheel}" in machine.ran[2]


def test_no_venv_module(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "venv", None)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    said = sentence(bootstrap.main, lambda arguments: made(machine))
    assert "'venv'" in said
    assert "apt install python3-venv" in said


def test_an_old_python_is_told():
    code = "import runpy, sys; sys.version_info = (3, 9, 0); runpy.run_path(sys.argv[1])"
    command = [sys.executable, "-c", code, str(ROOT / "tests" / "run.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"fusedcalib: .* is too old: use Python 3.10 or newer\n", done.stderr)


@pytest.mark.parametrize("path", ["bench/bootstrap.py", "bench/cli.py", "bench/run.py", "tests/run.py"])
def test_an_old_python_can_read_that_far(path):
    ast.parse((ROOT / path).read_text(encoding="utf-8"), feature_version=(3, 6))
