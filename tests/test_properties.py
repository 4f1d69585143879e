"""What the papers prove, run on the oracles and on the optimizer classes alike, in float64.

Every tolerance is a worst case: u = EPS / 2 is the error of one rounding, a mean of M numbers
below s is off by at most M u s, in whatever order it is summed.
"""

import importlib.util
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedcalib
from fusedcalib import reference

EPS = torch.finfo(torch.float64).eps
DRIFT = 1e-12
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
LONG = settings(PROPERTY, max_examples=8)


class Oracle:
    """Weights under an oracle; the same few verbs as `Facade`."""

    def __init__(self, rule: str, params: Sequence[Any], **options: Any) -> None:
        groups = [p if isinstance(p, dict) else {"params": [p]} for p in params]
        self.params = [w for group in groups for w in group["params"]]
        self.states: list[dict[str, Any]] = [{} for _ in self.params]
        self.options = [options | group for group in groups for _ in group["params"]]
        self.function = reference.ORACLES[rule]

    def step(self, *grads: torch.Tensor) -> None:
        for i, (w, g, state) in enumerate(zip(self.params, grads, self.states, strict=True)):
            own = {key: value for key, value in self.options[i].items() if key != "params"}
            self.params[i], self.states[i] = self.function(w, g, state, **own)

    def change(self, **options: Any) -> None:
        self.options = [own | options for own in self.options]


class Facade:
    """Weights under a class of the package; `params` holds tensors or param groups of tensors."""

    def __init__(self, backend: str, rule: str, params: Sequence[Any], **options: Any) -> None:
        self.device = "cuda" if backend == "triton" else "cpu"
        self.leaves: list[torch.nn.Parameter] = []
        self.optimizer = getattr(fusedcalib, rule)(
            [self.own(p) for p in params], backend=backend, **options
        )

    def own(self, entry: Any) -> Any:
        """Copy weights, strides and gaps between them included."""
        if isinstance(entry, dict):
            return entry | {"params": [self.own(p) for p in entry["params"]]}
        x = torch.empty_strided(entry.shape, entry.stride(), dtype=entry.dtype, device=self.device)
        self.leaves.append(torch.nn.Parameter(x.copy_(entry)))
        return self.leaves[-1]

    @property
    def params(self) -> list[torch.Tensor]:
        return [p.detach().cpu() for p in self.leaves]

    def step(self, *grads: torch.Tensor) -> None:
        for p, g in zip(self.leaves, grads, strict=True):
            p.grad = g.to(self.device)
        self.optimizer.step()

    def change(self, **options: Any) -> None:
        for group in self.optimizer.param_groups:
            group.update(options)


# numba is an optional dependency and triton needs a GPU; what is here is tested.
BACKENDS = ["eager"]
BACKENDS += ["numba"] if importlib.util.find_spec("numba") else []
BACKENDS += ["triton"] if torch.cuda.is_available() else []
FACADES = {name: partial(Facade, name) for name in BACKENDS}
SUBJECTS: dict[str, Callable[..., Any]] = {"oracle": Oracle, **FACADES}
each_subject = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS.keys())
each_facade = pytest.mark.parametrize("facade", FACADES.values(), ids=FACADES.keys())

MATRICES = ((1, 12), (5, 7), (3, 2), (4, 2, 5), (3, 1, 3, 3), (2, 3, 2, 2))
MATRIX = st.sampled_from(MATRICES)
SEED = st.integers(0, 2**32 - 1)
# Few combinations of options on purpose: a compiled backend takes seconds for each. So there is
# always a decay where a property allows one.
PLAIN = {"lr": 0.05, "weight_decay": 0.1}
MOMENTUM = PLAIN | {"momentum": 0.9}
NESTEROV = MOMENTUM | {"nesterov": True}
# A floor of 0.1 under the denominator bounds how much Adam can magnify a rounding of g.
ADAM = {"lr": 0.02, "eps": 0.1, "weight_decay": 0.1}
RULES = {"SGD": NESTEROV, "Adam": ADAM, "AdamW": ADAM}
each_rule = pytest.mark.parametrize("rule", RULES)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Numbers in [-1, 1], one tensor per shape."""
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.rand(s, generator=generator, dtype=torch.float64) - 1 for s in shapes]


def problem(seed: int, shape: tuple[int, ...], steps: int) -> tuple[Any, list[torch.Tensor]]:
    weight, *grads = draw(seed, *[shape] * (steps + 1))
    return weight, grads


def follow(subject: Any, rule: str, w: torch.Tensor, grads: Any, **options: Any) -> torch.Tensor:
    """The weights after one step per gradient."""
    run = subject(rule, [w], **options)
    for g in grads:
        run.step(g)
    return run.params[0]


def row_sums(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).sum(1)


def close(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(actual.contiguous().view(torch.int64), expected.view(torch.int64))


def path_bound(m: int, steps: int) -> float:
    """How far two right ways along one path of `steps` <= 10 from weights and gradients <= 1 part.

    SGD: weights stay below 8, each step rounds them twice; a direction is below 12, carries
    2 m + 12 roundings (two means, momentum, decay) and is scaled by lr = 0.05. Adam: an error of g
    reaches the direction at most 40-fold (twice each through m and through the root of v, which
    is a norm of the gradients, so moves no more than they do, over the floor of 0.1), lr = 0.02:
    0.8 (2 m + 12) is above both.
    """
    return steps * EPS * (8 + 0.8 * (2 * m + 12))


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


@each_subject
def test_adam_with_a_centred_gradient_moves_row_sums(subject: Any) -> None:
    """The division by the root of v undoes the zero sum; so the tests above can fail."""
    w, grads = problem(0, (5, 7), 50)
    end = follow(subject, "Adam", w, grads, **ADAM, centralize="gradient")
    assert float((row_sums(end) - row_sums(w)).abs().max()) > 1e-3


@each_subject
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


@each_subject
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
@each_rule
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


@each_subject
@each_rule
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


@each_subject
@pytest.mark.parametrize("where", [False, "gradient", "update"])
@PROPERTY
@given(SEED, st.integers(-10, 10))
def test_adam_does_not_see_the_scale_of_the_gradient(
    subject: Any, where: Any, seed: int, power: int
) -> None:
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
        follow(subject, "AdamW", w, [c * g for g in grads], **options)
        for c in (1.0, 2.0**power, 10.0**power)
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


@each_subject
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
    {"weight_decay": 0.2},
    {"centralize": False, "weight_decay": 0},
    {"lr": 0.0},
]


@each_facade
@each_rule
@pytest.mark.parametrize("own", [[{}] * len(SHAPES), GROUPED], ids=["same", "own"])
def test_grouping_changes_no_bit(facade: Any, rule: str, own: list[dict[str, Any]]) -> None:
    """Many tensors at once, in groups, or one optimizer each: the same weights."""
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
    [*itertools.product(RULES, (False, "gradient", "update"), [False]), ("SGD", True, True)],
)
def test_the_gradient_is_only_read(facade: Any, rule: str, where: Any, maximize: bool) -> None:
    w, g = draw(14, (5, 7), (5, 7))
    run = facade(rule, [w], **RULES[rule], centralize=where, maximize=maximize)
    run.step(g.clone())
    same_bits(run.leaves[0].grad.cpu(), g)
