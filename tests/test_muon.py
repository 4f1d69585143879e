"""Muon against torch.optim.Muon, a reference in float64, and the AdamW of its other groups."""

import copy
import inspect
import math
import pickle

import pytest
import torch

import fusedcalib
from fusedcalib.matrices import newton_schulz
from fusedcalib.matrices.newton_schulz import Workspaces, iteration_of, orthogonalize
from fusedcalib.reference.muon import muon as reference
from fusedcalib.reference.muon import newton_schulz as iterated

SHAPES = ((8, 8), (24, 8), (8, 24), (24, 8))
QUINTIC = (3.4445, -4.7750, 2.0315)
ASKED = {"ns_steps": 5, "ns_coefficients": QUINTIC, "eps": 1e-7, "coefficients": "quintic"}


def parameters(shapes=SHAPES, dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def set_gradients(*lists):
    """The same random gradients for the parameters of several lists."""
    for several in zip(*lists, strict=True):
        grad = torch.randn_like(several[0])
        for p in several:
            p.grad = grad.clone()


def assert_near(ours, theirs, lr):
    """Momentum rounded once more or less may round an input of the iteration, in bf16, to the other side: a
    step is then off by 2^-8 of an entry, times the slope of the polynomials."""
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=lr * 2**-5)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("eager", {}),
        ("numba", {"lr": torch.tensor(0.02)}),
        ("eager", {"lr": 0.02, "weight_decay": 0.0, "momentum": 0.5, "nesterov": False}),
        ("eager", {"adjust_lr_fn": "match_rms_adamw", "lr": 0.1, "ns_steps": 4}),
        ("eager", {"adjust_lr_fn": "original", "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e3}),
        ("eager", {"momentum": 0.0, "ns_steps": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "defaults",
)
def test_steps_as_torch(backend, options):
    ours = parameters()
    theirs = copy.deepcopy(ours)
    opt, other = fusedcalib.Muon(ours, backend=backend, **options), torch.optim.Muon(theirs, **options)
    for _ in range(3):
        set_gradients(ours, theirs)
        opt.step()
        other.step()
    assert_near(ours, theirs, float(options.get("lr", 1e-3)))
    assert any(not torch.equal(p, q) for p, q in zip(ours, parameters(), strict=True))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(opt.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])


def test_signature_begins_with_torchs():
    mine, theirs = (inspect.signature(cls).parameters for cls in (fusedcalib.Muon, torch.optim.Muon))
    assert [*mine][: len(theirs)] == [*theirs]
    assert [mine[name].default for name in theirs] == [p.default for p in theirs.values()]


def test_checkpoints_go_both_ways():
    ours, lr = parameters(), 0.02
    theirs = copy.deepcopy(ours)
    opt, other = fusedcalib.Muon(ours, lr=lr, backend="eager"), torch.optim.Muon(theirs, lr=0.5)
    set_gradients(ours, theirs)
    opt.step()
    assert {*opt.state_dict()["state"][0]} == {"momentum_buffer"}
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    back = fusedcalib.Muon(ours, backend="eager")
    back.load_state_dict(copy.deepcopy(other.state_dict()))
    assert back.param_groups[0]["lr"] == lr
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            q.copy_(p)
    set_gradients(ours, theirs)
    back.step()
    other.step()
    assert_near(ours, theirs, lr)


def test_copies_and_pickles_have_no_workspaces():
    ours = parameters()
    opt = fusedcalib.Muon(ours, backend="eager")
    set_gradients(ours)
    opt.step()
    for again in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert {key for entry in again.state.values() for key in entry} == {"momentum_buffer"}
        for p in again.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        again.step()


# -- the iteration ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 16), (2, 16, 5), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("asked", [{}, {"ns_steps": 2}, {"coefficients": "polar_express", "ns_steps": 11}])
def test_iteration_is_the_polynomial(shape, asked):
    """In float64, where the order of the products does not show."""
    how, spaces = iteration_of({**ASKED, **asked}), Workspaces()
    X = torch.randn(shape, dtype=torch.float64)
    want = [chain(x / (how.safety * x.norm()), how.coefficients) for x in X]
    if how.safety == 1:
        want = [iterated(x, how.coefficients, how.eps) for x in X]
    spaces.reserve(X, len(X))
    orthogonalize(X, how, spaces)
    torch.testing.assert_close(X, torch.stack(want), rtol=1e-9, atol=1e-9)


def chain(x, coefficients):
    """The iteration of a matrix that is scaled already."""
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def test_polar_express_finds_the_polar_factor():
    X = torch.randn(4, 12, 30, dtype=torch.float64)
    U, _, V = torch.linalg.svd(X, full_matrices=False)
    how, spaces = iteration_of({**ASKED, "coefficients": "polar_express", "ns_steps": 12}), Workspaces()
    spaces.reserve(X, 4)
    orthogonalize(X, how, spaces)
    torch.testing.assert_close(X, U @ V, rtol=1e-6, atol=1e-6)


def test_a_step_as_the_reference():
    """In float64 but for the iteration. Of singular values that are alike bf16 loses no more than the 2^-8 of
    a rounding in each of its 15 products, times a slope of 2 at most where they end."""
    w = torch.randn(16, 8, dtype=torch.float64)
    g = torch.linalg.qr(torch.randn(16, 8, dtype=torch.float64))[0]
    p = torch.nn.Parameter(w.clone())
    p.grad = g
    options = {"lr": 0.5, "weight_decay": 0.2, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    opt = fusedcalib.Muon([p], backend="eager", **options)
    opt.step()
    want, state = reference(w, g, {}, coefficients=[QUINTIC] * 5, **options)
    torch.testing.assert_close(opt.state[p]["momentum_buffer"], state["momentum_buffer"])
    error = (p.detach() - want).norm() / (want - (1 - 0.5 * 0.2) * w).norm()
    assert error < 15 * 2 * 2**-8
    assert error < (0.9 * want - want).norm() / 0.5  # a step without decay is farther off


def test_stacks_and_kernels_are_matrices():
    stack, kernel = torch.randn(3, 8, 16), torch.randn(8, 4, 2, 2)
    apart = [*stack, kernel.view(8, 16)]
    whole = [torch.nn.Parameter(stack.clone()), torch.nn.Parameter(kernel.clone())]
    apart = [torch.nn.Parameter(matrix.clone()) for matrix in apart]
    for p in (*whole, *apart):
        p.grad = p.detach() * 2
    fusedcalib.Muon(whole, lr=0.1, backend="eager").step()
    fusedcalib.Muon(apart, lr=0.1, backend="eager").step()
    assert torch.equal(whole[0], torch.stack([p.detach() for p in apart[:3]]))
    assert torch.equal(whole[1].view(8, 16), apart[3])


def counted(monkeypatch, *names):
    """A list that grows with every call of these functions of torch."""
    calls = []

    def noting(function):
        return lambda *args, **options: (calls.append(function), function(*args, **options))[1]

    for name in names:
        monkeypatch.setattr(torch, name, noting(getattr(torch, name)))
    return calls


def test_calls_do_not_grow_with_the_number_of_matrices(monkeypatch):
    """Nor does a step take memory for them."""
    counts = []
    for many in (2, 40):
        ours = parameters([(8, 16)] * many)
        opt = fusedcalib.Muon(ours, backend="numba")
        set_gradients(ours)
        opt.step()
        steps = [len(engine.plan.buckets) for engine in (opt._engine, opt._second)]
        before = {key: space.data_ptr() for key, space in opt._batches._spaces._kept.items()}
        places = [opt.state[p]["update"].data_ptr() for p in ours]
        calls = counted(monkeypatch, "bmm", "baddbmm")
        set_gradients(ours)
        opt.step()
        monkeypatch.undo()
        assert before == {key: space.data_ptr() for key, space in opt._batches._spaces._kept.items()}
        assert places == [opt.state[p]["update"].data_ptr() for p in ours]
        counts.append((steps, len(calls)))
    assert counts[0] == counts[1] == ([1, 1], 15)


def test_large_batches_are_iterated_in_pieces(monkeypatch):
    ours = parameters([(8, 16)] * 5)
    theirs = copy.deepcopy(ours)
    set_gradients(ours, theirs)
    fusedcalib.Muon(theirs, backend="eager").step()
    monkeypatch.setattr(newton_schulz, "CACHED", {"cpu": 2 * 8 * 16})
    opt = fusedcalib.Muon(ours, backend="eager")
    opt.step()
    assert sum(space.numel() for space in opt._batches._spaces._kept.values()) == 2 * (8 * 16 + 2 * 64)
    assert_near(ours, theirs, 1e-3)
    assert math.isfinite(sum(float(p.detach().sum()) for p in ours))
