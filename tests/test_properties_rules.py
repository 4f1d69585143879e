"""What the papers prove of single rules, on oracles and classes alike; see subjects.py."""

import math
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st
from subjects import EPS, LONG, PROPERTY, SEED, close, draw, each_subject, follow, problem, same_bits

from fusedcalib import reference


@each_subject
@pytest.mark.parametrize(("rule", "own"), [("Lion", {}), ("Signum", {}), ("Signum", {"momentum": 0.0})])
@PROPERTY
@given(SEED, st.integers(-3, 3))
def test_signs_move_by_exactly_the_learning_rate(
    subject: Any, rule: str, own: dict[str, Any], seed: int, power: int
) -> None:
    """+lr, -lr or, where no gradient ever was, 0. Exact: weights and lr are multiples of 2^-20."""
    w, grads = problem(seed, (5, 7), 6)
    w, lr = (w * 2**20).round() / 2**20, 2.0**power
    run = subject(rule, [w], lr=lr, **own)
    for t, g in enumerate(grads):
        g[:, :3] = 0
        before = run.params[0].clone()
        run.step(g)
        steps = run.params[0] - before
        assert set(steps.unique().tolist()) <= {-lr, 0.0, lr}
        assert not steps[:, :3].any()
        assert bool(steps[:, 3:].all())
        if t == 0 or own:
            assert torch.equal(steps, -lr * g.sign())


@each_subject
@PROPERTY
@given(SEED, st.sampled_from([0.0, 0.1]))
def test_the_rate_of_adagrad_never_rises(subject: Any, seed: int, lr_decay: float) -> None:
    """-step / gradient, element by element. Weights below 8 are rounded twice in it, and |g| > 0.1."""
    w, grads = problem(seed, (5, 7), 10)
    run = subject("Adagrad", [w], lr=0.5, lr_decay=lr_decay, initial_accumulator_value=0.1)
    last = torch.full_like(w, math.inf)
    for g in grads:
        g = g + 0.1 * g.sign()
        before = run.params[0].clone()
        run.step(g)
        rate = (before - run.params[0]) / g
        assert bool((rate <= last + 2 * 2 * 8 * EPS / 0.1).all())
        assert bool((rate > 0).all())
        last = rate


BETA1, BETA2 = 0.9, 0.99
LONGEST = (1 - BETA1) / (1 - BETA1 / BETA2)


@each_subject
@PROPERTY
@given(SEED, st.sampled_from([0.92, 0.95, 0.97, 0.99, 1.0]), st.sampled_from([0, 1, 3]))
def test_a_step_of_adamax_is_bounded(subject: Any, seed: int, fall: float, tail: int) -> None:
    """Section 7.1 with its constant: u_t >= beta2^k |g_{t-k}|, so |step| <= lr (1 - b1) / (1 - b1 / b2),
    whatever the gradients: heavy tails, or falling. Weights below 8 are rounded twice, the quotient carries
    3 t + 4 roundings."""
    w, grads = problem(seed, (5, 7), 20)
    run = subject("Adamax", [w], lr=0.25, betas=(BETA1, BETA2), eps=0.0)
    for t, g in enumerate(grads):
        before = run.params[0].clone()
        run.step(fall**t / (g + 1e-9 * g.sign()) ** tail)
        limit = 0.25 * LONGEST * (1 + 64 * EPS) + 2 * 8 * EPS
        assert float((run.params[0] - before).abs().max()) <= limit


@each_subject
def test_the_bound_of_adamax_is_met(subject: Any) -> None:
    """By gradients that fall as fast as beta2."""
    run = subject("Adamax", [torch.zeros(1, dtype=torch.float64)], lr=0.25, betas=(BETA1, BETA2), eps=0.0)
    for t in range(200):
        before = run.params[0].clone()
        run.step(torch.full((1,), BETA2**t, dtype=torch.float64))
    step = abs(float(run.params[0] - before))
    assert 0.25 * LONGEST * (1 - 1e-7) < step <= 0.25 * LONGEST * (1 + 1e-12)


SCALE_FREE: dict[str, dict[str, Any]] = {
    "Adam": {},
    "Adagrad": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {"betas": (0.9, 0.9)},
    "Adan": {},
    "ADOPT": {},
    "Lion": {},
    "Signum": {},
}


@each_subject
@pytest.mark.parametrize(("rule", "own"), SCALE_FREE.items(), ids=SCALE_FREE)
@LONG
@given(SEED, st.integers(-10, 10))
def test_the_scale_of_the_gradient_is_not_seen(
    subject: Any, rule: str, own: dict[str, Any], seed: int, power: int
) -> None:
    """g -> 2^k g rounds nothing, and an eps of 1e-30 vanishes beside what it is added to: the same bits.

    |g| > 0.5. RAdam is like that from where it is rectified: with beta2 = 0.9 after its 6th step, up to
    which lr is 0. Adadelta's own steps begin at the root of eps; from zero they are seen."""
    (w, *grads) = draw(seed, *[(4, 6)] * 13)
    eps = {} if rule in ("Lion", "Signum") else {"eps": 1e-30}
    runs = [subject(rule, [torch.zeros_like(w)], lr=0.0, **eps, **own) for _ in "ab"]
    for t, g in enumerate(grads):
        for run, scale in zip(runs, (1.0, 2.0**power), strict=True):
            run.change(lr=0.0 if t < 6 else 0.05)
            run.step(scale * (g + 0.5 * g.sign()))
    one, other = (run.params[0] for run in runs)
    assert bool(one.any())
    same_bits(other, one)


@each_subject
@PROPERTY
@given(SEED)
def test_nadam_without_momentum_is_adam_without(subject: Any, seed: int) -> None:
    """With beta1 = 0 there is nothing to look ahead along: Dozat's form, Ruder's and Adam are one.

    m + (g - m) is g up to two roundings; over a floor of 0.1, with lr = 0.05 and those of the weights:
    below 8 EPS a step."""
    w, grads = problem(seed, (5, 7), 10)
    options = {"lr": 0.05, "betas": (0.0, 0.95), "eps": 0.1, "weight_decay": 0.1}
    adam = follow(subject, "Adam", w, grads, **options)
    close(follow(subject, "NAdam", w, grads, **options), adam, 10 * 8 * EPS)
    state: dict[str, Any] = {}
    for g in grads:
        w, state = reference.ruder_nadam(w, g, state, **options)
    close(w, adam, 10 * 8 * EPS)
