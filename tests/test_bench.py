"""The benchmark: its lists, its statistics, its gate, its files. No speed is asserted here."""

import copy
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from fusedcalib.bench import (
    baselines,
    case,
    ceilings,
    digits,
    gate,
    goals,
    host,
    job,
    load,
    machine,
    readme,
    report,
    results,
    shapes,
    suite,
    tables,
    timing,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
LITTLE = shapes.ParamList("little", ((8, 5), (7,), (4, 2, 3, 3), (8, 5)))


# -- parameter lists --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "params"),
    [
        ("gpt2-124m", 148, 124_439_808),
        ("llama3-8b-layer-x1", 9, 218_112_000),
        ("llama3-8b-layer-x4", 36, 872_448_000),
        ("resnet50", 161, 25_557_032),
        ("small-1000", 1000, 10_739_200),
        ("1000x1024", 1000, 1_024_000),
        ("10000x64", 10_000, 640_000),
        ("split-10", 10, 100_000_000),
        ("split-1000", 1000, 100_000_000),
        ("split-10000", 10_000, 100_000_000),
        ("single-2^28", 1, 2**28),
    ],
)
def test_list_has_the_published_counts(name, tensors, params):
    spec = shapes.get(name)
    assert (spec.tensors, spec.params) == (tensors, params)


def test_cpu_list_is_large_enough_to_measure():
    assert shapes.get("gpt2-small-cpu").params >= 25_000_000


def test_unknown_list_is_named():
    with pytest.raises(KeyError, match="no-such-list"):
        shapes.get("no-such-list")


def test_build_offsets_views_and_separates_groups():
    spec = shapes.ParamList("views", ((4, 4), (4, 4)), group_each=True, offset=1)
    params = shapes.build(spec, CPU)
    for param in params:
        assert param.data_ptr() % 16 == 4
        assert param.grad.data_ptr() % 16 == 4
        assert param.is_leaf
    assert len(torch.optim.SGD(baselines.groups_of(spec, params)).param_groups) == 2


def test_every_case_of_the_suite_names_what_exists():
    for one in (*suite.GPU_CASES, *suite.GPU_COMPILED, *suite.CPU_CASES):
        assert shapes.get(one.list).tensors
        assert set(one.methods) <= set(baselines.METHODS)
        assert one.dtypes in case.DTYPES


# -- statistics -------------------------------------------------------------------------------


def sampler_of(values):
    return iter(values).__next__


def quiet_machine(monkeypatch):
    monkeypatch.setattr(timing.Load, "of_others", lambda self: 0.0)
    monkeypatch.setattr(load, "GLANCE", 0.0)


def test_ratio_is_taken_within_a_round_and_not_of_medians(monkeypatch):
    quiet_machine(monkeypatch)
    drift = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    rounds = timing.interleave(
        {"a": sampler_of([3 * d for d in drift]), "b": sampler_of(drift)}, rounds=6, seconds=60
    )
    spread = rounds.ratio("a", "b")
    assert (spread.median, spread.p10, spread.p90, spread.n) == (3, 3, 3, 6)
    assert rounds.ratio("b", "a").median == pytest.approx(1 / 3)
    assert rounds.ratio("a", "missing") is None


def test_percentiles_are_of_the_ratios():
    spread = timing.Spread.of([float(value) for value in range(11)])
    assert (spread.median, spread.p10, spread.p90, spread.n) == (5, 1, 9, 11)
    assert timing.Spread.of([]) is None


def test_order_rotates():
    order = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    timing.interleave(samplers, rounds=3, seconds=60)
    assert "".join(order) == "abcbcacab"


def test_disturbed_samples_are_dropped_and_counted(monkeypatch):
    quiet_machine(monkeypatch)
    # Two anchors a round: apart by 20 % in the second of seven rounds, which must not count.
    anchors = [1.0, 1.0, 1.0, 1.2, *[1.0] * 10]
    times = [2.0, 50.0, *[2.0] * 5]
    rounds = timing.interleave(
        {"T": sampler_of(anchors), "m": sampler_of(times)}, rounds=7, seconds=60, anchor="T"
    )
    spread = rounds.ratio("m", "T")
    assert (rounds.kept("m"), rounds.dropped("m")) == (6, 1)
    assert (spread.median, spread.p90, spread.n, spread.disturbed) == (2, 2, 6, False)


def test_a_busy_machine_is_said_to_be_one(monkeypatch):
    monkeypatch.setattr(timing.Load, "of_others", lambda self: 0.5)
    samplers = {"T": sampler_of([1.0] * 20), "m": sampler_of([2.0] * 10)}
    start = time.monotonic()
    rounds = timing.interleave(samplers, rounds=6, seconds=0.4, anchor="T")
    assert rounds.ratio("m", "T").disturbed
    assert rounds.kept("m") == 0
    assert 0.2 <= time.monotonic() - start < 5  # it waited for quiet, and not for ever


def test_a_round_begins_when_the_machine_is_quiet(monkeypatch):
    monkeypatch.setattr(timing.Load, "of_others", sampler_of([0.5, 0.5, *[0.0] * 10]))
    samplers = {"T": sampler_of([1.0] * 4), "m": sampler_of([2.0] * 2)}
    rounds = timing.interleave(samplers, rounds=2, seconds=60, anchor="T")
    assert rounds.kept("m") == 2


def test_time_limit_ends_the_rounds():
    samplers = {"a": lambda: 1.0}
    assert timing.interleave(samplers, rounds=10**9, seconds=0.01).kept("a") < 10**7


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell its load")
def test_own_work_is_no_load_of_others(monkeypatch):
    monkeypatch.setattr(timing.Load, "_read", sampler_of([(10.0, 5.0, 20.0), (12.0, 6.5, 24.0)]))
    assert timing.Load().of_others() == pytest.approx((2.0 - 1.5) / 4.0)


# -- the gate ---------------------------------------------------------------------------------


def judge(make, gc, dtype=torch.float32):
    params = shapes.build(LITTLE, CPU, dtype)
    return gate.check(LITTLE, {"it": (gc, params, make(params))}, baselines.HYPER)["it"]


def torch_adamw(**changed):
    return lambda params: torch.optim.AdamW(params, **{**baselines.HYPER, **changed}).step


def eager_gc(params):
    return baselines.METHODS["eager_gc_fused"].make(LITTLE, params).step


def own_gc(params):
    return baselines.METHODS["own_gc"].make(LITTLE, params).step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "gc"), [(torch_adamw(), False), (eager_gc, True), (own_gc, True)])
def test_gate_lets_right_methods_through(make, gc, dtype):
    verdict = judge(make, gc, dtype)
    assert verdict.passed, verdict
    assert verdict.max_err > 0


@pytest.mark.parametrize(
    ("make", "gc"),
    [
        (torch_adamw(), True),
        (eager_gc, False),
        (torch_adamw(lr=1.001e-3), False),
        (torch_adamw(betas=(0.9, 0.99)), False),
        (torch_adamw(betas=(0.89, 0.999)), False),
        (torch_adamw(weight_decay=0.0), False),
        (torch_adamw(eps=1e-6), False),
        (lambda params: lambda: None, False),
        (lambda params: lambda: params[0].data.fill_(float("nan")), False),
    ],
    ids=["no-gc", "gc", "lr", "beta2", "beta1", "decay", "eps", "idle", "nan"],
)
def test_gate_refuses_wrong_methods(make, gc):
    assert not judge(make, gc).passed


def test_gate_refuses_a_method_that_raises():
    def make(params):
        def step():
            raise RuntimeError("no such kernel")

        return step

    verdict = judge(make, False)
    assert not verdict.passed
    assert verdict.reason == "RuntimeError: no such kernel"


def test_gate_sees_one_wrong_element():
    def make(params):
        optimizer = torch.optim.AdamW(params, **baselines.HYPER)

        def step():
            optimizer.step()
            params[2].data.view(-1)[-1] += 2e-5

        return step

    assert not judge(make, False).passed


@pytest.mark.parametrize("whole_list", [True, False])
def test_what_is_compiled_is_adamw(monkeypatch, whole_list):
    """The function itself, uncompiled: compiling is torch's part, and needs a GPU to be of use."""
    from fusedcalib.bench import compiled

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(compiled, "WHOLE_LIST", 200 if whole_list else 0)
    verdict = judge(lambda params: compiled.build(params, baselines.HYPER)[0], True)
    assert verdict.passed, verdict


def test_stacked_rows_are_judged_as_the_tensors_alone(monkeypatch):
    monkeypatch.setitem(gate.BATCH, "cpu", 10**9)
    stacked = judge(eager_gc, True)
    monkeypatch.setitem(gate.BATCH, "cpu", 1)
    alone = judge(eager_gc, True)
    assert stacked.max_err == alone.max_err
    assert stacked.passed
    assert alone.passed


# -- cases ------------------------------------------------------------------------------------


METHODS = ("torch_fused", "own_gc", "wrong", "absent")
QUICK = case.Effort(rounds=2, seconds=60, warmup=1)


@pytest.fixture
def measured(monkeypatch):
    """A case of the little list, one method of which is wrong and one missing."""
    quiet_machine(monkeypatch)
    monkeypatch.setitem(shapes.LISTS, "little", lambda: LITTLE)
    wrong = baselines.Method("wrong", "wrong", True, baselines.METHODS["torch_fused"].make)
    absent = baselines.Method("absent", "absent", False, baselines._rival("no_such_module", "X"))
    monkeypatch.setitem(baselines.METHODS, "wrong", wrong)
    monkeypatch.setitem(baselines.METHODS, "absent", absent)
    return lambda dtypes="fp32": case.run(case.Case("little", METHODS, dtypes), CPU, QUICK)


def row_of(measured, name):
    return next(row for row in measured["methods"] if row["name"] == name)


def test_no_speed_without_a_right_result(measured):
    one = measured()
    assert row_of(one, "own_gc")["wall_ms"] > 0
    assert row_of(one, "own_gc")["ratio_to"]["torch_fused"]["n"] == 2
    assert row_of(one, "own_gc")["max_err_vs_fp64"] > 0
    for name, reason in (("wrong", "wrong result"), ("absent", "no_such_module is not installed")):
        row = row_of(one, name)
        assert reason in row["reason"]
        assert row["wall_ms"] is None
        assert row["ratio_to"] == {}


def test_wide_state_is_for_those_who_take_it(measured):
    one = measured("bf16+fp32-state")
    assert row_of(one, "own_gc")["reason"] is None
    assert "another type" in row_of(one, "torch_fused")["reason"]


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
    monkeypatch.setattr(timing, "on_gpu", lambda device: True)
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
    monkeypatch.setattr(ceilings, "adamw_stream", lambda device, count: stream.sin)
    monkeypatch.setattr(ceilings, "GPU_ELEMENTS", 64)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)
    monkeypatch.setattr(host, "TENSORS", 20)


@pytest.mark.filterwarnings("ignore")  # the profiler says that there is no GPU
def test_the_path_of_a_gpu(measured, fake_gpu, monkeypatch):
    from fusedcalib.bench import probe

    one = measured()
    row = row_of(one, "own_gc")
    assert (one["clock"], one["flush"]) == ("device", "write")
    assert row["device_ms_median"] == pytest.approx(1.0)  # one tick for each step
    assert row["peak_extra_bytes"] == 500
    assert row["launches"] is None  # the profiler saw none, and none is not 0
    data = results.assemble(machine.describe(CPU), ceilings.measure(CPU, 2), [one])
    data["host"] = host.measure(CPU, rounds=1, seconds=1)
    data["goals"] = goals.judge(data)
    results.check(data)
    assert data["device"]["name"] == "Fake GPU"
    moved = 28 * LITTLE.params / 1e-3 * 1e-9
    (copied,) = (r["pct_copy"] for r in one["methods"] if r["name"] == "own_gc")
    assert copied == pytest.approx(100 * moved / data["ceil"]["copy_gbs"])
    assert probe.queue(probe.Probe(1e3, timing.QUEUE_LIMIT + 1, 0), flush=False) is None
    assert probe.queue(probe.Probe(1e6, 1, 0), flush=False) is None


# -- files ------------------------------------------------------------------------------------


SPREAD = {"median": 0.9, "p10": 0.8, "p90": 1.1, "n": 7, "disturbed": False}


def method_row(name, ratios, **changed):
    numbers = {"wall_ms": 2.0, "kept": 7, "dropped": 1, "ratio_to": ratios, "wall_ratio_to": ratios}
    return {**case.empty_row(name), **numbers, **changed}


@pytest.fixture
def data():
    """A run as data, as small as can be."""
    methods = [
        method_row("torch_fused", {}),
        method_row("own_plain", {"torch_fused": {**SPREAD, "median": 1.25}}),
        method_row("own_gc", {"torch_fused": SPREAD, "eager_gc_fused": {**SPREAD, "median": 0.5}}),
        case.empty_row("apex") | {"reason": "apex is not installed"},
    ]
    one = {"list": "small-1000", "tensors": 1000, "params": 10_739_200, "dtypes": "fp32"}
    one |= {"bytes_per_param": 28, "flush": "none", "clock": "wall", "methods": methods}
    losses = [2.3 - 0.1 * i for i in range(20)]
    runs = {
        name: [digits.Run(losses, [40.0 + i + end for i in range(20)]) for _ in range(3)]
        for name, end in (("torch", 0.0), ("plain", 0.0), ("gc", 2.5))
    }
    ceil = {"copy_gbs": 10.0, "stream_4r3w_gbs": None, "how": "by hand"}
    head = machine.describe(CPU)
    return results.assemble(head, ceil, [one], e1=digits.summary(runs), host=[], seconds=1.0)


def test_schema_holds_and_survives_the_file(data, tmp_path):
    path = results.save(data, tmp_path / "sub" / results.file_name(data))
    assert path.name.endswith("Z-cpu.json")
    assert results.load(path) == json.loads(json.dumps(data))
    assert data["device"] is None


def breakages():
    yield "no 'ceil'", lambda d: d.pop("ceil")
    yield "schema 2", lambda d: d.update(schema=2)
    yield "no 'wall_ms'", lambda d: d["cases"][0]["methods"][0].pop("wall_ms")
    yield "'host_us'", lambda d: d["cases"][0]["methods"][0].update(host_us="fast")
    yield "has a speed", lambda d: d["cases"][0]["methods"][1].update(reason="wrong")
    yield (
        "no 'p90'",
        lambda d: d["cases"][0]["methods"][1]["ratio_to"]["torch_fused"].pop("p90"),
    )


@pytest.mark.parametrize(("message", "break_it"), list(breakages()))
def test_schema_refuses(data, message, break_it):
    broken = copy.deepcopy(data)
    break_it(broken)
    with pytest.raises(ValueError, match=message):
        results.check(broken)


def test_nan_is_never_written(data, tmp_path):
    data["cases"][0]["methods"][0]["wall_ms"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        results.save(data, tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_report_tells_numbers_device_and_what_is_missing(data):
    text = report.text(data)
    assert "| fusedcalib with GC | 2 | 0.90 (0.80-1.10) | 7 | - |" in text
    assert "apex FusedAdam: apex is not installed" in text
    assert f"torch {torch.__version__}" in text
    assert "No GPU was used" in text
    assert "+2.5 points" in text
    assert "better on 3 of 3 seeds" in text


def test_readme_section_replaces_itself_only(data, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "README.md"
    page.write_text(f"top\n{readme.BEGIN}\nold\n{readme.END}\nbottom\n")
    source = results.save(data, tmp_path / "results" / "r.json")
    figure = readme.write(source, page)
    text = page.read_text()
    assert text.startswith("top\n")
    assert text.endswith("\nbottom\n")
    assert "old" not in text
    assert "1.25 (0.80-1.10) | 0.90 (0.80-1.10) | 0.50 (0.80-1.10) |" in text
    assert "Slower than torch's plain fused step: small-1000 without GC (1.25)" in text
    assert f"(results/{figure.name})" in text
    assert figure.read_bytes().startswith(b"\x89PNG")
    readme.write(source, page)
    assert page.read_text() == text


@pytest.mark.parametrize("page", ["", readme.BEGIN, f"{readme.END}{readme.BEGIN}"])
def test_readme_without_markers_is_left_alone(data, tmp_path, page, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "README.md"
    file.write_text(page)
    source = results.save(data, tmp_path / "r.json")
    assert readme.main([str(source), "--readme", str(file)]) == 1
    assert "was not changed" in capsys.readouterr().err
    assert file.read_text() == page


def test_disturbed_numbers_are_marked_and_reach_no_goal(data):
    own = data["cases"][0]["methods"][1]["ratio_to"]["torch_fused"]
    own |= {"median": 0.5}
    met = {row["what"]: row["met"] for row in goals.judge(data)}
    assert met["plain / torch fused, small-1000"] == "stretch"
    assert met["% of stream, GC, gpt2-small-cpu"] == "not measured"
    own |= {"disturbed": True}
    met = {row["what"]: row["met"] for row in goals.judge(data)}
    assert met["plain / torch fused, small-1000"] == "not measured"
    assert tables.spread_text(own) == "~0.50 (0.80-1.10)"
    assert tables.was_disturbed(data["cases"][0])


def test_goal_marks_are_ordered():
    for goal in (*goals.GPU, *goals.CPU):
        must, target, stretch = goal.marks
        assert must <= target <= stretch if goal.higher else must >= target >= stretch, goal.what
        assert goal.verdict(stretch) == "stretch"
        assert goal.verdict(must * (0.9 if goal.higher else 1.1)) == "missed"


# -- training and the job ---------------------------------------------------------------------


def test_curves_that_part_are_refused():
    losses = [2.0] * 20
    runs = {name: [digits.Run(losses, [50.0] * 20)] for name in ("torch", "plain", "gc")}
    assert digits.summary(runs)["max_diff_first_epoch"] == 0
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


def test_job_without_its_libraries_says_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(job, "find_spec", lambda name: None if name == "rich" else object())
    assert job.main([]) == 2
    error = capsys.readouterr().err
    assert error == "fusedcalib: the main job needs rich: pip install rich\n"


def test_job_writes_everything(data, monkeypatch, tmp_path):
    for name in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(name)
    parts = {key: data[key] for key in ("e1", "cases", "ceil")}
    monkeypatch.setattr(job, "_measure", lambda options, device, console: parts)
    assert job.main(["--out", str(tmp_path / "o"), "--device", "cpu"]) == 0
    files = sorted(file.name for file in (tmp_path / "o").iterdir())
    assert files == ["report.md", "results.json", "steps.png", "training.png"]
    data["cases"][0]["methods"][2] = case.empty_row("own_gc") | {"reason": "wrong result"}
    assert job.main(["--out", str(tmp_path / "o"), "--device", "cpu"]) == 1


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
    assert [one["list"] for one in written["cases"]] == ["little"]
    assert "KeyError" in written["failures"][0]["error"]
    assert suite._suite((good,), CPU, tmp_path / "late", -1) == 1
    assert "left out for want of time" in capsys.readouterr().out


def test_gpu_script_runs_on_after_a_failing_test_and_exits_non_zero(tmp_path):
    """With a stand-in for Python: the tests fail, everything else passes."""
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\ncase "$*" in\n  tests/run.py) echo one failed; exit 1 ;;\n'
        f'  *bootstrap*) echo {fake} ;;\n  *is_available*) echo cuda ;;\n  *suite*) echo ran "$@" ;;\n'
        "esac\n"
    )
    fake.chmod(0o755)
    variables = {"PATH": "/usr/bin:/bin", "OUT": str(tmp_path / "o"), "PYTHON": str(fake)}
    script = [str(ROOT / "bench" / "gpu.sh")]
    done = subprocess.run(script, env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAILED: tests (exit status 1)" in done.stderr
    assert "ran -m fusedcalib.bench.suite" in (tmp_path / "o" / "suite.log").read_text()
    fake.write_text(fake.read_text().replace("exit 1", "exit 0"))
    assert subprocess.run(script, env=variables, capture_output=True).returncode == 0
    assert not (tmp_path / "o" / "failed.log").exists()


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
        "from fusedcalib.bench.stream_triton import BLOCK, _kernel;"
        "types = {f'{name}_ptr': '*fp32' for name in 'abcd'} | {'BLOCK': 'constexpr'};"
        "facts = {(i,): [['tt.divisibility', 16]] for i in range(4)};"
        "source = ASTSource(_kernel, types, constexprs={(4,): BLOCK}, attrs=facts);"
        "ptx = compile(source, target=GPUTarget('cuda', 90, 32)).asm['ptx'];"
        "assert ptx.count('ld.global') == ptx.count('ld.global.v4') > 0, ptx",
        TRITON_INTERPRET="0",
    )


def test_triton_stream_computes_what_it_says():
    run_python(
        "import torch; from fusedcalib.bench import ceilings;"
        "from fusedcalib.bench.stream_triton import stream;"
        "x = [torch.full((8192,), v) for v in ceilings.CHECK]; stream(*x); ceilings._check(x)",
        TRITON_INTERPRET="1",
    )


def test_numba_stream_computes_what_it_says():
    pytest.importorskip("numba")
    ceilings.adamw_stream(CPU, 1000)
    with pytest.raises(RuntimeError, match="wrong result"):
        ceilings._check([torch.zeros(4)] * 4)
