"""What penalties, decay and projection do to any rule, on oracles and classes alike; see subjects.py."""

import math
from typing import Any

import numpy
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st
from subjects import (
    EPS,
    LONG,
    MATRIX,
    PROPERTY,
    RULES,
    SEED,
    close,
    draw,
    each_subject,
    each_without_loops,
    follow,
    path_bound,
    problem,
    same_bits,
)

RADII = st.floats(0.3, 1.5)
PROJECTED = pytest.mark.parametrize("rule", ["SGD", "AdamW", "Adan"])


def norms(x: torch.Tensor) -> torch.Tensor:
    """Of the rows, rounded once: summed in longer numbers."""
    squares = x.flatten(1).numpy().astype(numpy.longdouble) ** 2
    return torch.from_numpy(numpy.sqrt(squares.sum(axis=1)).astype(numpy.float64))


@each_subject
@PROJECTED
@LONG
@given(SEED, MATRIX, RADII)
def test_no_row_is_longer_than_the_largest_norm(
    subject: Any, rule: str, seed: int, shape: tuple[int, ...], radius: float
) -> None:
    """After every step. Of M squares the sum is off by M u of itself, its root by half of that; with the
    root, the quotient and the product 3 u more: a row ends below c (1 + (M / 2 + 4) u)."""
    w, grads = problem(seed, shape, 5)
    run = subject(rule, [3 * w], **RULES[rule], max_row_norm=radius)
    limit = radius * (1 + (math.prod(shape[1:]) / 2 + 4) * EPS / 2)
    for g in grads:
        run.step(g)
        assert float(norms(run.params[0]).max()) <= limit


@each_subject
@PROJECTED
@LONG
@given(SEED, MATRIX)
def test_shorter_rows_keep_their_bits_and_longer_ones_their_direction(
    subject: Any, rule: str, seed: int, shape: tuple[int, ...]
) -> None:
    """One step with the projection is one without, and then a row scaled by c / norm or left alone."""
    w, grads = problem(seed, shape, 1)
    free = follow(subject, rule, w, grads, **RULES[rule])
    lengths = norms(free)
    radius = float(lengths.median()) * (1 + 1e-9)  # between two of them
    end = follow(subject, rule, w, grads, **RULES[rule], max_row_norm=radius)
    shorter = lengths <= radius
    assert bool(shorter.any())
    same_bits(end[shorter], free[shorter].contiguous())
    scale = (radius / lengths[~shorter]).reshape(-1, *[1] * (w.ndim - 1))
    close(end[~shorter], free[~shorter] * scale, (math.prod(shape[1:]) / 2 + 4) * EPS)


@each_subject
@pytest.mark.parametrize("shape", [(), (6,), (0, 3), (4, 0)])
def test_what_has_no_rows_is_not_projected(subject: Any, shape: tuple[int, ...]) -> None:
    w, grads = problem(1, shape, 3)
    options = {"lr": 0.1, "momentum": 0.9}
    free = follow(subject, "SGD", 3 * w, grads, **options)
    same_bits(follow(subject, "SGD", 3 * w, grads, **options, max_row_norm=0.1), free)


def penalized(w: torch.Tensor, g: torch.Tensor, decay: float, l1: float) -> torch.Tensor:
    return (g + decay * w) + l1 * w.sign()


@each_subject
@pytest.mark.parametrize(
    ("rule", "own"),
    [
        ("SGD", {"momentum": 0.9}),
        ("Adagrad", {"eps": 0.1}),
        ("ADOPT", {"eps": 0.1}),
        ("AdamW", {"eps": 0.1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@PROPERTY
@given(SEED, st.sampled_from([0.0, 0.1]), st.sampled_from([0.05, 0.3]))
def test_the_elastic_net_is_part_of_the_gradient(
    subject: Any, rule: str, own: dict[str, Any], seed: int, decay: float, l1: float
) -> None:
    """g + lam w + lam_1 sign(w), added by hand in the same order, to the last bit; zeros included.

    AdamW's decay is none of the gradient's business, its l1 is."""
    w, grads = problem(seed, (5, 7), 4)
    w[0, :2] = torch.tensor([0.0, -0.0])
    coupled = rule != "AdamW"
    run = subject(rule, [w], lr=0.05, weight_decay=decay, l1=l1, **own)
    hand = subject(rule, [w], lr=0.05, weight_decay=0.0 if coupled else decay, **own)
    for g in grads:
        g[0, :2] = 0
        run.step(g)
        hand.step(penalized(hand.params[0], g, decay if coupled else 0, l1))
        assert torch.equal(run.params[0], hand.params[0])


@each_without_loops
@PROPERTY
@given(SEED)
def test_penalties_are_centred_with_the_gradient(subject: Any, seed: int) -> None:
    """P(g + lam w + lam_1 sign(w)); the sum of a row may take the terms one by one, which is two
    roundings more for each of its 7."""
    w, grads = problem(seed, (5, 7), 4)
    run = subject("SGD", [w], lr=0.05, weight_decay=0.1, l1=0.3, centralize=True)
    hand = subject("SGD", [w], lr=0.05, centralize=True)
    for g in grads:
        run.step(g)
        hand.step(penalized(hand.params[0], g, 0.1, 0.3))
    close(run.params[0], hand.params[0], path_bound(3 * 7, 4))


@each_without_loops
@PROPERTY
@given(SEED, st.floats(0.01, 2))
def test_l1_pulls_towards_zero_and_leaves_zero_alone(subject: Any, seed: int, l1: float) -> None:
    """w - lr lam_1 sign(w), sign(0) = sign(-0) = 0; ascending does not turn the penalty around."""
    (w,) = draw(seed, (5, 7))
    w[0, :2] = torch.tensor([0.0, -0.0])
    for maximize in (False, True):
        end = follow(subject, "SGD", w, [torch.zeros_like(w)], lr=0.25, l1=l1, maximize=maximize)
        close(end, w - 0.25 * (l1 * w.sign()), EPS)
        assert not end[0, :2].any()


FACTORS = st.floats(0.01, 0.5)


@each_subject
@pytest.mark.parametrize("rule", ["SGDW", "AdamW", "Lion", "Signum"])
@LONG
@given(SEED, FACTORS)
def test_decoupled_decay_alone_is_a_product(subject: Any, rule: str, seed: int, decay: float) -> None:
    """Where no gradient pulls, w_t = prod(1 - lr_s lam) w_0, to the last bit, with lr on a schedule."""
    (w,) = draw(seed, (5, 7))
    run = subject(rule, [w], weight_decay=decay)
    for t in range(10):
        lr = 0.5 / (1 + t)
        run.change(lr=lr)
        run.step(torch.zeros_like(w))
        w = w * (1 - lr * decay)
        same_bits(run.params[0], w)


@each_subject
@LONG
@given(SEED, FACTORS)
def test_proximal_decay_divides_what_the_step_has_left(subject: Any, seed: int, decay: float) -> None:
    """Adan: (w - lr u) / (1 + lr lam), the minimum of |x - (w - lr u)|^2 / 2 lr + lam |x|^2 / 2. Two
    roundings of numbers below 2 more than the division has."""
    w, (g,) = problem(seed, (5, 7), 1)
    for grad in (g, torch.zeros_like(g)):
        free = follow(subject, "Adan", w, [grad], lr=0.5, eps=0.1)
        end = follow(subject, "Adan", w, [grad], lr=0.5, eps=0.1, weight_decay=decay)
        close(end, free / (1 + 0.5 * decay), 4 * EPS)
    run, expected = subject("Adan", [w], weight_decay=decay), w
    for t in range(10):
        lr = 0.5 / (1 + t)
        run.change(lr=lr)
        run.step(torch.zeros_like(w))
        expected = expected / (1 + lr * decay)
        close(run.params[0], expected, 2 * (t + 1) * EPS)
