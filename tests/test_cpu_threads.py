"""Tiles over threads: each once, whatever goes wrong, also after a fork."""

import os
import threading

import pytest
import torch

from fusedcalib.cpu_threads import spread_over_threads

MANY = 1 << 20  # elements: worth every thread


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("tiles", [1, 3, 16, 17, 1000])
def test_every_tile_is_run_once(four_threads, tiles):
    counts = [0] * tiles

    def run(first, last):
        for tile in range(first, last):
            counts[tile] += 1

    spread_over_threads(run, tiles, MANY)
    assert counts == [1] * tiles


def test_several_threads_work(four_threads):
    barrier = threading.Barrier(4, timeout=30)  # breaks unless four threads are in it at once
    spread_over_threads(lambda first, last: barrier.wait() if first < 100 else None, 400, MANY)
    assert not barrier.broken


def test_little_work_stays_here(four_threads):
    seen = set()
    spread_over_threads(lambda first, last: seen.add(threading.get_ident()), 100, 1000)
    assert seen == {threading.get_ident()}


def test_an_error_on_any_thread_is_raised(four_threads):
    def run(first, last):
        raise ValueError(first)

    with pytest.raises(ValueError, match=r"0|4"):
        spread_over_threads(run, 16, MANY)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_process_has_threads_of_its_own(four_threads):
    spread_over_threads(lambda first, last: None, 16, MANY)
    child = os.fork()
    if child == 0:
        done = []
        spread_over_threads(lambda first, last: done.append(last - first), 16, MANY)
        os._exit(0 if sum(done) == 16 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
