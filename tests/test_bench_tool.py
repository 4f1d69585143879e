"""The benchmark tool: what it compares, what becomes of what breaks, what it writes. No speed is asserted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_subjects import CPU, LITTLE, fake_library, quiet_machine

from fusedcalib import __main__ as command
from fusedcalib.bench.measure import baselines, ceilings, choose, clocks, method, probe, rivals, timing
from fusedcalib.bench.report import tables
from fusedcalib.bench.report.results import SPEEDS, load

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [{"name": f"p{i}", "shape": list(shape)} for i, shape in enumerate(LITTLE.shapes)]
EAGER = ("--set", "backend=eager")  # nothing is compiled


@pytest.fixture
def fake(monkeypatch):
    return fake_library(monkeypatch)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """`bench(...)`: the tool on a little list; its exit status and what it wrote."""
    quiet_machine(monkeypatch)
    monkeypatch.setattr(timing, "BRACKET_TOLERANCE", float("inf"))
    monkeypatch.setattr(
        ceilings, "measure", lambda device: {"copy_gbs": 2.0, "stream_4r3w_gbs": 4.0, "how": ""}
    )
    monkeypatch.setattr(clocks, "repeats_for", lambda seconds: 1)
    (tmp_path / "little.json").write_text(json.dumps(SHAPES))

    def run(*more, against="fused,optimi"):
        out = tmp_path / "out.json"
        given = ["--shapes", str(tmp_path / "little.json"), "--rounds", "6", "--seconds", "20", *EAGER]
        code = command.main(["bench", *given, "--against", against, "--json", str(out), *more])
        return code, load(out) if out.exists() else None

    return run


def row_of(results, name, index=0):
    return next(row for row in results.cases[index].methods if row.name == name)


def has_no_number(row):
    keys = (*SPEEDS, "launches", "peak_extra_bytes", "kept")
    return row.ratio_to == {} and all(getattr(row, key) is None for key in keys)


# -- what is measured


def test_a_run_is_valid_and_complete(bench, fake, capsys):
    code, results = bench("--with", "centralize", "--optimizer", "AdamW", "--set", "lr=0.01", "betas=0.8,0.9")
    assert code == 0
    assert not results.incomplete
    (one,) = results.cases
    assert one.subject == "AdamW lr=0.01, betas=(0.8, 0.9), backend=eager"
    assert one.hyper["betas"] == [0.8, 0.9]
    names = ["torch_fused", "own_plain", "own_centralize", "eager_centralize_torch_fused"]
    assert [row.name for row in one.methods] == [*names, "eager_centralize_optimi"]
    assert [row.reason for row in one.methods] == [None] * 5
    own = row_of(results, "own_centralize")
    assert own.ratio_to["eager_centralize_torch_fused"].n == 6
    assert own.note == "backend eager"
    assert own.gbs == pytest.approx(1e-6 * 28 * LITTLE.params / own.wall_ms)
    assert own.pct_copy == pytest.approx(50 * own.gbs)
    assert own.pct_4r3w == pytest.approx(25 * own.gbs)
    assert own.launches is None
    assert fake.made[-1].defaults["betas"] == (0.8, 0.9)
    assert "optimi.AdamW 9.9" in row_of(results, "eager_centralize_optimi").note
    assert "| fusedcalib with GC" in capsys.readouterr().out.replace("│", "|")


def test_two_rules_are_two_cases_and_an_option_goes_to_those_that_have_it(bench):
    code, results = bench(
        "--optimizer", "sgd", "--optimizer", "AdamW", "--set", "momentum=0.9", against="foreach"
    )
    assert code == 0
    subjects = [one.subject for one in results.cases]
    assert subjects == ["SGD momentum=0.9, backend=eager", "AdamW backend=eager"]


@pytest.mark.parametrize("name", ["Lion", "SGD momentum", "Adan", "RMSprop centered momentum"])
def test_features_stand_around_any_rule(bench, name):
    """Of a rule that torch.optim has not, nothing is composed, and it is said."""
    against = "for-loop" if hasattr(torch.optim, method.SUBJECTS[name].cls) else "fused"
    code, results = bench(
        "--optimizer", name, "--with", "clip,noise,ema", "--set", "centralize=True", against=against
    )
    assert code == 0
    key = "clip+noise+centralize+ema"
    assert row_of(results, f"own_{key}").reason is None
    assert row_of(results, f"own_{key}").wall_ms > 0
    composed = row_of(results, f"eager_{key}_{choose.AGAINST[against]}")
    cls = method.SUBJECTS[name].cls
    if cls == "Lion":  # then all is compared with ours, of the same features
        assert results.cases[0].base == f"own_{key}"
    assert composed.reason == (None if against == "for-loop" else f"torch.optim has no {cls}")


def test_figure_and_table_are_of_what_was_measured(bench, tmp_path):
    pytest.importorskip("matplotlib")
    from fusedcalib.bench.report import plots

    code, results = bench("--plot", str(tmp_path / "plot.png"), against="fused,foreach")
    assert code == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert plots.compared(results, tmp_path / "again.png").exists()
    header, rows = tables.full_table(results.cases[0])
    assert header[2] == "/ torch fused (10-90 %)"
    assert [row[0] for row in rows] == ["fusedcalib", "torch fused", "torch foreach"]
    assert rows[1][2] == "1"


def test_memory_of_a_step_is_seen_on_a_cpu(capfd):
    params = [torch.ones(1000, requires_grad=True) for _ in range(3)]
    for param in params:
        param.grad = torch.ones(1000)
    peaks = {}
    for flag in ("foreach", "fused"):
        optimizer = torch.optim.AdamW(params, **{flag: True})
        optimizer.step()
        peaks[flag] = probe.measure(optimizer.step, CPU).peak_extra_bytes
    assert 12_000 <= peaks["foreach"] < 24_000  # a temporary of all parameters, at least
    assert peaks["fused"] < 100
    assert "profiler" not in capfd.readouterr().err


# -- what breaks


def test_a_missing_rival_is_null_with_its_reason(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "optimi", None)
    code, results = bench()
    assert code == 0
    row = row_of(results, "optimi")
    assert row.reason == "optimi is not installed"
    assert has_no_number(row)


def test_a_rival_that_breaks_when_imported_is_null(bench, monkeypatch):
    def broken(name):
        raise RuntimeError("built for another torch\nand more")

    monkeypatch.setattr(rivals.importlib, "import_module", broken)
    code, results = bench()
    assert code == 0
    reason = "optimi cannot be imported: RuntimeError: built for another torch..."
    assert row_of(results, "optimi").reason == reason


@pytest.mark.parametrize("step", [2, 6], ids=["gate", "timed"])
def test_a_rival_that_raises_costs_itself_only(bench, fake, step):
    fake.breaks = (step, RuntimeError("no such kernel"))
    code, results = bench()
    assert code == 0
    row = row_of(results, "optimi")
    assert row.reason == "RuntimeError: no such kernel"
    assert has_no_number(row)
    assert row_of(results, "own_plain").ratio_to["torch_fused"].n == 6
    assert "optimi" not in row_of(results, "own_plain").ratio_to


def test_no_number_without_a_right_result(bench, fake):
    fake.scale = 1.001
    code, results = bench()
    assert code == 0  # of others it is news
    assert "wrong result" in row_of(results, "optimi").reason
    assert has_no_number(row_of(results, "optimi"))


def test_our_own_wrong_result_is_a_failure(bench, monkeypatch, capsys):
    wrong = method.Method("own_plain", "fusedcalib", baselines.METHODS["own_plain"].make, method.GC)
    monkeypatch.setitem(baselines.METHODS, "own_plain", wrong)
    code, results = bench()
    assert code == 1
    assert has_no_number(row_of(results, "own_plain"))
    assert "FAILED: fusedcalib on little" in capsys.readouterr().err


@pytest.mark.parametrize("step", [2, 9], ids=["gate", "timed"])
def test_interrupted_leaves_what_was_measured(bench, fake, step, capsys):
    """A case under way is there as far as its rounds went; one that was not yet timed is not."""
    fake.breaks = (step, KeyboardInterrupt())
    code, results = bench("--optimizer", "SGD", "--optimizer", "AdamW", "--optimizer", "Lion")
    assert code == 130
    assert results.incomplete is True
    assert [one.subject.split()[0] for one in results.cases] == ["SGD", "AdamW"][: 1 + (step == 9)]
    if step == 9:
        assert results.cases[1].incomplete is True
        assert 1 <= row_of(results, "own_plain", 1).ratio_to["torch_fused"].n < 6
    assert "incomplete" in capsys.readouterr().out


def test_no_case_begins_after_the_time(bench, capsys):
    code, results = bench(
        "--optimizer", "SGD", "--optimizer", "Lion", "--seconds", "0.001", against="foreach"
    )
    assert code == 0
    assert len(results.cases) == 1
    assert results.left_out == ["little Lion backend=eager fp32"]
    assert "--seconds" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="signals of a process group are POSIX's")
def test_an_interrupt_on_a_bare_machine_leaves_time_to_save(tmp_path):
    """Ctrl-C reaches bench/run.py and the command that it runs, which takes a while."""
    child = (
        "import sys, time\ntry:\n    print('ready', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.6); open(sys.argv[1], 'w').close(); sys.exit(130)"
    )
    parent = (
        "import os, sys; sys.path.append(sys.argv[1]); import run;"
        "sys.exit(run.run([sys.executable, '-c', *sys.argv[2:]], dict(os.environ)))"
    )
    saved = tmp_path / "saved"
    command = [sys.executable, "-c", parent, str(ROOT / "bench"), child, str(saved)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert saved.exists()
