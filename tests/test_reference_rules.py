"""Rules that torch has not, against their papers in plain numbers, and what the papers prove."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from test_reference import EPS, F64

from fusedcalib import reference
from fusedcalib.reference import ORACLES

# The last one turns Lion's c, but would not with its betas exchanged.
GRADIENTS = (0.7, -1.3, 2.1, 0.4, -0.6)
End = dict[str, float]
LR, DECAY = 0.1, 0.3


def sign(x: float) -> float:
    return (x > 0) - (x < 0)


def lion(w: float) -> End:
    """Chen et al. 2023, algorithm 2: c, then the weights, then m."""
    m = 0.0
    for g in GRADIENTS:
        c = 0.6 * m + 0.4 * g
        w = w - LR * (sign(c) + DECAY * w)
        m = 0.8 * m + 0.2 * g
    return {"param": w, "exp_avg": m}


def signum(w: float) -> End:
    """Bernstein et al. 2018, algorithm 2; decay as in majority vote, algorithm 1."""
    m = 0.0
    for g in GRADIENTS:
        m = 0.6 * m + 0.4 * g
        w = w - LR * (sign(m) + DECAY * w)
    return {"param": w, "momentum_buffer": m}


def sign_sgd(w: float) -> End:
    """Bernstein et al. 2018, algorithm 1."""
    for g in GRADIENTS:
        w = w - LR * (sign(g) + DECAY * w)
    return {"param": w}


def sgdw(w: float) -> End:
    """Loshchilov and Hutter 2019, algorithm 1: eta = 1, alpha LR, the decay times LR, as in torch."""
    m = 0.0
    for g in GRADIENTS:
        m = 0.9 * m + LR * g
        w = w - m - LR * DECAY * w
    return {"param": w, "momentum_buffer": m / LR}


def adan(w: float, no_prox: bool = False) -> End:
    """Xie et al. 2022, algorithm 1 in the paper's betas; bias corrections and eps as in the code."""
    b1, b2, b3 = 0.1, 0.3, 0.2
    m = v = n = 0.0
    before = GRADIENTS[0]
    for k, g in enumerate(GRADIENTS, 1):
        m = (1 - b1) * m + b1 * g
        v = (1 - b2) * v + b2 * (g - before)
        n = (1 - b3) * n + b3 * (g + (1 - b2) * (g - before)) ** 2
        eta = LR / (math.sqrt(n / (1 - (1 - b3) ** k)) + 0.05)
        move = eta * (m / (1 - (1 - b1) ** k) + (1 - b2) * v / (1 - (1 - b2) ** k))
        w = (1 - LR * DECAY) * w - move if no_prox else (w - move) / (1 + LR * DECAY)
        before = g
    return {"param": w, "step": 5, "exp_avg": m, "exp_avg_diff": v, "exp_avg_sq": n, "previous_grad": before}


def adopt(w: float, exponent: float | None = 0.25, decoupled: bool = True, eps: float = 1e-6) -> End:
    """Taniguchi et al. 2024: g_0 sets v_0, then k = 1, 2, ... with v_{k-1}; -1.3 / 0.7 is clipped."""
    m = v = 0.0
    for k, g in enumerate(GRADIENTS):
        g = g if decoupled else g + DECAY * w
        if k == 0:
            v = g * g
            continue
        h = g / max(math.sqrt(v), eps)
        if exponent is not None:
            h = max(-(k**exponent), min(k**exponent, h))
        m = 0.6 * m + 0.4 * h
        w = (w - LR * DECAY * w if decoupled else w) - LR * m
        v = 0.8 * v + 0.2 * g * g
    return {"param": w, "step": 5, "exp_avg": m, "exp_avg_sq": v}


def ademamix(w: float, beta3: Sequence[float] = (0.9,) * 5, alpha: Sequence[float] = (2,) * 5) -> End:
    """Pagliardini et al. 2024, algorithm 1, each step with its own beta3 and alpha."""
    fast = slow = v = 0.0
    for t, (g, b3, a) in enumerate(zip(GRADIENTS, beta3, alpha, strict=True), 1):
        fast = 0.6 * fast + 0.4 * g
        slow = b3 * slow + (1 - b3) * g
        v = 0.8 * v + 0.2 * g * g
        over = math.sqrt(v / (1 - 0.8**t)) + 0.05
        w = w - LR * ((fast / (1 - 0.6**t) + a * slow) / over + DECAY * w)
    return {"param": w, "step": 5, "exp_avg_fast": fast, "exp_avg_slow": slow, "exp_avg_sq": v}


def warm(t: int, steps: int = 4, start: float = 0.6, end: float = 0.9) -> float:
    """The paper's formula of beta3 while it warms up from beta1."""
    a, b = math.log(start), math.log(end)
    return min(math.exp(a * b / ((1 - t / steps) * b + t / steps * a)), end) if t < steps else end


def adabelief(w: float, decoupled: bool = False) -> End:
    """Zhuang et al. 2020, algorithm 2: eps in s, where it stays, and beside its root."""
    m = s = 0.0
    for t, g in enumerate(GRADIENTS, 1):
        g = g if decoupled else g + DECAY * w
        m = 0.6 * m + 0.4 * g
        s = 0.8 * s + 0.2 * (g - m) * (g - m) + 0.05
        w = w - LR * DECAY * w if decoupled else w
        w = w - LR * m / (1 - 0.6**t) / (math.sqrt(s / (1 - 0.8**t)) + 0.05)
    return {"param": w, "step": 5, "exp_avg": m, "exp_avg_var": s}


def laprop(w: float) -> End:
    """Ziyin et al. 2020, algorithm 1; decay as in AdamW."""
    m = n = 0.0
    for t, g in enumerate(GRADIENTS, 1):
        n = 0.8 * n + 0.2 * g * g
        m = 0.6 * m + 0.4 * g / (math.sqrt(n / (1 - 0.8**t)) + 0.05)
        w = w - LR * (m / (1 - 0.6**t) + DECAY * w)
    return {"param": w, "step": 5, "exp_avg": m, "exp_avg_sq": n}


def lamb(w: float, *, most: float = math.inf, decay: float = DECAY) -> End:
    m = v = 0.0
    for t, g in enumerate(GRADIENTS, start=1):
        m, v = 0.6 * m + 0.4 * g, 0.8 * v + 0.2 * g * g
        u = (m / (1 - 0.6**t)) / (math.sqrt(v / (1 - 0.8**t)) + 0.05) + decay * w
        w = w - LR * min(abs(w) / abs(u), most) * u
    return {"param": w, "step": 5, "exp_avg": m, "exp_avg_sq": v}


def lars(w: float, *, larc: bool = False) -> End:
    b = 0.0
    for t, g in enumerate(GRADIENTS, start=1):
        rho = 0.5 * abs(w) / (abs(g) + DECAY * abs(w) + 0.05)
        rho = min(rho, LR) / LR if larc else rho
        b = 0.9 * b + rho * (g + DECAY * w) if t > 1 else rho * (g + DECAY * w)
        w = w - LR * b
    return {"param": w, "momentum_buffer": b}


def stableadamw(w: float) -> End:
    m = v = 0.0
    for t, g in enumerate(GRADIENTS, start=1):
        m, v = 0.6 * m + 0.4 * g, 0.8 * v + 0.2 * g * g
        corrected = v / (1 - 0.8**t)
        lr = LR / max(1.0, abs(g) / max(math.sqrt(corrected), 0.05))
        w = (1 - lr * DECAY) * w - lr * (m / (1 - 0.6**t)) / (math.sqrt(corrected) + 0.05)
    return {"param": w, "step": 5, "exp_avg": m, "exp_avg_sq": v}


ADAN = {"betas": (0.9, 0.7, 0.8), "eps": 0.05}
MIX = {"betas": (0.6, 0.8, 0.9), "eps": 0.05}
WARM = {"beta3": [warm(t) for t in (1, 2, 3, 4, 5)], "alpha": [2 / 3, 4 / 3, 2, 2, 2]}
BETAS = {"betas": (0.6, 0.8)}
APART = {"decoupled_weight_decay": True, **BETAS}
BY_HAND: list[tuple[Callable[[float], End], str, dict[str, Any]]] = [
    (lion, "Lion", BETAS),
    (signum, "Signum", {"momentum": 0.6}),
    (sign_sgd, "Signum", {"momentum": 0.0}),
    (sgdw, "SGDW", {"momentum": 0.9}),
    (adan, "Adan", ADAN),
    (partial(adan, no_prox=True), "Adan", {"no_prox": True, **ADAN}),
    (adopt, "ADOPT", APART),
    (partial(adopt, decoupled=False), "ADOPT", BETAS),
    (partial(adopt, exponent=None), "ADOPT", {"clip_exponent": None, **APART}),
    (partial(adopt, exponent=0.5, eps=1.1), "ADOPT", {"clip_exponent": 0.5, "eps": 1.1, **APART}),
    (ademamix, "AdEMAMix", MIX),
    (partial(ademamix, **WARM), "AdEMAMix", {"beta3_warmup": 4, "alpha_warmup": 3, **MIX}),
    (adabelief, "AdaBelief", {"eps": 0.05, **BETAS}),
    (partial(adabelief, decoupled=True), "AdaBelief", {"eps": 0.05, **APART}),
    (laprop, "LaProp", {"eps": 0.05, **BETAS}),
    (lamb, "LAMB", {"eps": 0.05, **BETAS}),
    (partial(lamb, most=1.0), "LAMB", {"trust_clip": True, "eps": 0.05, **BETAS}),
    (lars, "LARS", {"momentum": 0.9, "trust_coeff": 0.5, "eps": 0.05}),
    (
        partial(lars, larc=True),
        "LARS",
        {"trust_clip": True, "momentum": 0.9, "trust_coeff": 0.5, "eps": 0.05},
    ),
    (stableadamw, "StableAdamW", {"eps": 0.05, **BETAS}),
]


def follow(name: str, w: torch.Tensor, grads: Sequence[torch.Tensor], **options: Any) -> torch.Tensor:
    """The weights after one step per gradient."""
    state: dict[str, Any] = {}
    for g in grads:
        w, state = ORACLES[name](w, g, state, **options)
    return w


@pytest.mark.parametrize("negated", [False, True])
@pytest.mark.parametrize(("by_hand", "name", "options"), BY_HAND)
def test_a_rule_is_that_of_its_paper(
    by_hand: Callable[[float], End], name: str, options: dict[str, Any], negated: bool
) -> None:
    """Five steps on one number: 5 times about 20 roundings of numbers below 4, on two sides. Also
    uphill, on the gradients of the negative of the function."""
    w, state = torch.tensor(1.5, dtype=F64), dict[str, Any]()
    around: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "maximize": negated}
    for g in GRADIENTS:
        grad = torch.tensor(-g if negated else g, dtype=F64)
        w, state = ORACLES[name](w, grad, state, **around, **options)
    got = {key: float(value) for key, value in {"param": w, **state}.items()}
    assert got == pytest.approx(by_hand(1.5), rel=0, abs=2 * 5 * 20 * 4 * EPS)


OWN_DEFAULTS = {
    "LAMB": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.01,
        "trust_clip": False,
        "always_adapt": False,
    },
    "LARS": {
        "lr": 1.0,
        "momentum": 0.0,
        "dampening": 0.0,
        "nesterov": False,
        "weight_decay": 0.0,
        "trust_coeff": 0.001,
        "eps": 1e-8,
        "trust_clip": False,
        "always_adapt": False,
    },
    "StableAdamW": {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01},
    "SGDW": {"lr": 1e-3, "weight_decay": 0, "decoupled_weight_decay": True},
    "Lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0, "decoupled_weight_decay": True},
    "Signum": {"lr": 1e-4, "momentum": 0.9, "weight_decay": 0, "decoupled_weight_decay": True},
    "Adan": {"lr": 1e-3, "betas": (0.98, 0.92, 0.99), "eps": 1e-8, "weight_decay": 0, "no_prox": False},
    "ADOPT": {
        "lr": 1e-3,
        "betas": (0.9, 0.9999),
        "eps": 1e-6,
        "clip_exponent": 0.25,
        "weight_decay": 0,
        "decoupled_weight_decay": False,
    },
    "AdEMAMix": {
        "lr": 1e-3,
        "betas": (0.9, 0.999, 0.9999),
        "alpha": 2.0,
        "beta3_warmup": None,
        "alpha_warmup": None,
        "eps": 1e-8,
        "weight_decay": 0,
        "decoupled_weight_decay": True,
    },
    "AdaBelief": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-16,
        "weight_decay": 0,
        "decoupled_weight_decay": False,
    },
    "LaProp": {
        "lr": 4e-4,
        "betas": (0.9, 0.999),
        "eps": 1e-15,
        "weight_decay": 0,
        "decoupled_weight_decay": True,
    },
    "AdamMini": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
        "decoupled_weight_decay": True,
    },
}


@pytest.mark.parametrize("name", OWN_DEFAULTS)
def test_defaults_of_rules_that_torch_has_not(name: str) -> None:
    """Steps with the defaults spelled out are the steps without, weights and state."""
    plain, spelled = (torch.tensor([1.0, -2.0]), {}), (torch.tensor([1.0, -2.0]), {})
    for g in (torch.tensor([0.5, -0.3]), torch.tensor([0.6, -0.4]), torch.tensor([-9.0, 8.0])):
        plain = ORACLES[name](plain[0], g, plain[1])
        spelled = ORACLES[name](spelled[0], g, spelled[1], **OWN_DEFAULTS[name])
        torch.testing.assert_close(plain, spelled, rtol=0, atol=0)


def test_the_sign_of_nothing_is_nothing() -> None:
    w, zero = torch.tensor([1.0, -2.0]), torch.zeros(2)
    for name in ("Lion", "Signum"):
        assert torch.equal(ORACLES[name](w, zero, {}, lr=0.1)[0], w)


def drawn(seed: int, steps: int = 12, shape: tuple[int, ...] = (4, 6)) -> tuple[torch.Tensor, Any]:
    """Weights, and gradients of magnitudes in [0.5, 1.5]."""
    generator = torch.Generator().manual_seed(seed)
    w, *grads = (2 * torch.rand(shape, generator=generator, dtype=F64) - 1 for _ in range(steps + 1))
    return w, [g + 0.5 * torch.where(g < 0, -1.0, 1.0) for g in grads]


SMALL_EPS = {"eps": 1e-30}
SCALE_FREE = [
    ("Adam", {**SMALL_EPS, "amsgrad": True}),
    ("Adam", {"eps": 1e-60, "eps_inside_sqrt": True}),
    ("NAdam", SMALL_EPS),
    ("Adamax", SMALL_EPS),
    ("Adagrad", SMALL_EPS),
    ("Adadelta", SMALL_EPS),
    ("RMSprop", SMALL_EPS),
    ("RMSprop", {**SMALL_EPS, "centered": True, "momentum": 0.9}),
    ("Lion", {}),
    ("Signum", {}),
    ("Adan", SMALL_EPS),
    ("ADOPT", SMALL_EPS),
    ("AdEMAMix", SMALL_EPS),
    ("AdaBelief", SMALL_EPS),
    ("LaProp", SMALL_EPS),
    ("LAMB", SMALL_EPS),
    ("LARS", {**SMALL_EPS, "always_adapt": True}),
    ("StableAdamW", SMALL_EPS),
    ("AdamMini", SMALL_EPS),
]


@pytest.mark.parametrize("power", [-9, 7])
@pytest.mark.parametrize("where", [False, "gradient", "update"])
@pytest.mark.parametrize(("name", "options"), SCALE_FREE)
def test_rules_that_do_not_see_the_scale_of_the_gradient(
    name: str, options: dict[str, Any], where: Any, power: int
) -> None:
    """g -> 2^k g, which rounds nothing, with an eps that vanishes: no bit of the weights changes."""
    w, grads = drawn(0)
    ends = [follow(name, w, [c * g for g in grads], centralize=where, **options) for c in (1.0, 2.0**power)]
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], w)


def test_the_learning_rate_of_adagrad_never_rises() -> None:
    """The move over the gradient, element by element; the two are off by 4 roundings each."""
    zero, grads = torch.zeros(4, 6, dtype=F64), drawn(1)[1]
    state: dict[str, Any] = {}
    rates = []
    for g in grads:
        move, state = reference.adagrad(zero, g, state, lr=-1.0)
        rates.append(move / g)
    for earlier, later in itertools.pairwise(rates):
        assert bool((later <= earlier * (1 + 4 * EPS)).all())
    assert bool((rates[-1] < 0.6 * rates[0]).all())


def test_no_step_of_adamax_exceeds_its_bound() -> None:
    """|step| <= lr (1 - b1) / (1 - b1/b2), which gradients that shrink like b2^t approach."""
    bound = (1 - 0.9) / (1 - 0.9 / 0.999)
    zero, grads = torch.zeros(4, 6, dtype=F64), drawn(2, steps=60)[1]
    for paths, least in ((grads, 0.0), ([torch.full_like(zero, 0.999**t) for t in range(60)], 0.999)):
        state: dict[str, Any] = {}
        longest = 0.0
        for g in paths:
            move, state = reference.adamax(zero, g, state, lr=1.0, eps=1e-30)
            longest = max(longest, float(move.abs().max()))
        assert least * bound <= longest <= bound * (1 + 100 * EPS)
