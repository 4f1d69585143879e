"""What the papers prove of the steps, on oracles and classes alike; see subjects.py."""

import io
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st
from subjects import (
    ADAM,
    BOUNDED,
    EPS,
    MOMENTUM,
    NESTEROV,
    PROPERTY,
    RULES,
    SEED,
    close,
    draw,
    each_bounded,
    each_facade,
    each_rule,
    each_subject,
    each_without_loops,
    follow,
    problem,
    same_bits,
)

from fusedcalib import reference


@each_subject
@each_bounded
@pytest.mark.parametrize("where", [False, "gradient", "update"])
def test_lr_zero_moves_nothing(subject: Any, rule: str, where: Any) -> None:
    w, grads = problem(2, (5, 7), 3)
    options = RULES[rule] | {"lr": 0.0, "centralize": where}
    same_bits(follow(subject, rule, w, grads, **options), w)


@each_subject
@PROPERTY
@given(SEED, st.integers(-6, 6))
def test_the_first_step_of_adam_is_the_sign(subject: Any, seed: int, power: int) -> None:
    """w - lr sign(g): a quotient of 8 roundings, times lr; eps vanishes beside |g| >= 1e-8."""
    w, g = draw(seed, (4, 6), (4, 6))
    g = g * 10.0**power + 1e-8 * g.sign()
    end = follow(subject, "AdamW", w, [g], lr=0.5, eps=1e-30, weight_decay=0.1)
    close(end, (1 - 0.5 * 0.1) * w - 0.5 * g.sign(), (0.5 * 8 + 4) * EPS)


@each_without_loops
@pytest.mark.parametrize("where", [False, "gradient", "update"])
@PROPERTY
@given(SEED, st.integers(-10, 10))
def test_adam_does_not_see_the_scale_of_the_gradient(subject: Any, where: Any, seed: int, power: int) -> None:
    """g -> c g with eps -> 0; decoupled decay does not see g. To the last bit for a power of two,
    which rounds nothing.

    Else (not centred, |g| in [0.5, 1.5]) m carries 3 T + 4 roundings of 1.5, over a root of v
    above 0.5; with those of the root 6 (3 T + 6) u per direction, lr T = 0.2 and two sides: below
    64 EPS with those of the weights.
    """
    w, grads = problem(seed, (4, 6), 10)
    grads = [g + 0.5 * g.sign() for g in grads]
    options = ADAM | {"eps": 1e-30, "centralize": where}
    once, twofold, tenfold = (
        follow(subject, "AdamW", w, [c * g for g in grads], **options) for c in (1.0, 2.0**power, 10.0**power)
    )
    same_bits(twofold, once)
    if not where:
        close(tenfold, once, 64 * EPS)


Gradient = Callable[[torch.Tensor], torch.Tensor]
STRONG, SMOOTH = 0.1, 0.05
NAG_SC = (1 - math.sqrt(STRONG * SMOOTH)) / (1 + math.sqrt(STRONG * SMOOTH))


def lecture(w: torch.Tensor, grad: Gradient) -> Iterator[torch.Tensor]:
    v = torch.zeros_like(w)
    while True:
        w, v = reference.velocity_momentum(w, grad(w), v, lr=0.05, gamma=0.9)
        yield w


def lecture_nag(w: torch.Tensor, grad: Gradient) -> Iterator[torch.Tensor]:
    """The lecture's NAG, seen at the point where it takes its gradient."""
    v = torch.zeros_like(w)
    while True:
        w, v = reference.velocity_momentum(w, grad(w - 0.9 * v), v, lr=0.05, gamma=0.9)
        yield w - 0.9 * v


def average(w: torch.Tensor, grad: Gradient) -> Iterator[torch.Tensor]:
    m = torch.zeros_like(w)
    while True:
        w, m = reference.ema_momentum(w, grad(w), m, alpha=0.05 / (1 - 0.9), beta=0.9)
        yield w


def polyak(w: torch.Tensor, grad: Gradient) -> Iterator[torch.Tensor]:
    before = w
    while True:
        w, before = reference.heavy_ball(w, before, grad(w), s=0.05, alpha=0.9), w
        yield w


def nag_sc(w: torch.Tensor, grad: Gradient) -> Iterator[torch.Tensor]:
    y = w
    while True:
        w, y = reference.nesterov(w, y, grad(w), s=SMOOTH, coefficient=NAG_SC)
        yield w


FORMS = [(lecture, MOMENTUM), (lecture_nag, NESTEROV), (average, MOMENTUM), (polyak, MOMENTUM)]
FORMS += [(nag_sc, {"lr": SMOOTH, "momentum": NAG_SC, "nesterov": True, "weight_decay": 0.1})]


@each_without_loops
@pytest.mark.parametrize(("form", "options"), FORMS)
@PROPERTY
@given(SEED)
def test_momentum_of_the_papers_is_momentum_of_torch(
    subject: Any, form: Any, options: dict[str, Any], seed: int
) -> None:
    """On a quadratic, with P(g + lam w); the average is GC algorithm 1 to the letter. Of 20 steps
    on two sides each adds 14 EPS at weights below 4, which momentum passes on at most 10-fold."""
    w, curvature, target = draw(seed, (4, 6), (4, 6), (4, 6))

    def grad(x: torch.Tensor) -> torch.Tensor:
        return (0.55 + 0.45 * curvature) * (x - target)

    run = subject("SGD", [w], **options, centralize=True)
    paper = form(w, lambda x: reference.centralize(grad(x) + 0.1 * x))
    for point in itertools.islice(paper, 20):
        run.step(grad(run.params[0]))
        close(run.params[0], point, 20 * 2 * 14 * 10 * EPS)


@PROPERTY
@given(SEED)
def test_nag_c_takes_two_coefficients_a_step(seed: int) -> None:
    """The identity of `reference.nesterov`; the same bound."""
    w, target = draw(seed, (4, 6), (4, 6))
    x, y, z, b, last = w, w, w, torch.zeros_like(w), 0.0
    for k in range(20):
        c = k / (k + 3)
        x, y = reference.nesterov(x, y, x - target, s=0.05, coefficient=c)
        g = z - target
        b = last * b + g
        z, last = z - 0.05 * (g + c * b), c
        close(z, x, 20 * 2 * 14 * 10 * EPS)


SHAPES = ((5, 7), (33,), (), (0, 3), (4, 3, 2, 2), (6, 1))
GROUPED = [
    {},
    {"centralize": "update", "lr": 0.01},
    {"centralize": True, "centralize_min_ndim": 4},
    {"weight_decay": 0.2, "l1": 0.1},
    {"centralize": False, "weight_decay": 0, "max_row_norm": 0.5},
    {"lr": 0.0},
]


@each_facade
@pytest.mark.parametrize(
    ("rule", "own"),
    [
        *((rule, [{}] * len(SHAPES)) for rule in RULES),
        *((rule, GROUPED) for rule in ("SGD", "AdamW", "Adan")),
    ],
)
def test_grouping_changes_no_bit(facade: Any, rule: str, own: list[dict[str, Any]]) -> None:
    """Many tensors at once, in groups split as one likes, or one optimizer each: the same weights."""
    options = RULES[rule] | {"centralize": True}
    weights, steps = draw(3, *SHAPES), [draw(seed, *SHAPES) for seed in (4, 5, 6)]
    groups = [{"params": [w]} | o for w, o in zip(weights, own, strict=True)]
    runs = [facade(rule, groups, **options)]
    runs += [facade(rule, weights, **options)] if own is not GROUPED else []
    for run in runs:
        for grads in steps:
            run.step(*grads)
    for i, w in enumerate(weights):
        alone = follow(facade, rule, w, [grads[i] for grads in steps], **(options | own[i]))
        for run in runs:
            same_bits(run.params[i], alone)


@each_facade
@each_rule
def test_training_resumes_to_the_bit(facade: Any, rule: str) -> None:
    options = RULES[rule] | {"centralize": True}
    whole = facade(rule, draw(7, *SHAPES), **options)
    steps = [draw(seed, *SHAPES) for seed in range(8, 14)]
    for grads in steps[:3]:
        whole.step(*grads)
    resumed = facade(rule, whole.params, **options)
    saved = io.BytesIO()
    torch.save(whole.optimizer.state_dict(), saved)
    saved.seek(0)
    resumed.optimizer.load_state_dict(torch.load(saved, weights_only=True))
    for grads in steps[3:]:
        whole.step(*grads)
        resumed.step(*grads)
    for a, b in zip(whole.params, resumed.params, strict=True):
        same_bits(a, b)


@each_facade
@pytest.mark.parametrize(
    ("rule", "where", "maximize"),
    [*itertools.product(BOUNDED, (False, "gradient", "update"), [False]), ("SGD", True, True)],
)
def test_the_gradient_is_only_read(facade: Any, rule: str, where: Any, maximize: bool) -> None:
    w, g = draw(14, (5, 7), (5, 7))
    run = facade(rule, [w], **RULES[rule], centralize=where, maximize=maximize)
    run.step(g.clone())
    same_bits(run.leaves[0].grad.cpu(), g)
