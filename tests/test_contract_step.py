"""The drop-in contract: what a step reads, writes, and leaves alone."""

import copy

import pytest
import torch
from cases import BACKENDS, DEVICE, assert_identical, parameters, snapshot, state_of, tolerance, train
from rule_cases import RULES, each
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


def test_c08_closure(rule, ours, twin):
    """It runs first, once, with gradients enabled whatever the caller's mode; its value returns."""
    built = twin()
    inputs = [torch.randn_like(p) for p in built.params]
    results = []
    for optimizer, params in built.sides:
        calls = []

        def closure(optimizer=optimizer, params=params, calls=calls):
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = sum((p * x).sum() for p, x in zip(params, inputs, strict=True))
            loss.backward()
            return loss

        with torch.no_grad():
            results += [optimizer.step(closure).item()]
            results += [optimizer.step(closure=closure).item()]
        assert calls == [True, True]
    built.steps = 2
    built.check()
    assert results[:2] == pytest.approx(results[2:], abs=64 * tolerance(torch.float32, 2))
    assert built.ours.step() is None


def test_c10_step_hooks(ours):
    """Local and global ones, before and after; a hook may replace the arguments."""
    params, log = parameters(), []
    optimizer = ours(params)
    handles = [
        optimizer.register_step_pre_hook(lambda o, a, k: log.append("pre") or ((o, lambda: 7), {})),
        optimizer.register_step_post_hook(lambda *_: log.append("post")),
        register_optimizer_step_pre_hook(lambda *_: log.append("all pre")),
        register_optimizer_step_post_hook(lambda *_: log.append("all post")),
    ]
    try:
        assert optimizer.step() == 7
    finally:
        for handle in handles:
            handle.remove()
    assert log == ["all pre", "pre", "post", "all post"]


def test_c10_state_dict_hooks(ours):
    params, log = parameters(), []
    optimizer = ours(params)
    optimizer.register_state_dict_pre_hook(lambda o: log.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: log.append(saved.pop("extra")))
    optimizer.register_load_state_dict_post_hook(lambda o: log.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert log == ["save", 1, "loaded"]


def test_c11_state_is_lazy(rule, twin):
    """No state before the first step, none for a parameter that has had no gradient."""
    built = twin()
    assert not built.ours.state
    built.step(missing=(0, 3)).check()
    assert {bool(state_of(built.ours, built.params[i])) for i in (0, 3)} == {False}
    assert {bool(state_of(built.ours, built.params[i])) for i in (1, 2, 4)} == {True}
    built.step(missing=(1,)).check()


def test_c11_parameters_swapped_after_construction(twin):
    """As FSDP2 wrapping does: the groups hold other tensors by the time of the first step."""
    built = twin()

    def swap(optimizer, params):
        params[:] = [torch.nn.Parameter(p * 2) for p in params]
        optimizer.param_groups[0]["params"] = list(params)

    built.both(swap)
    built.step(2).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_c13_step_is_a_host_scalar(rule, twin, dtype):
    built = twin(dtype=dtype).step(2)
    for p in built.params:
        step = state_of(built.ours, p).get("step")
        assert (step is not None) == rule.counted
        if rule.counted:
            assert (step.dim(), step.dtype, step.device.type) == (0, torch.float32, "cpu")
            assert step.item() == 2


def test_c14_counters_are_per_parameter(rule, twin):
    """As with frozen layers, or DeepSpeed's one call a sub-group."""
    built = twin()
    for missing in ((), (0,), (0, 1, 2), (4,), range(len(built.params)), (1, 3)):
        built.step(missing=missing)
    built.check()
    counts = [state_of(built.ours, p).get("step") for p in built.params]
    assert not rule.counted or counts == [3, 3, 4, 4, 4]


@pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
def test_c23_nothing_moves_at_lr_zero(rule, ours, tensor):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = ours(params, lr=torch.tensor(0.0) if tensor else 0.0)
    train(optimizer, 2)
    assert_identical([p.detach() for p in params], before)
    assert all(state_of(optimizer, p).keys() >= set(rule.moments) for p in params)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.tensor(0.05),
        lambda: torch.tensor(0.05, dtype=torch.float64),
        lambda: torch.tensor([0.05]),
    ],
    ids=["0-dim", "double", "1-element"],
)
def test_c24_tensor_lr(twin, make):
    """Read anew each step, kept as the user's own object."""
    rates = [make(), make()]
    built = twin()
    for rate, (optimizer, _) in zip(rates, built.sides, strict=True):
        optimizer.param_groups[0]["lr"] = rate
    built.step(2)
    for rate in rates:
        rate.fill_(0.2)
    built.step(2).check()
    assert built.ours.param_groups[0]["lr"] is rates[0]
    assert rates[0].item() == pytest.approx(0.2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_c28_parameters_on_another_device(rule, ours):
    torch.cuda.set_device(0)
    params = [p for i in (1, 0) for p in parameters(device=f"cuda:{i}")]
    optimizer = ours(params)
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all((p != b).all() for p, b in zip(params, before, strict=True))
    assert torch.cuda.current_device() == 0


@each(["SGD", "AdamW", "ADOPT"])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"centralize": True}, torch.float32),
        ({"maximize": True, "centralize": "update", "l1": 0.1, "max_row_norm": 0.5}, torch.float32),
    ],
    ids=str,
)
def test_c29_gradients_are_left_alone(ours, options, dtype):
    params = parameters(dtype=dtype)
    optimizer = ours(params, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        grads = [p.grad for p in params]
        copies, versions = copy.deepcopy(grads), [g._version for g in grads]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        assert_identical(grads, copies)
        assert [g._version for g in grads] == versions


def test_c32_autograd_sees_the_step(rule, ours):
    """A tensor saved for backward and then stepped over is an error, not a wrong gradient."""
    (p,) = params = parameters(((3, 4),))
    optimizer = ours(params)
    p.grad = torch.ones_like(p)
    for _ in range(2):  # the second time nothing is new to the optimizer
        loss = (p * p).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_c32_every_written_tensor_counts(rule, twin):
    built = twin().step()
    state = [state_of(built.ours, p) for p in built.params if p.numel()]
    written = [p for p in built.params if p.numel()] + [s[k] for s in state for k in rule.moments]
    versions = [t._version for t in written]
    built.step()
    assert all(t._version > v for t, v in zip(written, versions, strict=True))


@pytest.mark.parametrize(
    ("name", "backend"), [*(("SGD", b) for b in BACKENDS), ("SGDW", "eager"), ("Signum", "eager")]
)
def test_c33_without_momentum_no_state_is_left(name, backend):
    params = parameters()
    optimizer = RULES[name].ours(params, backend=backend, momentum=0)
    train(optimizer)
    assert len(optimizer.state) == 0
    assert optimizer.state_dict()["state"] == {}


def test_nothing_to_do(ours):
    """No gradient anywhere: nothing is written, and no state is made."""
    optimizer = ours(parameters())
    before = snapshot(optimizer)
    assert optimizer.step() is None
    assert_identical(snapshot(optimizer), before)
    assert len(optimizer.state) == 0


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU has state elsewhere")
def test_c17_no_host_tensors_in_device_state(twin):
    built = twin().step()
    tensors = [t for p in built.params for t in state_of(built.ours, p).values()]
    assert {t.device.type for t in tensors if t.dim()} == {DEVICE}
