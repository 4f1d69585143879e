"""Hyperparameters that are tensors on the GPU: every number of every rule is read there, not by the host."""

import sys
from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch
from cases import DEVICE, assert_near, parameters, tolerance
from kernel_cases import TRITON
from rule_cases import RULES
from torch.utils._python_dispatch import TorchDispatchMode

import fusedcalib
from fusedcalib import GradientNoise, LangevinNoise, WeightNoise

on_triton = pytest.mark.parametrize("backend", [TRITON])

# Numbers that are None or 0 unless said, with values of use.
SWITCHED = {"l1": 0.01, "max_row_norm": 1.5, "max_grad_norm": 2.0, "ema_decay": 0.75, "weight_decay": 0.1}
SWITCHED |= {"momentum": 0.5, "clip_exponent": 0.25, "lr_decay": 0.1, "dampening": 0.25}
SWITCHED |= {"alpha_warmup": 5.0, "beta3_warmup": 4.0}
NOT_NUMBERS = {"seed", "centralize_min_ndim", "initial_accumulator_value"}  # the last one only makes a state


def numbers_of(rule):
    """(name, value) of all numbers of its param groups, those that are off switched on."""
    optimizer = rule.ours([torch.nn.Parameter(torch.zeros(1))], **rule.options)
    for name, value in optimizer.param_groups[0].items():
        value = SWITCHED.get(name, value)
        if name in NOT_NUMBERS or isinstance(value, bool):
            continue
        if isinstance(value, float) or (isinstance(value, tuple) and all(type(x) is float for x in value)):
            yield name, value


ONE_OF_EACH = {type(r.ours([torch.nn.Parameter(torch.zeros(1))])).__name__: r for r in RULES.values()}


def test_the_walk_finds_them():
    found = [name for rule in ONE_OF_EACH.values() for name, _ in numbers_of(rule)]
    assert {*found} >= {*SWITCHED, "lr", "betas", "eps", "alpha", "rho", "momentum_decay"}
    assert len(found) > 100


class NoAnswers(TorchDispatchMode):
    """Refuses to tell the host a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(func) or "is_nonzero" in str(func):
            raise AssertionError("the host reads a tensor")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def remote(monkeypatch):
    """`remote(x)`: a tensor that the host may not read; where there is no GPU, by the package's own word."""
    marked = []

    def is_remote(value):
        return any(value is t for t in marked) or (
            isinstance(value, torch.Tensor) and value.device.type != "cpu"
        )

    for name, module in list(sys.modules.items()):
        if name.startswith("fusedcalib") and hasattr(module, "is_remote"):
            monkeypatch.setattr(module, "is_remote", is_remote)

    def make(value):
        if isinstance(value, tuple):
            return tuple(map(make, value))
        marked.append(torch.tensor(value, dtype=torch.float64, device=DEVICE))
        return marked[-1]

    return make


def flat(value):
    return value if isinstance(value, tuple) else (value,)


def changed(value, by):
    if isinstance(value, tuple):
        return tuple(changed(x, by) for x in value)
    return value * by


@on_triton
@pytest.mark.parametrize("rule", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_every_number_is_read_on_the_device(rule, backend, remote):
    """As the same run with Python numbers, also after all have changed in place; nothing waits for them."""
    torch.manual_seed(0)
    params = parameters(((4, 5), (6,)))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    options = {**rule.options, "capturable": True}
    values = dict(numbers_of(rule))
    there = {name: remote(value) for name, value in values.items()}
    ours, theirs = (rule.ours(ps, backend=backend, **options) for ps in (params, others))
    ours.param_groups[0].update(there)
    for step, by in enumerate((1.0, 0.75, 0.5)):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        here = {name: changed(value, by) for name, value in values.items()}
        ours.param_groups[0]["said"] = step  # so that the group is looked at again
        theirs.param_groups[0].update(here)
        for name, tensors in there.items():
            for t, x in zip(
                *((v if isinstance(v, tuple) else (v,)) for v in (tensors, here[name])), strict=True
            ):
                t.fill_(x)
        with NoAnswers() if step and DEVICE == "cpu" else nullcontext():
            ours.step()
        theirs.step()
    for p, q in zip(params, others, strict=True):
        assert_near(p, q, tolerance(p.dtype, 3), "parameter")
        for key in theirs.state[q]:
            assert_near(ours.state[p][key], theirs.state[q][key], tolerance(p.dtype, 3), key)


@pytest.mark.parametrize("noise", [GradientNoise, WeightNoise, LangevinNoise])
def test_numbers_of_a_noise_are_refused(noise, remote):
    """They are part of a schedule, and of checkpoints as plain numbers: an error says so."""
    field = fields(noise)[0].name
    (w,) = parameters(((4, 4),))
    with pytest.raises(ValueError, match=f"Invalid {field} of {noise.__name__}: a tensor"):
        fusedcalib.SGD([w], noise=noise(**{field: remote(0.5)}))
