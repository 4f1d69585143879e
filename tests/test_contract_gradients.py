"""The drop-in contract, C15: gradients that are not what the last step saw, or not what they seem."""

import pytest
import torch
from cases import BACKENDS, DEVICE, tolerance, twins
from rule_cases import RULES, each_few

import fusedcalib

LAZY = {
    "negated": (torch.float32, lambda shape: torch.randn(shape, dtype=torch.cfloat).conj().imag),
    "conjugated": (torch.complex64, lambda shape: torch.randn(shape, dtype=torch.cfloat).conj()),
}


def pair(rule, backend, shape, dtype=torch.float32):
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype))]
    expected = twins(params)
    ours = rule.ours(params, backend=backend, lr=0.1)
    return params[0], ours, expected[0], rule.theirs(expected, lr=0.1, foreach=False)


def check(p, q, steps):
    rounding = tolerance(torch.float32, steps)
    torch.testing.assert_close(p, q, rtol=0, atol=rounding)


@pytest.mark.parametrize("backend", BACKENDS)
@each_few
@pytest.mark.parametrize("kind", LAZY)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what the host decides is the same there")
def test_a_lazy_gradient_means_its_values(rule, backend, kind):
    """Memory holds the values before negation; ours once read that."""
    dtype, make = LAZY[kind]
    p, ours, q, theirs = pair(rule, backend, (4, 3), dtype)
    for grad in (torch.ones(4, 3, dtype=dtype), make((4, 3)), make((4, 3)), torch.ones(4, 3, dtype=dtype)):
        p.grad, q.grad = grad, grad.clone()
        ours.step()
        theirs.step()
    check(p, q, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what the host decides is the same there")
def test_data_of_another_dtype_or_layout_in_a_gradient_kept(backend):
    p, ours, q, theirs = pair(RULES["SGD"], backend, (3, 3))
    p.grad, q.grad = torch.randn(3, 3), torch.zeros(3, 3)
    q.grad.copy_(p.grad)
    for make in (
        lambda: torch.randn(3, 3),
        lambda: torch.randn(3, 3).t(),
        lambda: torch.randn(3, 3).bfloat16(),
    ):
        data = make()
        p.grad.data, q.grad.data = data, data.float()
        ours.step()
        theirs.step()
    check(p, q, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what the host decides is the same there")
def test_a_gradient_that_shrank_is_refused(backend):
    """Stepping on would read beyond its memory."""
    p, ours, _, _ = pair(RULES["SGD"], backend, (1000,))
    p.grad = torch.ones(1000)
    ours.step()
    before = p.detach().clone()
    p.grad.data = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"gradient is \(1,\)"):
        ours.step()
    assert torch.equal(p, before)


def test_modules_may_exchange_their_tensors():
    """`swap_tensors` refuses a tensor with weak references; `Module.to` may use it."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module = torch.nn.Linear(2, 2)
        optimizer = fusedcalib.SGD(module.parameters(), lr=0.1)
        module(torch.ones(2)).sum().backward()
        optimizer.step()
        module.double()
        optimizer.step()
        assert module.weight.dtype == torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_c32_a_step_counts_its_own_states_versions_only(backend):
    """States share a counter within an optimizer; another optimizer's step must not seem to write them."""
    params = [torch.nn.Parameter(torch.ones(3, device=DEVICE)) for _ in range(2)]
    first, second = (fusedcalib.Adam([p], backend=backend) for p in params)
    for p, optimizer in zip(params, (first, second), strict=True):
        p.grad = torch.ones_like(p)
        optimizer.step()
    moment = first.state[params[0]]["exp_avg"]
    before = moment._version
    second.step()
    assert moment._version == before
    first.step()
    assert moment._version > before


def test_a_step_that_fails_while_it_is_planned_leaves_no_state(monkeypatch):
    """Else the next step would not be SGD's first, which is not dampened."""
    p = torch.nn.Parameter(torch.zeros(2, device=DEVICE))
    optimizer = fusedcalib.SGD([p], lr=1.0, momentum=0.9, dampening=0.5)
    p.grad = torch.ones_like(p)
    with monkeypatch.context() as patched:
        patched.setattr("fusedcalib.engine.engine.Plan", lambda *args: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            optimizer.step()
    assert not optimizer.state
    optimizer.step()
    assert p.tolist() == [-1.0, -1.0]


def test_capture_in_a_graph_is_refused(monkeypatch):
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    opt = fusedcalib.SGD([p])
    with pytest.raises(RuntimeError, match=r"captured.*run some steps before"):
        opt.step()
    assert p.tolist() == [0.0, 0.0]
    monkeypatch.undo()
    opt.step()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="construct it with capturable=True"):
        opt.step()
    assert p.tolist() == pytest.approx([-0.001, -0.001])
