"""The benchmark's gate: what is right passes, and what is not is refused. No speed is asserted anywhere."""

from dataclasses import replace

import pytest
import torch
from bench_subjects import CPU, LITTLE

import fusedcalib
from fusedcalib.bench.measure import baselines, case, gate, method, spare
from fusedcalib.bench.models import shapes, traffic


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
