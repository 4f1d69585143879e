"""What must hold to the last bit: however tensors are grouped and divided, and of what is bad elsewhere."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import BACKENDS, FUSED, TRITON, Case, device_of, matrix
from kernel_run import INF, NAN, assert_same_bits, ordinary, run
from kernel_trial import gradient_values, parameter_values

from fusedcalib.reference import ORACLES


def named(rule: str, centralize: str | bool, **options: Any) -> Case:
    return Case(rule, {"lr": 0.1, **options, "centralize": centralize})


BY_ROWS = {
    "SGD": named("SGD", "gradient", momentum=0.9, weight_decay=0.1),
    "AdamW": named("AdamW", "gradient", max_row_norm=2.0),
    "Adam update": named("Adam", "update", weight_decay=0.1, l1=0.05),
    "Lion projected": named("Lion", False, l1=0.05, max_row_norm=2.0),
}
ONE = {"AdamW": BY_ROWS["AdamW"]}  # four kinds of loops
Groups = list[list[dict[str, Any]]]  # param groups of each optimizer


def _options(i: int) -> dict[str, Any]:
    penalties = {"weight_decay": 0.1, "l1": 0.05} if i % 3 == 1 else {"weight_decay": 0.0, "l1": 0.0}
    return {"lr": 0.1 / (1 + i % 2), **penalties, "max_row_norm": 2.0 if i % 3 == 2 else None}


def _alone(params: list[torch.nn.Parameter]) -> Groups:
    return [[{"params": [p], **_options(i)}] for i, p in enumerate(params)]


GROUPINGS: dict[str, Callable[..., Groups]] = {
    "a group each": lambda params: [[group for groups in _alone(params) for group in groups]],
    "backwards": lambda params: [[groups[0] for groups in _alone(params)[::-1]]],
    "two optimizers": lambda params: [[groups[0] for groups in _alone(params)[half::2]] for half in (0, 1)],
    "a group for each set of options": lambda params: [
        [{"params": params[k::6], **_options(k)} for k in range(6)]
    ],
}


@pytest.mark.parametrize(("backend", "case"), matrix(BY_ROWS, ONE, BY_ROWS))
def test_grouping_changes_nothing(backend: str, case: Case):
    """Also with groups that decay, or are projected, beside groups that are not, which share a launch."""
    numbers = ordinary()
    expected = run(backend, case, *numbers, arrange=_alone)
    for grouping in GROUPINGS.values():
        assert_same_bits(run(backend, case, *numbers, arrange=grouping), expected)


# Rows of every class. Interpreted a long one takes a second: each stage in some of them.
COLUMNS = (64, 200, 4096, 5000, 20000, 40000)
OF_TRITON = {
    "AdamW": COLUMNS,
    "Adam update": (64, 5000),
    "SGD": (200, 40000),
    "Lion projected": (4096, 40000),
}
NEIGHBOURS = [
    pytest.param(*param.values, columns, case, id=f"{param.values[0]}-{columns}-{name}", marks=param.marks)
    for param in FUSED
    for name, case in BY_ROWS.items()
    for columns in (OF_TRITON[name] if param is TRITON else COLUMNS)
    if param is TRITON or name in ("AdamW", "Lion projected")  # each a kind of loop
]


@pytest.mark.parametrize(("backend", "columns", "case"), NEIGHBOURS)
def test_a_row_does_not_depend_on_its_neighbours(backend: str, columns: int, case: Case):
    """Five rows in one tensor, or in three: rows are added up in the same order. Some are projected."""
    if "max_row_norm" in case.options:
        case = case._replace(options={**case.options, "max_row_norm": 0.3 * math.sqrt(columns)})
    whole, gradient = parameter_values((5, columns)), gradient_values((5, columns))
    sizes = [1, 3, 1]
    (together,) = run(backend, case, [whole], [[gradient]])
    apart = run(backend, case, whole.split(sizes), [gradient.split(sizes)])
    together.pop("step", None)
    assert_same_bits([{name: torch.cat([t[name] for t in apart]) for name in together}], [together])


RULES = {rule: rule for rule in ("SGD", "AdamW")}


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("centralize", [False, "gradient", "update"])
@pytest.mark.parametrize(("backend", "rule"), matrix(RULES, {"SGD": "SGD"}, RULES))
def test_a_bad_gradient_stays_where_it_is(backend: str, rule: str, centralize: str, bad: float):
    """In its element; with centring in its row."""
    case = named(rule, centralize)
    start, gradients = ordinary()
    expected = run(backend, case, start, gradients)
    for i, at in ((1, (3, 77)), (6, (1, 4444)), (7, (63, 0))):
        gradients[0][i][at] = bad
        place = at[:1] if centralize else at
        expected[i]["param"][place] = NAN if bad != bad or centralize else -bad
    found = run(backend, case, start, gradients)
    for a, b in zip(found, expected, strict=True):
        spoiled = ~b["param"].isfinite()
        assert not a["param"][spoiled].isfinite().any()
        kept = [{"param": t["param"].masked_fill(spoiled, 0)} for t in (a, b)]
        assert_same_bits(kept[:1], kept[1:])


UNCENTRED = {rule: named(rule, False) for rule in ORACLES}
DECAYS = {rule: UNCENTRED[rule] for rule in ("SGD", "AdamW", "Adan")}  # coupled, decoupled, proximal
COUPLED = {"SGD": UNCENTRED["SGD"]}


@pytest.mark.parametrize(("backend", "case"), matrix(UNCENTRED, COUPLED, DECAYS))
def test_a_stage_that_is_off_beside_one_that_is_on_leaves_infinity_alone(backend: str, case: Case):
    """0 * inf would be NaN: a decay of zero is no decay, also where a launch is shared with one."""
    shape = (2, 5)
    start = [torch.full(shape, INF), torch.ones(shape)]
    gradients = [[torch.ones(shape), torch.ones(shape)]] * 2
    on = {"weight_decay": 0.5, "l1": 0.1, "max_row_norm": 1.0}
    off = {"weight_decay": 0.0, "l1": 0.0, "max_row_norm": None}
    found = run(
        *(backend, case, start, gradients),
        arrange=lambda ps: [[{"params": [p], **own} for p, own in zip(ps, (off, on), strict=True)]],
    )
    assert found[0]["param"].eq(INF).all()
    assert found[1]["param"].norm(dim=1).le(1 + 1e-6).all()
    assert not any(t.isnan().any() for tensors in found for t in tensors.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_amsgrad_keeps_a_nan_of_its_maximum(backend: str):
    """As torch.maximum, though a comparison with NaN is false."""
    p = torch.nn.Parameter(torch.ones(5, device=device_of(backend)))
    p.grad = torch.ones_like(p)
    optimizer = named("Adam", False).ours([p], amsgrad=True, backend=backend)
    optimizer.step()
    optimizer.state[p]["max_exp_avg_sq"][2] = NAN
    optimizer.step()
    for t in (p, optimizer.state[p]["max_exp_avg_sq"]):
        assert t.isnan().tolist() == [False, False, True, False, False]
    assert not optimizer.state[p]["exp_avg_sq"].isnan().any()
