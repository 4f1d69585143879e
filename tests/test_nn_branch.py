"""The rule of branch weights, and its fused step against the rule, on every executor."""

import itertools
import math

import pytest
import torch
from kernel_cases import BACKENDS, INTERPRETED, TRITON, device_of
from kernel_compiled import TARGETS, Compiled, spilled
from torch import nn

from fusedcalib import reference
from fusedcalib.kernels import launch
from fusedcalib.kernels.launch import OPTIONS, dtype_of
from fusedcalib.layout import branches as branch_tables
from fusedcalib.nn import CSGD, branch, branch_step

F64 = torch.float64
SIGNS = ("descent", "literal")
# One branch; one position; more positions than a block of the kernel, an odd number of branches.
SHAPES = ((4, 3, 3), (1, 3, 3), (3, 1, 1), (5, 17, 9), (2,))
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("lr", [0.0, 0.01, 1.0, 1e4])
def test_rule(sign, lr):
    R, grad = torch.rand(4, 3, 2, dtype=F64), torch.randn(4, 3, 2, dtype=F64)
    found = branch_step(R, grad, lr, sign)
    torch.testing.assert_close(found, reference.branch_step(R, grad, lr, sign), rtol=1e-15, atol=0)
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(0), torch.ones(3, 2, dtype=F64), rtol=0, atol=1e-15)
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(branch_step(R[order], grad[order], lr, sign), found[order], rtol=1e-15, atol=0)


def test_signs_are_each_others_mirror():
    R, grad = torch.rand(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    assert torch.equal(branch_step(R, grad, 0.1, "literal"), branch_step(R, -grad, 0.1))


def test_a_position_whose_branches_are_all_zero():
    for step in (branch_step, reference.branch_step):
        assert step(torch.full((4,), 0.5), torch.full((4,), 5.0), 0.1).tolist() == [0.25] * 4


# -- the fused step -----------------------------------------------------------------------------


def made(backend, shapes=SHAPES, dtype=torch.float32):
    """Branch weights with gradients; their sums are not 1, so that every step moves them."""
    device = device_of(backend)
    found = [nn.Parameter((0.1 + torch.rand(shape)).to(device, dtype)) for shape in shapes]
    for R in found:
        R.grad = torch.randn(R.shape).to(device, dtype)
    return found


def expected_of(R, lr, sign="descent", scale=1.0):
    """By the rule, in the type of the arithmetic."""
    wide = torch.promote_types(R.dtype, torch.float32)
    return branch_step(R.detach().to(wide), R.grad.to(wide) / scale, lr, sign).to(R.dtype)


def near(found, expected):
    """All are sums of numbers >= 0 in another order, so K roundings apart; then rounded as stored."""
    for R, new in zip(found, expected, strict=True):
        wide = torch.promote_types(R.dtype, torch.float32)
        rtol = len(R) * torch.finfo(wide).eps + (R.dtype != wide) * torch.finfo(R.dtype).eps
        torch.testing.assert_close(R.detach(), new, rtol=rtol, atol=0)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("sign", SIGNS)
def test_every_branch_weight_is_stepped_by_the_rule(backend, dtype, sign):
    """Two groups with learning rates and directions of their own; gradients that move between steps."""
    found = made(backend, dtype=dtype)
    groups = [
        {"params": found[:2], "lr": 0.3},
        {"params": found[2:], "lr": torch.tensor(0.05, dtype=F64), "maximize": True},
    ]
    optimizer = CSGD(groups, branch=True, branch_sign=sign, backend=backend)
    other = SIGNS[1 - SIGNS.index(sign)]
    for _ in range(3):
        expected = [expected_of(R, 0.3, sign) for R in found[:2]]
        expected += [expected_of(R, 0.05, other) for R in found[2:]]
        versions = [R._version for R in found]
        optimizer.step()
        near(found, expected)
        assert torch.equal(found[1], torch.ones_like(found[1]))
        assert all(R._version > old for R, old in zip(found, versions, strict=True))
        for R in found:
            assert R.min() >= 0
            if dtype == F64:
                torch.testing.assert_close(R.sum(0), torch.ones_like(R[0]), rtol=0, atol=1e-14)
            R.grad = torch.randn_like(R)
    assert not optimizer.state


@each_backend
def test_gradients_of_another_type_and_branch_weights_that_are_not_dense(backend):
    """The one has a launch of its own, the other is stepped by torch."""
    found = [*made(backend, [(3, 4), (4, 2)]), nn.Parameter(made(backend, [(5, 3)])[0].detach().t())]
    found[0].grad = None
    found[0].grad_dtype = torch.bfloat16
    found[0].grad = torch.randn_like(found[0]).bfloat16()
    found[2].grad = torch.randn_like(found[2])
    optimizer = CSGD(found, branch=True, branch_lr=0.1, backend=backend)
    expected = [expected_of(R, 0.1) for R in found]
    optimizer.step()
    near(found, expected)
    assert not found[2].is_contiguous()


@each_backend
def test_zero_everywhere_is_one_of_k(backend):
    found = [nn.Parameter(torch.full((n, 2), 0.5, device=device_of(backend))) for n in (3, 4)]
    for R in found:
        R.grad = torch.tensor([5.0, 1.0], device=R.device).expand_as(R).clone()
    CSGD(found, branch=True, branch_lr=0.1, backend=backend).step()
    for R in found:
        torch.testing.assert_close(R.detach(), torch.full_like(R, 1 / len(R)), rtol=0, atol=2**-24)


@each_backend
@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_no_learning_rate_leaves_the_bits(backend, zero):
    found = made(backend)
    before = [R.detach().clone() for R in found]
    optimizer = CSGD(found, branch=True, branch_lr=zero, backend=backend)
    optimizer.step()
    assert all(map(torch.equal, found, before))
    optimizer.param_groups[0]["lr"] = 0.1
    expected = [expected_of(R, 0.1) for R in found]
    optimizer.step()
    near(found, expected)


@each_backend
def test_those_that_would_not_be_finite_stay(backend):
    """All of it, with skip_nonfinite; the others are stepped. Without, what is not finite shows."""
    found = made(backend)
    found[3].grad.view(-1)[200] = math.nan
    found[0].grad.view(-1)[5] = -math.inf
    expected = [R.detach().clone() if i in (0, 3) else expected_of(R, 0.1) for i, R in enumerate(found)]
    CSGD(found, branch=True, branch_lr=0.1, skip_nonfinite=True, backend=backend).step()
    assert torch.equal(found[3], expected[3])
    assert torch.equal(found[0], expected[0])
    near(found, expected)
    CSGD(found, branch=True, branch_lr=0.1, backend=backend).step()
    assert not torch.isfinite(found[3]).all()
    assert torch.isfinite(found[4]).all()


@each_backend
@pytest.mark.parametrize(
    ("given", "moves"),
    [
        ({"found_inf": 1.0}, False),
        ({"norm": math.inf}, False),
        ({"norm": math.nan, "check": True}, False),
        ({"found_inf": 0.0, "norm": 3.0, "scale": 3.0, "check": True}, True),
    ],
    ids=str,
)
def test_what_a_step_is_told(backend, given, moves):
    """By a GradScaler, and about the other gradients; as it lies on the device."""
    found = made(backend)
    device = found[0].device
    tensors = {k: torch.tensor([v], device=device) for k, v in given.items() if k != "check"}
    optimizer = CSGD(found, branch=True, branch_lr=0.1, backend=backend)
    groups = optimizer.param_groups
    plan = branch.BranchPlan(groups, optimizer._engine.executor_of)
    plan.refresh(groups)
    before = [R.detach().clone() for R in found]
    expected = [expected_of(R, 0.1, scale=given.get("scale", 1.0)) if moves else R.detach() for R in found]
    told = branch_tables.Given(**tensors, check=given.get("check", False))
    with torch.no_grad():
        plan.prepare(told)
        plan.step(groups, told)
    near(found, expected)
    assert moves or all(map(torch.equal, found, before))


@pytest.mark.parametrize("backend", ["eager", TRITON])
@pytest.mark.parametrize("by", ["skip_nonfinite", "found_inf"])
def test_a_step_that_is_left_out(backend, by):
    """Also where only the device knows it, and the host goes on to the branch weights."""
    found = made(backend, [(3, 2, 2)])
    w = nn.Parameter(torch.randn(4, 3, device=found[0].device))
    groups = [{"params": [w], "noise": None}, {"params": found, "branch": True}]
    options = {"skip_nonfinite": True} if by == "skip_nonfinite" else {"fused": True}
    optimizer = CSGD(groups, lr=0.1, branch_lr=0.1, backend=backend, **options)
    if by == "found_inf":
        optimizer.found_inf = torch.ones((), device=w.device)
    w.grad = torch.full_like(w, math.nan if by == "skip_nonfinite" else 1.0)
    before = [p.detach().clone() for p in (w, *found)]
    optimizer.step()
    assert all(map(torch.equal, (w, *found), before))
    assert optimizer.skipped_steps == 1
    if by == "found_inf":
        optimizer.found_inf.zero_()
    w.grad = torch.ones_like(w)
    expected = [expected_of(R, 0.1) for R in found]
    optimizer.step()
    assert not torch.equal(w, before[0])
    near(found, expected)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_one_launch_for_all_layers(backend, monkeypatch):
    """Thirty layers of three shapes, in two groups."""
    found = made(backend, 10 * SHAPES[:3])
    groups = [{"params": found[:7], "lr": 0.1}, {"params": found[7:], "lr": 0.2}]
    optimizer = CSGD(groups, branch=True, backend=backend)
    optimizer.step()
    module = optimizer._branches._buckets[0].key.executor.branches
    whole, calls = module.step, []
    monkeypatch.setattr(module, "step", lambda *arguments: calls.append(1) or whole(*arguments))
    plan = optimizer._branches
    expected = [expected_of(R, 0.1 if i < 7 else 0.2) for i, R in enumerate(found)]
    optimizer.step()
    near(found, expected)
    assert calls == [1]
    assert optimizer._branches is plan


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_learning_rate_on_the_device(backend, dtype):
    """Is read where it lies: the host has only its address, whose lowest bit says that it is fp64."""
    device = device_of(backend)
    found = made(backend)
    lr = torch.tensor(0.25, dtype=dtype, device=device)
    rows = [[R.data_ptr(), R.grad.data_ptr(), len(R), R.numel() // len(R), 0] for R in found]
    rows[1::2] = [[*row[:4], 1] for row in rows[1::2]]
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    numbers = torch.tensor([[0.0, 0.5], [-1.0, 1.0]], dtype=F64, device=device)
    sources = torch.tensor([lr.data_ptr() + (dtype == F64), 0], device=device)
    spec = launch.BranchSpec((dtype_of("float32"),) * 2, dtype_of("float32"), CHECK=False)
    for value in (0.25, 0.0):
        lr.fill_(value)
        expected = [expected_of(R, 0.5, "literal") for R in found]
        expected[::2] = [expected_of(R, value) if value else R.detach().clone() for R in found[::2]]
        launch.branch_launch(table, numbers, sources, launch.Told(None, None, None), spec)()
        near(found, expected)


COMPILED = [("sm_90", "float32", "bfloat16"), ("sm_90", "bfloat16", "bfloat16")]
COMPILED += list(itertools.product(TARGETS, ["float32", "float64"], [None]))


@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")
@pytest.mark.parametrize(("target", "param", "grad"), COMPILED)
def test_compiles(target, param, grad):
    """For GPUs that need not be there, with everything there can be; every operation correctly rounded."""
    triton = pytest.importorskip("triton")
    compute = "float64" if param == "float64" else "float32"
    signature = {"table": "*i64", "numbers": "*fp64", "sources": "*i64", "groups": "i32"}
    signature |= {"told": launch.Told("*fp32", "*fp32", "*fp64"), "SPEC": "constexpr"}
    spec = launch.BranchSpec((dtype_of(param), dtype_of(grad or param)), dtype_of(compute), CHECK=True)
    source = triton.compiler.ASTSource(launch.branch_kernel, signature, constexprs={"SPEC": spec})
    gpu = triton.backends.compiler.GPUTarget(*TARGETS[target])
    options = {"num_warps": 4, **OPTIONS}
    built = Compiled(None, target, dict(triton.compile(source, target=gpu, options=options).asm))
    assert spilled(built) == 0
    assert target == "gfx942" or not built.inexact
