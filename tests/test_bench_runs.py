"""The benchmark at work: cases, a GPU that is none, the suite, the training."""

import json
import os
import subprocess
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from bench_subjects import CPU, LITTLE, quiet_machine

from fusedcalib.bench.env import machine
from fusedcalib.bench.measure import baselines, case, ceilings, clocks, host, method, rivals, timing
from fusedcalib.bench.models import shapes
from fusedcalib.bench.report import results, tables
from fusedcalib.bench.repository import digits, goals, suite

ROOT = Path(__file__).resolve().parents[1]

# -- cases ------------------------------------------------------------------------------------


METHODS = ("torch_fused", "own_gc", "wrong", "absent")
QUICK = clocks.Effort(rounds=2, seconds=60, warmup=1)


@pytest.fixture
def measured(monkeypatch):
    """A case of the little list, one method of which is wrong and one missing."""
    quiet_machine(monkeypatch)
    monkeypatch.setitem(shapes.LISTS, "little", LITTLE)
    wrong = method.Method("wrong", "wrong", baselines.METHODS["torch_fused"].make, method.GC)
    absent = method.Method("absent", "absent", rivals.Rival("absent", "no_such_module", {}).make)
    monkeypatch.setitem(baselines.METHODS, "wrong", wrong)
    monkeypatch.setitem(baselines.METHODS, "absent", absent)
    return lambda dtypes="fp32": case.run(case.Case("little", METHODS, dtypes), CPU, QUICK)


def row_of(measured, name):
    return next(row for row in measured.methods if row.name == name)


def test_no_speed_without_a_right_result(measured):
    one = measured()
    assert row_of(one, "own_gc").wall_ms > 0
    assert row_of(one, "own_gc").ratio_to["torch_fused"].n == 2
    assert row_of(one, "own_gc").max_err_vs_fp64 > 0
    for name, reason in (("wrong", "wrong result"), ("absent", "no_such_module is not installed")):
        row = row_of(one, name)
        assert reason in row.reason
        assert row.wall_ms is None
        assert row.ratio_to == {}


def test_wide_state_is_for_those_who_take_it(measured):
    one = measured("bf16+fp32-state")
    assert row_of(one, "own_gc").reason is None
    assert "another type" in row_of(one, "torch_fused").reason


def test_extras_are_gated_timed_and_given_new_gradients(measured, monkeypatch):
    """Every gradient that is clipped has the norm that it came with, and is not what a step left."""
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def watched(params, *args, **kwargs):
        norms.append(float(torch.stack([p.grad.norm() for p in params]).norm()))
        return clip(params, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    monkeypatch.setattr(clocks, "repeats_for", lambda seconds: 1)
    methods = ("torch_fused", "own_plain", "eager_chain", "own_chain")
    one = case.run(case.Case("little", methods, extras="chain"), CPU, QUICK)
    assert (one.extras, one.bytes_per_param) == ("chain", 40)
    assert [row.reason for row in one.methods] == [None] * 4
    assert [row.bytes_per_param for row in one.methods] == [28, 28, 40, 40]
    own = row_of(one, "own_chain")
    assert own.ratio_to["eager_chain"].n == own.ratio_to["own_plain"].n == 2
    assert own.options == {"gc": True, "clip": 1.0, "noise": 0.01, "ema": 0.999}
    timed = norms[-QUICK.rounds :]
    assert min(timed) > 5
    assert max(timed) == min(timed)


def test_a_wrong_extra_has_no_speed(measured, monkeypatch):
    wrong = replace(baselines.METHODS["own_noise"], make=baselines.METHODS["own_plain"].make)
    monkeypatch.setitem(baselines.METHODS, "own_noise", wrong)
    one = case.run(case.Case("little", ("torch_fused", "own_noise"), extras="noise"), CPU, QUICK)
    assert "wrong noise" in row_of(one, "own_noise").reason
    assert row_of(one, "own_noise").wall_ms is None


class FakeEvent:
    """A CUDA event on a clock that ticks once for every event."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.now += 1.0
        self.at = FakeEvent.now

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def fake_gpu(monkeypatch):
    """The GPU's path through the code, on the CPU: what it calls of torch.cuda is replaced."""
    monkeypatch.setattr(machine, "on_gpu", lambda device: True)
    stand_ins = {
        "Event": FakeEvent,
        "_sleep": lambda cycles: None,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device: types.SimpleNamespace(clock_rate=1_980_000),
        "get_device_capability": lambda device: (9, 0),
        "get_device_name": lambda device: "Fake GPU",
        "memory_allocated": lambda device: 1000,
        "max_memory_allocated": lambda device: 1500,
        "reset_peak_memory_stats": lambda device: None,
        "empty_cache": lambda: None,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    stream = torch.ones(8)
    monkeypatch.setattr(ceilings, "stream_of", lambda device, count, reads: stream.sin)
    monkeypatch.setattr(ceilings, "GPU_ELEMENTS", 64)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)
    monkeypatch.setattr(host, "TENSORS", 20)


@pytest.mark.filterwarnings("ignore")  # the profiler says that there is no GPU
def test_the_path_of_a_gpu(measured, fake_gpu, monkeypatch):
    from fusedcalib.bench.measure import probe

    one = measured()
    row = row_of(one, "own_gc")
    assert (one.clock, one.flush) == ("device", "write")
    assert row.device_ms_median == pytest.approx(1.0)  # one tick for each step
    assert row.peak_extra_bytes == 500
    assert row.launches is None  # the profiler saw none, and none is not 0
    data = results.assemble(machine.describe(CPU), ceilings.measure(CPU, 2), [one])
    data.host = host.measure(CPU, rounds=1, seconds=1)
    data.goals = goals.judge(data)
    results.read(json.loads(json.dumps(asdict(data))))
    assert data.device["name"] == "Fake GPU"
    header, cells = tables.full_table(one)
    assert header[-3:] == ["wall ms", "host µs", "launches"]
    assert [(row[0], row[1], row[-1]) for row in cells][-1] == ("fusedcalib with GC", "1", "-")
    moved = 28 * LITTLE.params / 1e-3 * 1e-9
    (copied,) = (r.pct_copy for r in one.methods if r.name == "own_gc")
    assert copied == pytest.approx(100 * moved / data.ceil["copy_gbs"])
    chain = case.run(
        case.Case("little", ("torch_fused", "eager_chain", "own_chain"), extras="chain"), CPU, QUICK
    )
    assert row_of(chain, "own_chain").ratio_to["eager_chain"].n == QUICK.rounds
    assert probe.queue(probe.Probe(1e3, timing.QUEUE_LIMIT + 1, 0), flush=False) is None
    assert probe.queue(probe.Probe(1e6, 1, 0), flush=False) is None


# -- training and the job ---------------------------------------------------------------------


def test_curves_that_part_are_refused():
    losses = [2.0] * 20
    runs = {name: [digits.Run(losses, [50.0] * 20)] for name in ("torch", "plain", "gc")}
    assert digits.summary(runs).max_diff_first_epoch == 0
    for wrong in (2.0002, float("nan")):
        runs["plain"] = [digits.Run([wrong, *losses[1:]], [50.0] * 20)]
        with pytest.raises(digits.CurvesDifferError, match="first epoch"):
            digits.summary(runs)


def test_same_seed_same_training_and_a_wrong_rate_is_seen():
    pytest.importorskip("sklearn")
    data = digits.load(CPU)

    def losses(lr):
        with timing.one_thread():
            return digits.train(lambda p: torch.optim.AdamW(p, lr=lr), 100, data, epochs=1).losses

    first, again, other = losses(digits.LR), losses(digits.LR), losses(1.0001 * digits.LR)
    assert first == again
    assert max(abs(a - b) for a, b in zip(first, other, strict=True)) > digits.FIRST_EPOCH_TOLERANCE


def test_fusedcalib_retraces_torch_for_an_epoch():
    pytest.importorskip("sklearn")
    data = digits.load(CPU)
    makers = digits.optimizers()
    with timing.one_thread():
        a, b, gc = (digits.train(makers[name], 101, data, epochs=1) for name in digits.NAMES)
    gap = max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))
    assert gap <= digits.FIRST_EPOCH_TOLERANCE
    assert gc.losses[0] == a.losses[0]
    assert gc.losses[-1] != a.losses[-1]


def test_suite_keeps_what_it_has_when_a_case_breaks(measured, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ceilings, "measure", lambda device: {"copy_gbs": 1.0, "how": "by hand"})
    monkeypatch.setattr(host, "measure", lambda device: [])
    monkeypatch.setattr(suite, "Effort", lambda *_: QUICK)
    good = case.Case("little", ("torch_fused", "own_gc"))
    broken = case.Case("little", ("torch_fused",), "no-such-type")
    assert suite._suite((good,), CPU, tmp_path / "good", 60) == 0
    assert suite._suite((broken, good), CPU, tmp_path / "broken", 60) == 1
    (file,) = (tmp_path / "broken").iterdir()
    written = results.load(file)
    assert [one.list for one in written.cases] == ["little"]
    assert "KeyError" in written.failures[0].error
    assert suite._suite((good,), CPU, tmp_path / "late", -1) == 1
    assert "left out for want of time" in capsys.readouterr().out


# -- memory streams ---------------------------------------------------------------------------


def run_python(code, **variables):
    """In a process of its own: Triton's interpreter is chosen when a kernel is decorated."""
    pytest.importorskip("triton")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.skipif(torch.version.hip is not None, reason="this Triton has no NVIDIA assembler")
def test_triton_stream_compiles_to_wide_accesses():
    run_python(
        "from triton import compile; from triton.compiler import ASTSource;"
        "from triton.backends.compiler import GPUTarget;"
        "from fusedcalib.bench.measure.stream_triton import BLOCK, _kernel;"
        "types = {'arrays': ('*fp32',) * 4, 'share': 'fp32', 'BLOCK': 'constexpr'};"
        "facts = {(0, i): [['tt.divisibility', 16]] for i in range(4)};"
        "source = ASTSource(_kernel, types, constexprs={(2,): BLOCK}, attrs=facts);"
        "ptx = compile(source, target=GPUTarget('cuda', 90, 32)).asm['ptx'];"
        "assert ptx.count('ld.global') == ptx.count('ld.global.v4') > 0, ptx",
        TRITON_INTERPRET="0",
    )


def test_triton_stream_computes_what_it_says():
    run_python(
        "import torch; from fusedcalib.bench.measure import ceilings;"
        "from fusedcalib.bench.measure.stream_triton import stream;"
        "x = [torch.full((8192,), float(v)) for v in range(5)]; stream(*x); ceilings._check(x)",
        TRITON_INTERPRET="1",
    )


def test_numba_stream_computes_what_it_says():
    pytest.importorskip("numba")
    for reads in (2, 7):
        ceilings.stream_of(CPU, 1000, reads)
    with pytest.raises(RuntimeError, match="3 writes computed a wrong result"):
        ceilings._check([torch.zeros(4)] * 4)
