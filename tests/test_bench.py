"""The benchmark: its lists, its statistics, its gate. No speed is asserted anywhere."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_subjects import CPU, LITTLE, quiet_machine, sampler_of

import fusedcalib
from fusedcalib.bench.measure import baselines, case, gate, load, method, spare, timing
from fusedcalib.bench.models import shapes, traffic
from fusedcalib.bench.repository import suite

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
    for one in (*suite.cases_of(CPU), *suite.cases_of(torch.device("cuda"))):
        assert shapes.get(one.list).tensors
        assert one.subject in method.SUBJECTS
        assert set(one.methods) <= set(baselines.METHODS)
        assert one.dtypes in traffic.DTYPES
        assert one.extras in ("", *method.EXTRAS)


# -- statistics -------------------------------------------------------------------------------


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
    monkeypatch.setattr(load, "GLANCE", 0.0)
    samplers = {"T": sampler_of([1.0] * 4), "m": sampler_of([2.0] * 2)}
    rounds = timing.interleave(samplers, rounds=2, seconds=60, anchor="T")
    assert rounds.kept("m") == 2


def test_time_limit_ends_the_rounds():
    samplers = {"a": lambda: 1.0}
    assert timing.interleave(samplers, rounds=10**9, seconds=0.01).kept("a") < 10**7


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell its load")
def test_own_work_is_no_load_of_others(monkeypatch):
    monkeypatch.setattr(timing.Load, "_read", sampler_of([(10.0, 5.0, 20.0), (12.0, 6.5, 24.0)]))
    assert timing.Load().of_others() == pytest.approx((2.0 - 1.5) / 4.0, abs=0.01)


# -- the gate ---------------------------------------------------------------------------------


def kind(gc):
    return gate.Kind(method.Extras(gc=gc))


def judge(make, gc, dtype=torch.float32):
    params = shapes.build(LITTLE, CPU, dtype)
    return gate.check(LITTLE, {"it": gate.Entry(kind(gc), params, make(params))}, method.ADAMW)["it"]


def torch_adamw(**changed):
    return lambda params: torch.optim.AdamW(params, **{**method.HYPER, **changed}).step


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


def judged(name, gc, **changed):
    """The verdict over our step of a rule, its options perhaps changed; eager, which compiles nothing."""
    subject = method.SUBJECTS[name]
    params = shapes.build(LITTLE, CPU)
    options = {**subject.options, "backend": "eager", **changed}
    optimizer = getattr(fusedcalib, subject.cls)(params, **options, centralize=gc)
    return gate.check(LITTLE, {"it": gate.Entry(kind(gc), params, optimizer.step)}, subject)["it"]


@pytest.mark.parametrize("gc", [False, True], ids=["plain", "gc"])
@pytest.mark.parametrize("name", method.SUBJECTS)
def test_gate_knows_every_rule(name, gc):
    lr = method.SUBJECTS[name].options["lr"]
    assert judged(name, gc).passed
    assert not judged(name, gc, lr=1.001 * lr).passed
    assert not judged(name, gc, weight_decay=0.0).passed


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
        optimizer = torch.optim.AdamW(params, **method.HYPER)

        def step():
            optimizer.step()
            params[2].data.view(-1)[-1] += 2e-5

        return step

    assert not judge(make, False).passed


@pytest.mark.parametrize("whole_list", [True, False])
def test_what_is_compiled_is_adamw(monkeypatch, whole_list):
    """The function itself, uncompiled: compiling is torch's part, and needs a GPU to be of use."""
    from fusedcalib.bench.measure import compiled

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(compiled, "WHOLE_LIST", 200 if whole_list else 0)
    verdict = judge(lambda params: compiled.build(params, method.HYPER)[0], True)
    assert verdict.passed, verdict


def test_stacked_rows_are_judged_as_the_tensors_alone(monkeypatch):
    monkeypatch.setitem(gate.BATCH, "cpu", 10**9)
    stacked = judge(eager_gc, True)
    monkeypatch.setitem(gate.BATCH, "cpu", 1)
    alone = judge(eager_gc, True)
    assert stacked.max_err == alone.max_err
    assert stacked.passed
    assert alone.passed


# -- extras -----------------------------------------------------------------------------------


def made(key, side, params):
    """A step with extras, without its noise, as the case has it in the gate."""
    name = f"{side}_{key}"
    built = replace(baselines.METHODS[name].make(LITTLE, params), params=params)
    return built, case._entry(baselines.METHODS[name], built)


@pytest.mark.parametrize("key", method.EXTRAS)
def test_composed_and_ours_agree_and_pass(key):
    entries = {side: made(key, side, shapes.build(LITTLE, CPU))[1] for side in ("eager", "own")}
    verdicts = gate.check(LITTLE, entries, method.ADAMW)
    assert all(verdict.passed for verdict in verdicts.values()), verdicts
    for one, other in zip(entries["eager"].params, entries["own"].params, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)
    if key in ("ema", "chain"):
        for one, other in zip(entries["eager"].averages(), entries["own"].averages(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
    for side in entries:
        assert spare.fault(baselines.METHODS[f"{side}_{key}"], method.ADAMW, CPU, torch.float32) is None


def altered(side, gc, **changed):
    """A method of the whole chain that is not quite that."""
    extras = replace(method.EXTRAS["chain"], gc=gc, **changed)
    make = (baselines.composed if side == "eager" else baselines.own)(extras)
    return replace(baselines.METHODS[f"{side}_chain"], make=make)


@pytest.mark.parametrize("side", ["eager", "own"])
@pytest.mark.parametrize(
    ("gc", "changed"),
    [(False, {}), (True, {"ema": 0.99}), (True, {"ema": None})],
    ids=["no-gc", "decay", "no-average"],
)
def test_gate_refuses_a_wrong_chain(monkeypatch, side, gc, changed):
    monkeypatch.setitem(baselines.METHODS, f"{side}_chain", altered(side, gc, **changed))
    _, entry = made("chain", side, shapes.build(LITTLE, CPU))
    assert not gate.check(LITTLE, {"it": entry}, method.ADAMW)["it"].passed


@pytest.mark.parametrize("side", ["eager", "own"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clip": 1.001}, "wrong clip of a gradient of 100 times"),
        ({"clip": 0.4}, "wrong clip"),
        ({"clip": None}, "wrong clip"),
        ({"noise": 0.0105}, "deviation"),
        ({"noise": 0.0}, "deviation 0 in"),
    ],
)
def test_wrong_clip_and_noise_are_seen(side, changed, message):
    found = spare.fault(altered(side, True, **changed), method.ADAMW, CPU, torch.float32)
    assert message in found


def test_noise_that_repeats_or_is_not_centred_is_seen(monkeypatch):
    judged = (method.ADAMW, CPU, torch.float32)
    noisy = baselines.METHODS["eager_noise"]
    assert "not centred" in spare.fault(replace(noisy, extras=replace(noisy.extras, gc=True)), *judged)
    noise = torch.randn(spare.SPARE)
    monkeypatch.setattr(torch, "randn_like", lambda grad: noise)
    assert "correlate by 1" in spare.fault(noisy, *judged)
    monkeypatch.undo()
    monkeypatch.setattr(spare, "GAMMA", 0.0)
    assert "in step 1" in spare.fault(noisy, *judged)


def test_extras_move_more_bytes():
    widths = {key: extras.width(traffic.DTYPES["fp32"], 2) for key, extras in method.EXTRAS.items()}
    assert widths == {"noise": 28, "clip": 32, "ema": 36, "chain": 40}
