"""The oracles of torch's optimizers against torch.optim: one step, its state, the defaults."""

import copy
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_reference import EPS, F64, FORMS, label

from fusedcalib import reference
from fusedcalib.reference import ORACLES

SHAPES = ((), (5,), (4, 1), (4, 3), (2, 3, 2, 2))
OF_TORCH = [name for name in ORACLES if hasattr(torch.optim, name)]
SWITCHED = ("Adam", "NAdam", "RAdam")  # torch's classes with a choice of decay


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in OF_TORCH:
        kinds = [{"decoupled_weight_decay": d} for d in (False, True)] if name in SWITCHED else [{}]
        for form, kind, decay, maximize in itertools.product(FORMS[name], kinds, (0, 0.05), (False, True)):
            yield name, {**form, **kind, "weight_decay": decay, "maximize": maximize}


def decays_weights(name: str, options: dict[str, Any]) -> bool:
    return name == "AdamW" or options.get("decoupled_weight_decay", False)


def away_from_zero(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Numbers of either sign with a magnitude in [0.5, 1.5]."""
    x = 2 * torch.rand(shape, generator=generator, dtype=F64) - 1
    return x + 0.5 * torch.where(x < 0, -1.0, 1.0)


def torch_step(
    opt: torch.optim.Optimizer, p: torch.Tensor, g: torch.Tensor, where: bool | str
) -> torch.Tensor:
    """Step torch's optimizer on `p` and return its new weights, had it known centring.

    On the gradient: torch without decay is fed P(g + lam w). On the update: torch's own move,
    less the decay of the weights, is centred afterwards.
    """
    group = opt.param_groups[0]
    decoupled = decays_weights(type(opt).__name__, group)
    base = p * (1 - group["lr"] * group["weight_decay"]) if decoupled else p.detach().clone()
    coupled = 0 if decoupled else group["weight_decay"]
    sign = -1 if group["maximize"] else 1
    fed = sign * reference.centralize(sign * g + coupled * p) if where == "gradient" else g
    removed = {"weight_decay": 0.0} if where == "gradient" and coupled else {}
    kept = {key: group[key] for key in removed}
    group.update(removed)
    p.grad = fed.detach()
    opt.step()
    group.update(kept)
    return base + reference.centralize(p - base) if where == "update" else p.detach().clone()


# One step of each side starts from the same weights and the same state (torch's), so that roundings
# do not add up over steps. All magnitudes are below `scale`. A step makes at most 9 roundings (2 of
# decay, 3 of an average, 4 after it), each of at most EPS / 2 of a value below 3 scale: two sides
# are at most 9 * 3 * EPS * scale apart. Rules that divide: a second moment is a sum of squares, off
# by a few EPS of itself (the variance of RMSprop at most 0.8^-8 = 6 times that), and no direction
# is above 10, the first of RMSprop. Its error is at most 40 EPS of it, and lr = 0.01 makes 4 EPS of
# that. Centring after the fact adds the rounding of a difference and of a mean.
BOUND = 9 * 3 * EPS


@pytest.fixture
def double() -> Iterator[None]:
    """Scalars of torch's states in float64: NAdam keeps its product in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("where", [False, "gradient", "update"])
@pytest.mark.parametrize(("name", "options"), list(cases()), ids=label)
def test_a_step_is_that_of_torch(name: str, options: dict[str, Any], where: bool | str) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=F64).clamp(-1, 1))
        opt = getattr(torch.optim, name)([p], lr=0.01, foreach=False, **options)
        state: dict[str, Any] = {}
        for _ in range(8):
            before = p.detach().clone()
            g = away_from_zero(shape, generator)
            got, new_state = ORACLES[name](before, g, state, lr=0.01, centralize=where, **options)
            with torch.no_grad():
                want = torch_step(opt, p, g, where)
                p.copy_(want)
            state = copy.deepcopy(dict(opt.state[p]))
            assert new_state.keys() == state.keys()
            assert new_state.pop("step", None) == state.get("step")
            kept = {key: value for key, value in state.items() if key != "step"}
            limit = BOUND * max(float(t.abs().max()) for t in (before, g, want, *kept.values()))
            torch.testing.assert_close(got, want, rtol=0, atol=limit)
            for key, value in kept.items():
                torch.testing.assert_close(torch.as_tensor(new_state[key]), value, rtol=0, atol=limit)


@pytest.mark.parametrize("default", [torch.float32, F64])
def test_the_product_of_nadam_has_the_bits_of_torch(default: torch.dtype) -> None:
    """A scalar of the default dtype beside weights of any; each step starts from its own before."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        p = torch.nn.Parameter(torch.ones(2, dtype=F64))
        p.grad = torch.ones_like(p)
        opt = torch.optim.NAdam([p], momentum_decay=0.1)
        state: dict[str, Any] = {}
        for _ in range(8):
            opt.step()
            state = reference.nadam(p.detach(), p.grad, state, momentum_decay=0.1)[1]
            assert state["mu_product"] == opt.state[p]["mu_product"].item()
    finally:
        torch.set_default_dtype(before)


# What torch has not, and what it has that is about how a step is carried out.
OWN = {
    "matrix_dims": None,
    "cautious": False,
    "cautious_weight_decay": False,
    "l1": 0.0,
    "max_row_norm": None,
    "centralize": False,
    "centralize_min_ndim": 2,
    "eps_inside_sqrt": False,
}
NOT_OURS = {"params", "foreach", "fused", "capturable", "differentiable"}


def options_of(name: str) -> dict[str, Any]:
    """The options of an oracle with their defaults; those of AdamW and SGDW include the rule's."""
    inner = inspect.signature(ORACLES[{"AdamW": "Adam", "SGDW": "SGD"}.get(name, name)]).parameters
    found = {**inner, **inspect.signature(ORACLES[name]).parameters}
    return {k: p.default for k, p in found.items() if p.default is not inspect.Parameter.empty}


@pytest.mark.parametrize("name", OF_TORCH)
def test_options_have_the_defaults_of_torch(name: str) -> None:
    listed = inspect.signature(getattr(torch.optim, name)).parameters
    theirs = {k: p.default for k, p in listed.items() if k not in NOT_OURS}
    ours = options_of(name)
    assert {k: ours.pop(k) for k in theirs} == theirs
    decoupled = {"decoupled_weight_decay": decays_weights(name, {})}
    assert ours.items() <= (OWN | decoupled).items()
