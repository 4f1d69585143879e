"""What the papers prove of centring, on oracles and classes alike; see subjects.py."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st
from subjects import (
    ADAM,
    DRIFT,
    EPS,
    LONG,
    MATRIX,
    MOMENTUM,
    NESTEROV,
    PLAIN,
    PROPERTY,
    RULES,
    SEED,
    close,
    draw,
    each_bounded,
    each_rule,
    each_subject,
    each_without_loops,
    follow,
    path_bound,
    problem,
    row_sums,
    same_bits,
)


def projected(subject: Any, g: torch.Tensor) -> torch.Tensor:
    """P g, read off a step of SGD from zero (where there is nothing to decay) with lr = 1."""
    options = PLAIN | {"lr": 1.0, "centralize": True}
    return -follow(subject, "SGD", torch.zeros_like(g), [g], **options)


@each_subject
@PROPERTY
@given(SEED, MATRIX, st.sampled_from([0.0, 1.0, 1e3, 1e6]))
def test_p_is_an_orthogonal_projection(
    subject: Any, seed: int, shape: tuple[int, ...], offset: float
) -> None:
    """GC eq. 2, 3 and theorem 4.2: P P = P = P', row sums 0, |P g|^2 = |g|^2 - M mean^2.

    P g is off by (M + 2) u s; a sum of M products of such numbers by 4 M^2 of these at most.
    """
    x, y = (t + offset for t in draw(seed, shape, shape))
    m, s = math.prod(shape[1:]), 1 + offset
    px, py = projected(subject, x), projected(subject, y)
    close(projected(subject, px), px, (2 * m + 2) * EPS * s)
    close(row_sums(px), torch.zeros(shape[0], dtype=x.dtype), 4 * m**2 * EPS * s)
    close(row_sums(px * y), row_sums(x * py), 4 * m**2 * EPS * s**2)
    squares, mean = row_sums(x * x), row_sums(x) / m
    close(row_sums(px * px), squares - m * mean**2, 4 * m**2 * EPS * s**2)
    assert bool((row_sums(px * px) <= squares + 4 * m**2 * EPS * s**2).all())
    per_row = y.flatten(1)[:, :1].reshape(-1, *[1] * (x.ndim - 1))
    close(projected(subject, x + per_row), px, (4 * m + 4) * EPS * s)


KEEPERS = [
    ("SGD", PLAIN | {"centralize": True}),
    ("SGD", MOMENTUM | {"centralize": True}),
    ("SGD", MOMENTUM | {"centralize": True, "dampening": 0.3}),
    ("SGD", NESTEROV | {"centralize": True}),
    ("SGD", NESTEROV | {"centralize": "update"}),
    ("Adam", ADAM | {"centralize": "update"}),
]


@each_subject
@pytest.mark.parametrize(("rule", "options"), KEEPERS)
@LONG
@given(SEED, MATRIX)
def test_row_sums_never_move(
    subject: Any, rule: str, options: dict[str, Any], seed: int, shape: tuple[int, ...]
) -> None:
    """GC section 4.1: e'w stays e'w0, with coupled decay and without. Of 50 steps with M <= 12 each
    adds M roundings of weights below 8 (2 each) and lr times the row sum of a direction below 6,
    off by M^2 u: under DRIFT."""
    w, grads = problem(seed, shape, 50)
    run = subject(rule, [{"params": [w]}, {"params": [w], "weight_decay": 0}], **options)
    for g in grads:
        run.step(g, g)
    for end in run.params:
        close(row_sums(end), row_sums(w), DRIFT)


@each_subject
@LONG
@given(SEED, MATRIX, st.floats(0.01, 0.5))
def test_decoupled_decay_shrinks_row_sums_by_its_own_product(
    subject: Any, seed: int, shape: tuple[int, ...], decay: float
) -> None:
    """The decay is not centred: sum w_t = prod(1 - lr lam) sum w_0, under a schedule of lr too."""
    w, grads = problem(seed, shape, 50)
    run = subject("AdamW", [w], centralize="update", weight_decay=decay)
    expected = row_sums(w)
    for t, g in enumerate(grads):
        lr = 0.05 / (1 + t)
        run.change(lr=lr)
        run.step(g)
        expected = expected * (1 - lr * decay)
    close(row_sums(run.params[0]), expected, DRIFT)


@each_without_loops
def test_adam_with_a_centred_gradient_moves_row_sums(subject: Any) -> None:
    """The division by the root of v undoes the zero sum; so the tests above can fail."""
    w, grads = problem(0, (5, 7), 50)
    end = follow(subject, "Adam", w, grads, **ADAM, centralize="gradient")
    assert float((row_sums(end) - row_sums(w)).abs().max()) > 1e-3


@each_without_loops
@pytest.mark.parametrize("options", [PLAIN, MOMENTUM, NESTEROV])
@LONG
@given(SEED, st.floats(-2, 2))
def test_theorem_4_1_with_its_sign_corrected(
    subject: Any, options: dict[str, Any], seed: int, gamma: float
) -> None:
    """w.x - w.(x + gamma 1) = -gamma 1'w0 after training on a loss; dots of 12 products below 8."""
    w, x, target = draw(seed, (3, 12), (12, 4), (3, 4))
    run = subject("SGD", [w], **options, centralize=True)
    for _ in range(30):
        run.step((run.params[0] @ x - target) @ x.T / 12)
    end = run.params[0]
    change = end @ x[:, 0] - end @ (x[:, 0] + gamma)
    close(change, -gamma * row_sums(w), 2 * DRIFT + 2 * 12 * 12 * 8 * EPS)


@each_without_loops
@PROPERTY
@given(SEED, MATRIX)
def test_centring_commutes_with_momentum(subject: Any, seed: int, shape: tuple[int, ...]) -> None:
    """P(momentum(g)) = momentum(P g): both are linear; decay inside P is, too."""
    w, grads = problem(seed, shape, 10)
    ends = [follow(subject, "SGD", w, grads, **NESTEROV, centralize=c) for c in (True, "update")]
    close(*ends, path_bound(math.prod(shape[1:]), 10))


@each_subject
@each_rule
@pytest.mark.parametrize(
    ("shape", "min_ndim"),
    [((), 2), ((6,), 2), ((4, 1), 2), ((3, 1, 1, 1), 2), ((4, 5), 4), ((2, 3, 4), 4)],
)
def test_what_is_no_weight_matrix_is_not_centred(
    subject: Any, rule: str, shape: tuple[int, ...], min_ndim: int
) -> None:
    w, grads = problem(1, shape, 3)
    plain = follow(subject, rule, w, grads, **RULES[rule])
    for where in ("gradient", "update"):
        options = RULES[rule] | {"centralize": where, "centralize_min_ndim": min_ndim}
        same_bits(follow(subject, rule, w, grads, **options), plain)


@each_subject
@each_bounded
@PROPERTY
@given(SEED, st.sampled_from([(1, 12), (5, 7), (3, 2)]), st.randoms(use_true_random=False))
def test_columns_may_be_permuted(
    subject: Any, rule: str, seed: int, shape: tuple[int, int], random: Any
) -> None:
    w, grads = problem(seed, shape, 5)
    order = random.sample(range(shape[1]), shape[1])
    options = RULES[rule] | {"centralize": True}
    end = follow(subject, rule, w[:, order], [g[:, order] for g in grads], **options)
    close(end, follow(subject, rule, w, grads, **options)[:, order], path_bound(shape[1], 5))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.clone,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "permuted": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
}


@each_subject
@pytest.mark.parametrize("layout", LAYOUTS)
@PROPERTY
@given(SEED, MATRIX, st.sampled_from([*LAYOUTS]))
def test_strides_do_not_matter(
    subject: Any, layout: str, seed: int, shape: tuple[int, ...], other: str
) -> None:
    """Weights and gradients are paired by index, whatever the layout of either."""
    w, grads = problem(seed, shape, 3)
    options = ADAM | {"centralize": True}
    laid_out = map(LAYOUTS[other], grads)
    end = follow(subject, "Adam", LAYOUTS[layout](w), laid_out, **options)
    limit = path_bound(math.prod(shape[1:]), 3)
    close(end, follow(subject, "Adam", w, grads, **options), limit)
