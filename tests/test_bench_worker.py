"""Work in another process that hangs, crashes, raises; and the suite over it."""

import signal

import pytest
from bench_subjects import CPU, LITTLE, crash, hang

from fusedcalib.bench.measure import method
from fusedcalib.bench.measure.case import Case
from fusedcalib.bench.measure.worker import LostError, Worker, WorkError
from fusedcalib.bench.report import results
from fusedcalib.bench.repository import suite


def test_what_is_lost_is_replaced_and_says_where_it_was(capfd):
    one = Worker(1.0)
    with pytest.raises(WorkError, match="ValueError: invalid literal"):
        one.call(int, "x")
    assert one.call(int, "7") == 7
    with pytest.raises(LostError, match="stopped after 1 s"):
        one.call(hang)
    assert "in hang" in capfd.readouterr().err
    assert one.call(int, "8") == 8
    with pytest.raises(KeyboardInterrupt):
        one.call(signal.raise_signal, signal.SIGINT)
    one.close()


def test_a_case_that_crashes_costs_that_case_only(monkeypatch, tmp_path, capfd):
    for measured in ("ceilings", "host"):
        monkeypatch.setattr(suite.Run, measured, lambda self: None)
    broken = Case(LITTLE, (method.Method("own_gc", "by hand", crash, method.GC),))
    assert suite._suite((broken, Case(LITTLE, ("apex",))), CPU, tmp_path, 600, Worker(60.0)) == 1
    (file,) = tmp_path.iterdir()
    written = results.load(file)
    assert "its process crashed, exit status -6" in written.failures[0].error
    assert [case.list for case in written.cases] == ["little"]
    assert "in crash" in capfd.readouterr().err
