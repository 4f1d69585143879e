"""Other forms of the same rules: what the lecture writes, and rules that are each other's limits.

The lecture's momentum, its NAG and the heavy ball are in test_properties_steps.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_reference import EPS, F64
from test_reference_rules import drawn, follow

from fusedcalib import reference

T = torch.Tensor
# Paths of 12 steps with gradients of magnitudes in [0.5, 1.5]: a step makes at most 20 roundings of
# numbers below 4 on each of two sides, and what divides is at least a tenth of what it divides.
BOUND = 12 * 20 * 2 * 2 * 10 * EPS


def adagrad(theta: T, grads: list[T], eta: float = 0.1, eps: float = 0.04) -> T:
    """The lecture's update table."""
    total = torch.zeros_like(theta)
    for g in grads:
        total = total + g * g
        theta = theta - eta / torch.sqrt(total + eps) * g
    return theta


def rmsprop(theta: T, grads: list[T], eta: float = 0.1, eps: float = 0.04) -> T:
    """Lecture eq. 12 with its gamma."""
    average = torch.zeros_like(theta)
    for g in grads:
        average = 0.9 * average + 0.1 * g * g
        theta = theta - eta / torch.sqrt(average + eps) * g
    return theta


def centered_rmsprop(theta: T, grads: list[T], eta: float = 0.1, eps: float = 0.04) -> T:
    """Graves 2013, eq. 38-41, whose momentum is that of the move; there is none here."""
    n, mean = torch.zeros_like(theta), torch.zeros_like(theta)
    for g in grads:
        n = 0.9 * n + 0.1 * g * g
        mean = 0.9 * mean + 0.1 * g
        theta = theta - eta * g / torch.sqrt(n - mean * mean + eps)
    return theta


def adam(theta: T, grads: list[T], eta: float = 0.1, eps: float = 0.04) -> T:
    """Lecture eq. 13 and 14 with the table's update."""
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, g in enumerate(grads, 1):
        m = 0.8 * m + 0.2 * g
        v = 0.95 * v + 0.05 * g * g
        theta = theta - eta / torch.sqrt(v / (1 - 0.95**t) + eps) * (m / (1 - 0.8**t))
    return theta


def adadelta(theta: T, grads: list[T], eps: float = 0.04) -> T:
    """Lecture eq. 5, 10 and 11: no learning rate."""
    squares, moves = torch.zeros_like(theta), torch.zeros_like(theta)
    for g in grads:
        squares = 0.9 * squares + 0.1 * g * g
        move = -torch.sqrt(moves + eps) / torch.sqrt(squares + eps) * g
        moves = 0.9 * moves + 0.1 * move * move
        theta = theta + move
    return theta


INSIDE = {"eps": 0.04, "eps_inside_sqrt": True}
LECTURE: list[tuple[Callable[..., T], str, dict[str, Any]]] = [
    (adagrad, "Adagrad", {"lr": 0.1, **INSIDE}),
    (rmsprop, "RMSprop", {"lr": 0.1, "alpha": 0.9, **INSIDE}),
    (centered_rmsprop, "RMSprop", {"lr": 0.1, "alpha": 0.9, "centered": True, **INSIDE}),
    (adam, "Adam", {"lr": 0.1, "betas": (0.8, 0.95), **INSIDE}),
    (adam, "AdamW", {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0, **INSIDE}),
    (adadelta, "Adadelta", {"lr": 1.0, "eps": 0.04}),
]


@pytest.mark.parametrize(("form", "name", "options"), LECTURE, ids=lambda v: getattr(v, "__name__", ""))
def test_the_form_of_the_lecture(form: Callable[..., T], name: str, options: dict[str, Any]) -> None:
    w, grads = drawn(0)
    torch.testing.assert_close(follow(name, w, grads, **options), form(w, grads), rtol=0, atol=BOUND)


PLAIN = {"lr": 0.1, "weight_decay": 0.0}
SAME = [
    (("SGDW", {"momentum": 0.9}), ("SGD", {"momentum": 0.9})),
    (("SGDW", {"weight_decay": 0.1, "decoupled_weight_decay": False}), ("SGD", {"weight_decay": 0.1})),
    (("AdamW", {}), ("Adam", {})),
    (("AdamW", {"weight_decay": 0.1}), ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True})),
    # sign(m) of m = b m + (1 - b) g, whichever comes first
    (("Lion", {"betas": (0.8, 0.8)}), ("Signum", {"momentum": 0.8})),
    # without an average of differences, whatever they are
    (("Adan", {"betas": (0.8, 0.0, 0.95)}), ("Adam", {"betas": (0.8, 0.95)})),
    # without a share of the slow average; an average of one quotient
    (("AdEMAMix", {"betas": (0.8, 0.95, 0.99), "alpha": 0.0}), ("Adam", {"betas": (0.8, 0.95)})),
    (("LaProp", {"betas": (0.0, 0.95), "eps": 0.04}), ("Adam", {"betas": (0.0, 0.95), "eps": 0.04})),
    # without a ratio; a second moment that never lags behind
    (("LAMB", {"eps": 0.04, "betas": (0.8, 0.95)}), ("Adam", {"eps": 0.04, "betas": (0.8, 0.95)})),
    (("LARS", {"momentum": 0.9}), ("SGD", {"momentum": 0.9})),
    (("StableAdamW", {"betas": (0.8, 0.0), "eps": 0.04}), ("Adam", {"betas": (0.8, 0.0), "eps": 0.04})),
    # too short a memory ever to divide by it: what is left is a corrected average
    (("RAdam", {"betas": (0.0, 0.6)}), ("SGD", {})),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=lambda v: v[0])
def test_rules_that_are_others_at_certain_options(one: Any, other: Any) -> None:
    w, grads = drawn(1)
    ends = [follow(name, w, grads, **(PLAIN | options)) for name, options in (one, other)]
    torch.testing.assert_close(*ends, rtol=0, atol=BOUND)


def ruder(w: T, grads: list[T], **options: Any) -> tuple[T, Any]:
    state: dict[str, Any] = {}
    for g in grads:
        w, state = reference.ruder_nadam(w, g, state, **options)
    return w, state


def test_ruders_nadam_without_momentum_is_adam() -> None:
    w, grads = drawn(2)
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.0, 0.9), "weight_decay": 0.1}
    end, _ = ruder(w, grads, **options)
    torch.testing.assert_close(end, follow("Adam", w, grads, **options), rtol=0, atol=BOUND)


def test_ruders_nadam_and_dozats_differ_by_one_exponent() -> None:
    """With an endless schedule (0.96^psi underflows) m is corrected by 1 - b1^(t+1), else the same."""
    w, grads = drawn(3)
    b1, b2 = 0.75, 0.95  # float32 holds the powers of b1, which nadam keeps in it
    _, before = ruder(w, grads[:-1], lr=0.1, betas=(b1, b2))
    state = before | {"mu_product": b1 ** before["step"]}
    t = before["step"] + 1
    theirs, after = reference.ruder_nadam(w, grads[-1], before, lr=0.1, betas=(b1, b2), eps=0.04)
    ours, _ = reference.nadam(w, grads[-1], state, lr=0.1, betas=(b1, b2), eps=0.04, momentum_decay=1e9)
    m, root = after["exp_avg"], torch.sqrt(after["exp_avg_sq"] / (1 - b2**t)) + 0.04
    gap = 0.1 * b1 * m * (1 / (1 - b1**t) - 1 / (1 - b1 ** (t + 1))) / root
    torch.testing.assert_close(ours - theirs, gap, rtol=0, atol=BOUND)
    assert float(gap.abs().max()) > 1e-4


def test_newton_reaches_the_minimum_of_a_quadratic_at_once() -> None:
    """From anywhere; the matrix has eigenvalues in [1, 7], which magnifies 6 x 6 roundings by 7."""
    generator = torch.Generator().manual_seed(4)
    factor, start, minimum = (
        torch.rand(shape, generator=generator, dtype=F64) for shape in ((6, 6), (2, 3), (2, 3))
    )
    hessian = torch.eye(6, dtype=F64) + factor @ factor.T / 6
    grad = (hessian @ (start - minimum).flatten()).reshape(2, 3)
    got = reference.newton(start, grad, hessian)
    torch.testing.assert_close(got, minimum, rtol=0, atol=7 * 36 * EPS)


def test_newton_with_the_unit_matrix_is_sgd() -> None:
    w, (g, *_) = drawn(5)
    got = reference.newton(w, g, torch.eye(24, dtype=F64))
    assert torch.equal(got, reference.sgd(w, g, {}, lr=1.0)[0])


def test_the_coefficients_of_nesterov() -> None:
    """NAG-SC and NAG-C are one method; 0.04 * 0.25 has the root 0.1, so c = 0.9 / 1.1."""
    x, (y, g, *_) = drawn(6)
    want = reference.nesterov(x, y, g, s=0.04, coefficient=0.9 / 1.1)
    torch.testing.assert_close(reference.nag_sc(x, y, g, s=0.04, mu=0.25), want, rtol=0, atol=8 * EPS)
    for k, c in enumerate((0.0, 1 / 4, 2 / 5, 1 / 2)):
        want = reference.nesterov(x, y, g, s=0.04, coefficient=c)
        torch.testing.assert_close(reference.nag_c(x, y, g, s=0.04, k=k), want, rtol=0, atol=0)


@pytest.mark.parametrize("accelerated", [True, False])
def test_nag_c_keeps_to_its_rate(accelerated: bool) -> None:
    """f(y_k) <= 2 |x_0|^2 / (s (k + 1)^2) (Su, Boyd and Candes 2016); descent, which is c_k = 0, is
    beyond it after 1 / (2 curvature) steps."""
    curvature = torch.tensor([1.0, 1 / 400], dtype=F64)
    x = y = torch.ones(2, dtype=F64)
    for k in range(200):
        x, y = reference.nag_c(x, y, curvature * x, s=1.0, k=k if accelerated else 0)
    value = float((curvature * y * y).sum() / 2)
    assert (value <= 2 * 2 / 201**2) == accelerated


def test_torchs_nesterov_looks_ahead_of_the_lectures() -> None:
    """theta = p + lr mu b: the lecture's weights from torch's and its buffer."""
    p, curvature = drawn(7)[0], drawn(8)[0].abs() + 0.1
    theta, velocity, state = p, torch.zeros_like(p), dict[str, Any]()
    for _ in range(12):
        ahead = theta - 0.9 * velocity
        theta, velocity = reference.velocity_momentum(theta, curvature * ahead, velocity, lr=0.1, gamma=0.9)
        p, state = reference.sgd(p, curvature * p, state, lr=0.1, momentum=0.9, nesterov=True)
        torch.testing.assert_close(p + 0.1 * 0.9 * state["momentum_buffer"], theta, rtol=0, atol=BOUND)
    assert float((p - theta).abs().max()) > 1e-2
