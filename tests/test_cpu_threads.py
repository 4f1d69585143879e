"""Work on threads: on each once, on torch's own or Python's, also after a fork."""

import ctypes
import os
import threading

import pytest
import torch

import fusedcalib
from fusedcalib.executors.numba import run as cpu_threads
from fusedcalib.executors.numba.run import on_threads, threads_for

WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
POOLS = {"python": lambda: None}
if cpu_threads._openmp():
    POOLS["openmp"] = cpu_threads._openmp


@pytest.fixture(params=POOLS)
def pool(request, monkeypatch):
    monkeypatch.setattr(cpu_threads, "_openmp", POOLS[request.param])
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_thread_works_once(pool, threads):
    together = threading.Barrier(threads, timeout=30)  # breaks unless all are in it at once
    given = []

    @WORK
    def work(data):
        together.wait()
        given.append(data)

    on_threads(work, 1234, threads)
    assert given == [1234] * threads


@pytest.mark.parametrize(
    ("shares", "elements", "threads"),
    [(100, 1 << 20, 4), (3, 1 << 20, 3), (100, 1000, 1), (100, 2 * cpu_threads.WORTH_A_THREAD, 2), (0, 0, 1)],
)
def test_no_more_threads_than_the_work_is_worth(pool, shares, elements, threads):
    assert threads_for(shares, elements) == threads


def train(params):
    optimizer = fusedcalib.AdamW(params, backend="numba", centralize=True)
    for _ in range(3):
        for p in params:
            p.grad = torch.cos(p.detach())
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


def parameters():
    shapes = [(300, 500), (7,), (4000, 33), (64, 3, 3, 3), (200000,)]
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_the_number_of_threads_changes_no_bit(pool):
    pytest.importorskip("numba")
    many = train(parameters())
    torch.set_num_threads(1)
    assert torch.equal(many, train(parameters()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_process_has_threads_of_its_own(pool):
    """OpenMP would wait forever for threads that only the parent has."""
    on_threads(WORK(lambda data: None), 0, 4)
    child = os.fork()
    if child == 0:
        together = threading.Barrier(4, timeout=30)
        on_threads(WORK(lambda data: together.wait()), 0, 4)
        os._exit(1 if together.broken or cpu_threads._openmp() else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
