"""The stages around a rule: each alone, and their order, against the formulas written out by hand."""

import math
from typing import Any

import pytest
import torch
from test_reference import EPS, F64

from fusedcalib import reference
from fusedcalib.reference import ORACLES


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 5), (4, 2, 3, 3), (1, 2), (0, 3)])
def test_centralize_is_the_projection_matrix(shape: tuple[int, ...]) -> None:
    """GC eq. 2, the matrix written out. M roundings of numbers below 1 in a sum, 2 outside it."""
    x, m = torch.rand(shape, dtype=F64), math.prod(shape[1:])
    e = torch.full((m, 1), m**-0.5, dtype=F64)
    want = x.reshape(shape[0], m) @ (torch.eye(m, dtype=F64) - e @ e.T)
    got = reference.centralize(x)
    torch.testing.assert_close(got, want.reshape(shape), rtol=0, atol=(m + 2) * EPS)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (4, 1), (4, 1, 1, 1), (3, 0), (0,), (0, 0)])
def test_rows_of_fewer_than_two_elements_are_left_alone(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, dtype=F64)
    assert torch.equal(reference.centralize(x), x)


def test_min_ndim_spares_what_has_fewer_dimensions() -> None:
    x = torch.rand(2, 3, 4)
    assert torch.equal(reference.centralize(x, min_ndim=4), x)
    assert not torch.equal(reference.centralize(x, min_ndim=3), x)


KINDS = [
    ("coupled", {}, "coupled"),
    ("coupled", {"decoupled_weight_decay": True}, "decoupled"),
    ("decoupled", {}, "decoupled"),
    ("decoupled", {"decoupled_weight_decay": False}, "coupled"),
    ("proximal", {}, "proximal"),
    ("proximal", {"no_prox": True}, "decoupled"),
]


@pytest.mark.parametrize("where", [False, "gradient", "update"])
@pytest.mark.parametrize(("declared", "option", "kind"), KINDS)
def test_the_order_of_a_step(declared: Any, option: dict[str, bool], kind: str, where: Any) -> None:
    """Every stage at once, around a rule that is not linear, against the formulas in a row. About 20
    roundings of numbers below 16, which no stage magnifies: below 160 EPS."""

    @reference.oracle(lr=0.1, weight_decay=0.2, decay=declared)
    def cube(g: torch.Tensor, state: dict[str, Any], *, scale: float = 1.0) -> Any:
        return scale * g**3, {"seen": g}

    generator = torch.Generator().manual_seed(0)
    w, g = (torch.rand(3, 4, generator=generator, dtype=F64) - 0.5 for _ in range(2))
    w[0] = 0
    options = {"scale": 2.0, "maximize": True, "l1": 0.3, "max_row_norm": 0.4, **option}
    got, state = cube(w, g, {}, centralize=where, **options)

    seen = -g + (0.2 * w if kind == "coupled" else 0) + 0.3 * torch.sign(w)
    seen = seen - seen.mean(1, keepdim=True) if where == "gradient" else seen
    update = 2.0 * seen**3
    update = update - update.mean(1, keepdim=True) if where == "update" else update
    want = (w * (1 - 0.1 * 0.2) if kind == "decoupled" else w) - 0.1 * update
    want = want / (1 + 0.1 * 0.2) if kind == "proximal" else want
    norms = [math.hypot(*row) for row in want.tolist()]
    assert min(norms) < 0.4 < max(norms)
    want = torch.stack([row * min(1, 0.4 / norm) for row, norm in zip(want, norms, strict=True)])
    torch.testing.assert_close(state["seen"], seen, rtol=0, atol=160 * EPS)
    torch.testing.assert_close(got, want, rtol=0, atol=160 * EPS)


def test_a_rule_may_stay_where_it_is() -> None:
    """Neither decay nor projection moves the weights then."""

    @reference.oracle(lr=0.1, decay="decoupled")
    def stay(g: torch.Tensor, state: dict[str, Any]) -> Any:
        return None, {"count": state.get("count", 0) + 1}

    w = torch.ones(2, 3)
    got, state = stay(w, w, {"count": 1}, weight_decay=1.0, max_row_norm=0.1, centralize="update")
    assert torch.equal(got, w)
    assert got is not w
    assert state == {"count": 2}


@pytest.mark.parametrize("name", ORACLES)
def test_an_l1_penalty_is_part_of_the_gradient(name: str) -> None:
    """For every kind of decay, and with sign(0) = 0. The penalty turns three elements around, so that
    a rule that only sees signs sees it; so would a sign(0) that is not 0. Coupled decay is added
    first: 2 roundings of 1, times 10 over |g| > 0.1, times RMSprop's 10, times lr: below 20 EPS."""
    w = torch.tensor([[0.5, 0.0, -0.7], [0.0, 0.9, -0.1]], dtype=F64)
    g = torch.tensor([[-0.1, 0.1, 0.05], [-0.1, -0.1, 0.6]], dtype=F64)
    by_hand = torch.tensor([[0.15, 0.1, -0.2], [-0.1, 0.15, 0.35]], dtype=F64)
    state: Any = {"step": 1, "exp_avg": 0 * g, "exp_avg_sq": g**2 + 1} if name == "ADOPT" else {}
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
    got = ORACLES[name](w, g, state, l1=0.25, **options)[0]
    want = ORACLES[name](w, by_hand, state, **options)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=20 * EPS)


def test_elastic_net_is_its_penalty() -> None:
    """SGD on Lambda (beta w^2 + |w|) by autograd is weight_decay = 2 Lambda beta, l1 = Lambda."""
    w = torch.tensor([0.5, -2.0, 0.0, 3.0], dtype=F64, requires_grad=True)
    (0.3 * (0.7 * w**2 + w.abs())).sum().backward()
    assert w.grad is not None
    plain, zero = w.detach(), torch.zeros(4, dtype=F64)
    got = reference.sgd(plain, zero, {}, lr=0.1, weight_decay=2 * 0.3 * 0.7, l1=0.3)[0]
    torch.testing.assert_close(got, plain - 0.1 * w.grad, rtol=0, atol=4 * EPS * 3)


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 5), (4, 1), (5, 2, 3, 3)])
def test_rows_are_projected_on_the_ball(shape: tuple[int, ...]) -> None:
    """Rows outside come onto the sphere and keep their direction, off by M + 4 roundings of 1; rows
    inside and on it keep their bits."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    flat, m = w.flatten(1), math.prod(shape[1:])
    lengths = torch.tensor([math.hypot(*row) for row in flat.tolist()], dtype=F64)
    c = float(lengths.median())
    got = reference.project_rows(w, c).flatten(1)
    inside = lengths < c * (1 - m * EPS)
    outside = lengths > c * (1 + m * EPS)
    assert inside.any()
    assert outside.any()
    assert torch.equal(got[inside], flat[inside])
    want = flat[outside] / lengths[outside, None] * c
    torch.testing.assert_close(got[outside], want, rtol=(m + 4) * EPS, atol=0)
    again = reference.project_rows(got, c)
    torch.testing.assert_close(again, got, rtol=(m + 4) * EPS, atol=0)


def test_what_the_ball_leaves_alone() -> None:
    on_it = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=F64)
    assert torch.equal(reference.project_rows(on_it, 5.0), on_it)
    for shape in ((), (5,), (0, 3), (3, 0)):
        x = torch.full(shape, 7.0)
        assert torch.equal(reference.project_rows(x, 0.1), x)
    x = torch.full((2, 2), 7.0)
    assert torch.equal(reference.project_rows(x, None), x)
