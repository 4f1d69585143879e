"""The oracles against torch.optim and against the papers' formulas written out by hand."""

import ast
import copy
import doctest
import importlib
import inspect
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedcalib import reference
from fusedcalib.reference import ORACLES, stages

F64 = torch.float64
EPS = torch.finfo(F64).eps
SHAPES = ((), (5,), (4, 1), (4, 3), (2, 3, 2, 2))
DEFAULTS_OF_TORCH = {
    name: inspect.signature(getattr(torch.optim, name)) for name in ORACLES if hasattr(torch.optim, name)
}


def grid(**axes: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Every combination of the values of the axes."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


SGD_FORMS = (
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
)
COMMON = {"weight_decay": (0, 0.05), "maximize": (False, True)}
AMSGRAD = {"amsgrad": (False, True), **COMMON}
CASES = [
    *(("SGD", form | options) for form in SGD_FORMS for options in grid(**COMMON)),
    *(("Adam", o) for o in grid(decoupled_weight_decay=(False, True), **AMSGRAD)),
    *(("AdamW", o) for o in grid(**AMSGRAD)),
]


def label(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ",".join(f"{k}={v}" for k, v in value.items() if v) or "defaults"


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
# are at most 9 * 3 * EPS * scale apart. Adam divides: |g + lam w| lies in [0.4, 1.7], thus
# sqrt(v_hat) is at least 0.4, the relative error of the quotient at most 40 EPS, and lr = 0.01
# makes 0.4 EPS of it. Centring after the fact adds the rounding of a difference and of a mean.
BOUND = 9 * 3 * EPS


@pytest.mark.parametrize("where", [False, "gradient", "update"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=label)
def test_a_step_is_that_of_torch(name: str, options: dict[str, Any], where: bool | str) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=F64).clamp(-1, 1))
        opt = getattr(torch.optim, name)([p], lr=0.01, foreach=False, **options)
        state: dict[str, Any] = {}
        for _ in range(6):
            before = p.detach().clone()
            g = away_from_zero(shape, generator)
            got, new_state = ORACLES[name](before, g, state, lr=0.01, centralize=where, **options)
            with torch.no_grad():
                want = torch_step(opt, p, g, where)
                p.copy_(want)
            state = copy.deepcopy(dict(opt.state[p]))
            values = [t for t in (before, g, want, *state.values()) if torch.is_tensor(t)]
            scale = max(float(t.abs().max()) for t in values if t.dtype == F64)
            torch.testing.assert_close(got, want, rtol=0, atol=BOUND * scale)
            assert new_state.keys() == state.keys()
            for key in state:
                limit = 0 if key == "step" else BOUND * scale
                torch.testing.assert_close(
                    torch.as_tensor(new_state[key], dtype=state[key].dtype),
                    state[key],
                    rtol=0,
                    atol=limit,
                )


OWN = {
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


@pytest.mark.parametrize("name", DEFAULTS_OF_TORCH)
def test_options_have_the_defaults_of_torch(name: str) -> None:
    theirs = {k: p.default for k, p in DEFAULTS_OF_TORCH[name].parameters.items() if k not in NOT_OURS}
    ours = options_of(name)
    assert {k: ours.pop(k) for k in theirs} == theirs
    decoupled = {"decoupled_weight_decay": decays_weights(name, {})}
    assert ours.items() <= (OWN | decoupled).items()


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


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("value", [None, 1, 0, "grad", "", "Update", ["update"], 2.0])
def test_an_unknown_place_for_centring_is_refused(name: str, value: Any) -> None:
    w = torch.ones(2, 2)
    with pytest.raises(ValueError, match="centralize must be"):
        ORACLES[name](w, w, {}, centralize=value)


def test_true_means_gradient() -> None:
    w, g = torch.rand(2, 3, dtype=F64), torch.rand(2, 3, dtype=F64)
    for oracle in ORACLES.values():
        spelled = oracle(w, g, {}, centralize="gradient", weight_decay=0.1)[0]
        assert torch.equal(oracle(w, g, {}, centralize=True, weight_decay=0.1)[0], spelled)


@pytest.mark.parametrize("where", [False, "gradient", "update"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=label)
def test_inputs_are_neither_changed_nor_handed_back(
    name: str, options: dict[str, Any], where: bool | str
) -> None:
    for shape in ((3,), (2, 3)):
        w, g = torch.rand(shape, dtype=F64), torch.rand(shape, dtype=F64)
        state: dict[str, Any] = {}
        for _ in range(2):
            given = copy.deepcopy((w, g, state))
            out, new_state = ORACLES[name](w, g, state, centralize=where, **options)
            torch.testing.assert_close((w, g, state), given, rtol=0, atol=0)
            inputs = {t.data_ptr() for t in (w, g, *state.values()) if torch.is_tensor(t)}
            outputs = [t for t in (out, *new_state.values()) if torch.is_tensor(t)]
            assert inputs.isdisjoint(t.data_ptr() for t in outputs)
            w, state = out, new_state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ORACLES)
def test_the_given_dtype_is_kept_and_step_is_an_int(name: str, dtype: torch.dtype) -> None:
    w, state = torch.ones(2, 2, dtype=dtype), {}
    for count in (1, 2):
        w, state = ORACLES[name](w, torch.ones_like(w), state, weight_decay=0.1, centralize=True)
        kept = [v for v in state.values() if torch.is_tensor(v)]
        assert {t.dtype for t in (w, *kept)} == {dtype}
        if "step" in state:
            assert type(state["step"]) is int
            assert state["step"] == count
            state["step"] = torch.tensor(float(count))


def files() -> list[Path]:
    return sorted(Path(reference.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_nothing_of_the_package_is_imported(path: Path) -> None:
    """Own files by a relative import; torch and the standard library otherwise."""
    allowed = {*sys.stdlib_module_names, "torch"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            inside = node.level == 1
            assert inside or (node.level == 0 and str(node.module).split(".")[0] in allowed)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_examples_of_the_docs(path: Path) -> None:
    name = "fusedcalib.reference" + ("" if path.stem == "__init__" else f".{path.stem}")
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0


def test_every_file_is_discovered_and_no_name_is_taken_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert set(ORACLES) >= {"SGD", "Adam", "AdamW"}
    monkeypatch.setattr(stages, "ORACLES", {"SGD": ORACLES["SGD"]}, raising=False)
    with pytest.raises(RuntimeError, match="SGD"):
        reference._discover()
