"""Compiled loops on disk: the same bits from another process, nothing that others wrote, never an error."""

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
import time

import pytest

numba = pytest.importorskip("numba")

from numba.core.bytecode import FunctionIdentity  # noqa: E402
from numba.extending import intrinsic  # noqa: E402

from fusedcalib.executors.numba import cache, run  # noqa: E402
from fusedcalib.executors.numba.memory import set_double  # noqa: E402
from fusedcalib.executors.numba.values import INNER  # noqa: E402

posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes of POSIX")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FUSEDCALIB_CACHE", raising=False)
    return cache.folder()


@intrinsic
def apart(typing):
    """Keeps its caller a function of its own in the object code, as long ones are."""

    def codegen(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return numba.void(), codegen


@pytest.fixture
def loops():
    """`loops(value)`: what the loop of a kind leaves; `loops.compiled`: which were compiled."""

    class Loops:
        def __init__(self):
            self.compiled = []
            self.found = cache.on_disk(self.loop)

        def loop(self, value):
            self.compiled.append(value)
            value = float(value)

            @numba.njit(**INNER)
            def inner(address):
                apart()
                set_double(address, 0, value)

            @numba.cfunc(numba.void(numba.int64))
            def work(address):
                inner(address)

            return work

        def __call__(self, value):
            memory = ctypes.c_double()
            self.found(value).ctypes(ctypes.addressof(memory))
            return memory.value

    return Loops()


def kept(folder):
    return sorted(folder.glob("*.loop"))


def test_a_loop_is_compiled_once_for_all_processes(loops, folder):
    assert [loops(1), loops(1), loops(2), loops(2), loops(1)] == [1, 1, 2, 2, 1]
    assert loops.compiled == [1, 2]
    assert len(kept(folder)) == len(list(folder.iterdir())) == 2


def test_loops_that_numba_gave_one_name_are_told_apart(loops, monkeypatch):
    for value in (1, 2):  # as in two processes, each of which counts from 1
        monkeypatch.setattr(FunctionIdentity, "_unique_ids", itertools.count(10**6))
        loops(value)
    assert [loops(1), loops(2)] == [1, 2]


TRAIN = """
import hashlib, sys, torch, fusedcalib
if sys.argv[1] == "found":
    import numba
    numba.cfunc = None
torch.manual_seed(0)
p = torch.nn.Parameter(torch.randn(40, 517).bfloat16())
options = dict(centralize=True, max_row_norm=0.3, weight_decay=0.1, backend="numba")
opt = fusedcalib.AdamW([p], **options)
for _ in range(3):
    p.grad = torch.randn(p.shape).bfloat16()
    opt.step()
print(p.detach().double().sum().item(), hashlib.sha256(p.detach().view(torch.uint8).numpy()).hexdigest())
"""


def test_another_process_finds_it_and_steps_to_the_same_bits(folder, monkeypatch, capsys):
    run.kernel_for.cache_clear()  # so that this process compiles it, whatever it did before
    monkeypatch.setattr(sys, "argv", ["-c", "compiled"])
    exec(TRAIN, {})
    compiled = capsys.readouterr().out
    assert len(kept(folder)) == 1
    variables = {**os.environ, "PYTHONHASHSEED": "2"}  # here it is any other
    command = [sys.executable, "-c", TRAIN, "found"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert done.stdout == compiled


@pytest.mark.parametrize("fork", ["a child has the linker", "and links the first"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_processes_may_compile_and_find_at_the_same_time(loops, folder, fork):
    if fork == "a child has the linker":
        loops(0), loops(0)
    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            os._exit(int([loops(5), loops(6), loops(5), loops(6)] != [5, 6, 5, 6]))
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    before = loops.compiled.copy()
    assert [loops(5), loops(6)] == [5, 6]
    assert loops.compiled == before
    assert list(folder.iterdir()) == list(folder.glob("*.loop"))


@pytest.mark.parametrize("left", [0, 10, 100, -1])
def test_a_damaged_file_is_replaced(loops, folder, left):
    loops(1)
    (file,) = kept(folder)
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    assert [loops(1), loops(1)] == [1, 1]
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[-200] ^= 1
    file.write_bytes(changed)
    assert [loops(1), loops(1)] == [1, 1]
    assert loops.compiled == [1, 1, 1]


def test_the_file_of_another_loop_is_not_taken(loops, folder):
    loops(1)
    (first,) = kept(folder)
    loops(2)
    (second,) = {*kept(folder)} - {first}
    shutil.copy(second, first)
    assert loops(1) == 1
    assert loops.compiled == [1, 2, 1]


def test_a_loop_that_calls_what_is_not_there_is_not_linked(loops, folder, monkeypatch):
    loops(1)
    monkeypatch.setattr(cache.binding, "address_of_symbol", lambda name: None)
    assert loops(1) == 1
    assert loops.compiled == [1, 1]


@posix
@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize("which", ["folder", "file"])
def test_what_others_can_write_is_not_loaded(loops, folder, which, mode):
    loops(1)
    assert not folder.stat().st_mode & 0o077
    path = folder if which == "folder" else kept(folder)[0]
    path.chmod(path.stat().st_mode | mode)
    assert loops(1) == 1
    assert loops.compiled == [1, 1]


@posix
def test_what_another_user_owns_is_not_loaded(loops, monkeypatch):
    loops(1)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert loops(1) == 1
    assert loops.compiled == [1, 1]


def test_without_a_folder_loops_are_compiled(loops, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert [loops(1), loops(1)] == [1, 1]
    assert loops.compiled == [1, 1]


def test_a_write_that_fails_leaves_nothing(loops, folder, monkeypatch):
    def full(*paths):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert loops(1) == 1
    assert list(folder.iterdir()) == []


def test_it_can_be_switched_off(loops, folder, monkeypatch):
    loops(1)
    monkeypatch.setenv("FUSEDCALIB_CACHE", "0")
    assert [loops(1), loops(2)] == [1, 2]
    assert loops.compiled == [1, 1, 2]
    assert len(kept(folder)) == 1


def test_the_users_folder_is_used_where_numba_has_none(tmp_path, monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache.folder() == tmp_path / "cache" / "fusedcalib" / "loops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert os.name != "posix" or cache.folder() == tmp_path / ".cache" / "fusedcalib" / "loops"


def test_what_was_used_least_recently_goes(loops, folder, monkeypatch):
    monkeypatch.setattr(cache, "MOST", 4)
    for value in range(4):
        loops(value)
        for file in kept(folder):  # as if it were long ago
            os.utime(file, (time.time() - 100, file.stat().st_mtime - 100))
    (folder / "tmp-of-a-process-that-died").touch()
    os.utime(folder / "tmp-of-a-process-that-died", (0, 0))
    loops(0)
    loops(4)
    assert len(list(folder.iterdir())) == 3
    loops.compiled.clear()
    assert [loops(4), loops(0), loops(3)] == [4, 0, 3]
    assert loops.compiled == []


def test_a_kind_that_is_not_known_is_compiled(loops, folder):
    loops.found = cache.on_disk(lambda value: loops.loop(value[0]))
    assert [loops([1]), loops([1])] == [1, 1]
    assert loops.compiled == [1, 1]
    assert not folder.exists()


def test_loops_of_steps_are_kept():
    assert run.kernel_for.__wrapped__.__wrapped__.__module__ == run.__name__
    assert cache.MOST > 100
