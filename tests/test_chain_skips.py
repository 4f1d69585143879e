"""Steps that are left out, by a scaler or by a gradient that is not finite."""

import math

import pytest
import torch
from cases import DEVICE, assert_identical, parameters, snapshot
from chain_cases import Pair, decided_alike, each_backend, each_run

import fusedcalib

SPOILED = (0, 1, 7, 8, 30)


@each_run
def test_skipped_steps_leave_no_trace(rule, backend):
    """Fifty gradients, some not finite, the first two among them: to the bit as if those had not been."""
    pair = Pair(rule, backend, {"skip_nonfinite": True}, decided_alike(backend))
    for step in range(50):
        pair.gradients(spoiled=step in SPOILED)
        before = snapshot(pair.ours)
        pair.ours.step()
        if step in SPOILED:
            after = snapshot(pair.ours)
            assert_identical([p for p, _ in after], [p for p, _ in before])
        else:
            pair.by_hand.step()
    assert pair.ours.skipped_steps.item() == len(SPOILED)
    assert_identical([p.detach() for p in pair.params], [p.detach() for p in pair.others])
    for p, q in zip(pair.params, pair.others, strict=True):
        theirs = pair.by_hand.state.get(q, {})
        assert_identical({k: pair.ours.state[p][k] for k in theirs}, dict(theirs))


def scaler_of(device=DEVICE, scale=64.0):
    return torch.amp.GradScaler(device, init_scale=scale, growth_interval=10)


@each_run
@pytest.mark.parametrize("fused", [True, False])
def test_a_scaler_is_what_torch_has(rule, backend, fused):
    """Fifty steps through a GradScaler, which grows and backs off: the gradients are those without it.

    Scales are powers of two, so all of it is exact. With fused=True gradients stay scaled.
    """
    options, plain = ({"fused": True}, decided_alike(backend)) if fused else ({}, {})
    pair = Pair(rule, backend, options, plain, dtype=torch.float32)
    assert pair.ours._step_supports_amp_scaling == fused
    scaler = scaler_of()
    scaler.scale(torch.zeros((), device=DEVICE))  # makes its tensors
    for step in range(50):
        pair.gradients(spoiled=step in SPOILED)
        for p in pair.params:
            p.grad *= scaler.get_scale()
        before = [p.grad.clone() for p in pair.params]
        scaler.step(pair.ours)
        scaler.update()
        if fused:
            assert_identical([p.grad for p in pair.params], before)
        if step not in SPOILED:
            pair.by_hand.step()
    assert scaler.get_scale() != 64
    assert pair.ours.skipped_steps.item() == (len(SPOILED) if fused else 0)
    assert_identical([p.detach() for p in pair.params], [p.detach() for p in pair.others])


@each_backend
@pytest.mark.parametrize("by_user", [False, True], ids=["fused", "unscale_"])
def test_a_scaler_and_a_limit(backend, by_user):
    """The norm is of unscaled gradients, whoever unscales them."""
    params, others = parameters(), parameters()
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    opt = fusedcalib.AdamW(params, fused=True, max_grad_norm=1.0, backend=backend)
    other = fusedcalib.AdamW(others, max_grad_norm=1.0, backend=backend)
    scaler = scaler_of()
    scaler.scale(torch.zeros((), device=DEVICE))
    for _ in range(3):
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad * scaler.get_scale()
        if by_user:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        other.step()
        assert opt.grad_norm == other.grad_norm
    assert_identical([p.detach() for p in params], [p.detach() for p in others])


@each_backend
def test_a_skipped_first_step_survives_a_checkpoint(backend):
    """A momentum buffer begins with the first gradient, however many steps were left out before."""
    options = {"momentum": 0.9, "dampening": 0.5, "skip_nonfinite": True, "backend": backend}
    w = torch.nn.Parameter(torch.zeros(3, device=DEVICE))
    opt = fusedcalib.SGD([w], lr=1.0, **options)
    w.grad = torch.full_like(w, math.nan)
    opt.step()
    again = fusedcalib.SGD([w], lr=1.0, **options)
    again.load_state_dict(opt.state_dict())
    w.grad = torch.ones_like(w)
    again.step()
    assert w.tolist() == [-1, -1, -1]
