"""Clipping by the norm in one process: torch's semantics, hostile values, named groups."""

import doctest
import math
from pathlib import Path

import pytest
import torch

import fusedcalib
from fusedcalib import clip_grad_norm_, get_total_norm, nonfinite_gradients

F64 = torch.float64
EPS = torch.finfo(F64).eps


def parameters(*gradients):
    made = []
    for g in gradients:
        p = torch.nn.Parameter(torch.zeros_like(g))
        p.grad = g.clone(memory_format=torch.preserve_format)
        made.append(p)
    return made


def some(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = ((70, 900), (3, 5, 2), (11,), (), (0, 4))  # the first is widened in two pieces
    return [torch.randn(shape, dtype=F64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [1.0, 1e9])
def test_as_torch(p, max_norm):
    """In fp64; sums of 63,000 terms in another order: their rounding, and that of the root."""
    ours, theirs = parameters(*some(F64)), parameters(*some(F64))
    norm = clip_grad_norm_(ours, max_norm, p)
    full = [q for q in theirs if q.numel()]  # of an empty tensor torch has no largest element
    expected = torch.nn.utils.clip_grad_norm_(full, max_norm, p)
    assert norm.dtype == F64
    assert norm.ndim == 0
    assert abs(norm / expected - 1) < 63_046 * EPS
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=2 * 63_046 * EPS, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_the_norm_is_exact_and_the_product_rounded_once(dtype):
    grads = some(dtype)
    ours = parameters(*grads)
    norm = clip_grad_norm_(ours, 1.0)
    exact = math.sqrt(math.fsum(g.abs().double().square().sum().item() for g in grads))
    assert abs(norm.item() / exact - 1) < (1e-7 if dtype.is_complex else 1e-12)  # abs() rounds in fp32
    factor = (1.0 / (norm + 1e-6)).float()
    for p, g in zip(ours, grads, strict=True):
        assert torch.equal(p.grad, (g.cfloat() if dtype.is_complex else g.float()).mul(factor).to(dtype))


def test_squares_that_overflow_fp32():
    big, small = torch.full((100,), 1e30), torch.full((4,), 3.0).bfloat16()
    ours, theirs = parameters(big, small), parameters(big, small)
    assert clip_grad_norm_(ours, 1.0).item() == pytest.approx(1e31, rel=1e-6)
    assert get_total_norm([p.grad for p in ours]).item() == pytest.approx(1.0, rel=1e-6)
    assert torch.isinf(torch.nn.utils.clip_grad_norm_(theirs, 1.0))  # which makes its gradients 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_norms_that_are_not_finite(bad):
    grads = [torch.tensor([1.0, bad]), torch.tensor([2.0])]
    ours, theirs = parameters(*grads), parameters(*grads)
    named = [("weight", ours[0]), ("bias", ours[1])]
    with pytest.raises(RuntimeError, match="not finite: see the gradients of weight"):
        clip_grad_norm_(named, 1.0, error_if_nonfinite=True)
    for p, g in zip(ours, grads, strict=True):
        assert torch.equal(p.grad.nan_to_num(), g.nan_to_num())
    assert nonfinite_gradients(named) == ["weight"]
    assert nonfinite_gradients(reversed(ours)) == ["parameter 1"]
    clip_grad_norm_(ours, 1.0)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p.grad.isnan(), q.grad.isnan())
        assert torch.equal(p.grad.nan_to_num(), q.grad.nan_to_num())


def test_each_gradient_once():
    a, b = parameters(torch.tensor([3.0]), torch.tensor([4.0]))
    alias = torch.nn.Parameter(torch.zeros(1))
    alias.grad = b.grad
    assert clip_grad_norm_([a, b, a, alias], 1.0).item() == 5.0
    assert torch.allclose(torch.cat([a.grad, b.grad]), torch.tensor([0.6, 0.8]))


def test_whatever_holds_parameters():
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    norm = get_total_norm([p.grad for p in model.parameters()])
    one = torch.optim.SGD(model.named_parameters(), lr=1.0)
    two = [fusedcalib.AdamW([p]) for p in model.parameters()]
    for source in (model, model.named_parameters(), one, two, (p for p in model.parameters())):
        assert clip_grad_norm_(source, math.inf).equal(norm)
    assert clip_grad_norm_(model.weight, math.inf).item() == pytest.approx(math.sqrt(6))
    one.param_groups[0]["params"][1].grad[0] = math.inf
    assert nonfinite_gradients(one) == ["bias"]
    with pytest.raises(TypeError, match=r"pass model\.parameters\(\)"):
        clip_grad_norm_({"a": 1}, 1.0)


def test_nothing_to_clip():
    assert clip_grad_norm_([], 1.0).item() == 0
    assert clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0).item() == 0
    (zero,) = parameters(torch.zeros(3))
    assert clip_grad_norm_([zero], 1.0).item() == 0
    assert zero.grad.tolist() == [0, 0, 0]
    assert nonfinite_gradients([]) == []


def test_strides_are_kept():
    g = torch.randn(4, 6).t()
    (p,) = parameters(g)
    gradient = p.grad
    norm = clip_grad_norm_([p], 1.0, foreach=False)
    assert p.grad is gradient
    assert torch.allclose(p.grad, g / norm, atol=1e-6)


def test_named_groups():
    a, b, c = parameters(torch.tensor([3.0, 4.0]), torch.tensor([30.0]), torch.tensor([0.1]))
    found = clip_grad_norm_([a, b, c], {"experts": 2.0, "other": 5.0}, groups={"experts": [b]})
    assert {name: round(norm.item(), 3) for name, norm in found.items()} == {"experts": 30.0, "other": 5.001}
    assert b.grad.item() == pytest.approx(2.0)
    assert get_total_norm([a.grad, c.grad]).item() == pytest.approx(5.0)
    with pytest.raises(ValueError, match='in groups "x" and "y"'):
        clip_grad_norm_([a], 1.0, groups={"x": [a], "y": [a]})
    with pytest.raises(ValueError, match="rename it"):
        clip_grad_norm_([a], 1.0, groups={"other": [a]})
    with pytest.raises(ValueError, match="the groups are"):
        clip_grad_norm_([a, b], {"x": 1.0}, groups={"x": [a]})
    with pytest.raises(ValueError, match="one ZClip cannot follow several"):
        clip_grad_norm_([a, b], fusedcalib.ZClip(), groups={"x": [a]})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_norm": -1.0}, ValueError, "at least 0"),
        ({"max_norm": math.nan}, ValueError, "at least 0"),
        ({"norm_type": 0.0}, ValueError, "has to be positive"),
        ({"max_norm": fusedcalib.AdaGC(), "norm_type": 1.0}, ValueError, "leave norm_type at 2"),
        ({"process_groups": "pp"}, TypeError, "give process groups or meshes"),
    ],
)
def test_what_makes_no_sense_changes_nothing(options, error, words):
    (p,) = parameters(torch.tensor([3.0]))
    with pytest.raises(error, match=words):
        clip_grad_norm_([p], **{"max_norm": 1.0, **options})
    assert p.grad.item() == 3.0


def test_sparse_gradients_are_refused():
    (p,) = parameters(torch.tensor([3.0]))
    table = torch.nn.Parameter(torch.zeros(3, 2))
    table.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (3, 2))
    with pytest.raises(RuntimeError, match=r"table is torch.sparse_coo.*to_dense"):
        clip_grad_norm_([("p", p), ("table", table)], 1.0)
    assert p.grad.item() == 3.0


def test_a_limit_on_the_device():
    (p,) = parameters(torch.tensor([3.0]))
    clip_grad_norm_([p], torch.tensor(1.5))
    assert p.grad.item() == pytest.approx(1.5)


def test_the_examples_of_its_page():
    page = Path(__file__).resolve().parents[1] / "docs" / "clipping.md"
    torch.manual_seed(0)
    done = doctest.testfile(str(page), module_relative=False)
    assert done.attempted > 10
    assert done.failed == 0
