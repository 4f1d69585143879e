"""What must hold to the last bit, and what becomes of NaN and infinity."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from kernel_cases import BACKENDS, COVERING, DTYPES, FUSED, TRITON, Case, device_of
from kernel_trial import bits, gradient_values, parameter_values

INF, NAN = float("inf"), float("nan")
# Zeros of either sign, subnormals (of fp32, bf16 and fp64), and what overflows when it is squared.
SPECIAL = (0.0, -0.0, 1e-40, -1e-42, 1e-310, 1e-25, 1e21, -3e38, INF, -INF, NAN, 1.0)
UNCENTRED = {name: case for name, case in COVERING.items() if not case.options["centralize"]}
SHAPES = ((3, 40), (7, 130), (2, 13), (9,), (4, 3, 2, 2), (5, 300), (2, 5000), (64, 64), ())


def run(
    backend: str,
    case: Case,
    start: Iterable[torch.Tensor],
    gradients: Iterable[Iterable[torch.Tensor]],
    arrange: Callable[[list[torch.nn.Parameter]], list[list[dict[str, Any]]]] | None = None,
) -> list[list[torch.Tensor]]:
    """Parameter and state of each tensor after one step for each list of gradients.

    `arrange` sorts the parameters into optimizers: a list of param groups each.
    """
    device = device_of(backend)
    params = [torch.nn.Parameter(t.to(device, case.dtypes.param, copy=True)) for t in start]
    options = {"backend": backend, **case.options}
    sorted_in = arrange(params) if arrange else [[{"params": params}]]
    optimizers = [case.ours(groups, **options) for groups in sorted_in]
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for gradient in gradients:
        for p, g in zip(params, gradient, strict=True):
            p.grad_dtype = case.dtypes.grad
            p.grad = g.to(device, case.dtypes.grad, copy=True)
        for optimizer in optimizers:
            optimizer.step()
    states = [owner[p].state.get(p, {}) for p in params]
    kept = [[value for key, value in state.items() if key != "step"] for state in states]
    return [[p.detach(), *tensors] for p, tensors in zip(params, kept, strict=True)]


def ordinary(steps: int = 2) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    start = [parameter_values(shape) for shape in SHAPES]
    return start, [[gradient_values(shape) for shape in SHAPES] for _ in range(steps)]


def special(steps: int = 3) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Every special value against every other, beside ordinary ones."""
    values = torch.tensor(SPECIAL, dtype=torch.float64)
    pairs = torch.cartesian_prod(values, values).T
    start = torch.cat([pairs[0], torch.randn(5000, dtype=torch.float64)])
    rest = [torch.randn(5000, dtype=torch.float64) for _ in range(steps)]
    return [start], [[torch.cat([pairs[1].roll(i), rest[i]])] for i in range(steps)]


def assert_same_bits(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            torch.testing.assert_close(bits(x), bits(y), rtol=0, atol=0, msg=f"{k} of tensor {i}")


def named(rule: str, centralize: str | bool, dtypes: str = "fp32", **options: Any) -> Case:
    return Case(rule, {"lr": 0.1, **options, "centralize": centralize}, DTYPES[dtypes])


CENTRED = {
    "SGD": named("SGD", "gradient", momentum=0.9, weight_decay=0.1),
    "AdamW": named("AdamW", "gradient"),
    "Adam update": named("Adam", "update", weight_decay=0.1),
}
cases = pytest.mark.parametrize("case", CENTRED.values(), ids=CENTRED)
uncentred = pytest.mark.parametrize("case", UNCENTRED.values(), ids=UNCENTRED)


@uncentred
@pytest.mark.parametrize("backend", [TRITON])
def test_gpu_and_cpu_agree_to_the_last_bit(backend: str, case: Case):
    """Without row means, whose additions have another order, every operation is the same and exact."""
    pytest.importorskip("numba")
    numbers = special()
    assert_same_bits(run(backend, case, *numbers), run("numba", case, *numbers))


@uncentred
@pytest.mark.parametrize("backend", FUSED)
def test_fused_and_plain_torch_agree(backend: str, case: Case):
    """To the last bit, but for torch's square root on CPUs: it may be off by an ulp, in the step only."""
    numbers = special()
    found, expected = run(backend, case, *numbers), run("eager", case, *numbers)
    if case.rule == "SGD":
        assert_same_bits(found, expected)
        return
    assert_same_bits([found[0][1:]], [expected[0][1:]])
    eps = torch.finfo(case.dtypes.param).eps  # at most the next number, each step
    torch.testing.assert_close(found[0][0].cpu(), expected[0][0], rtol=3 * eps, atol=3 * eps, equal_nan=True)


def _options(i: int) -> dict[str, float]:
    return {"lr": 0.1 / (1 + i % 3), "weight_decay": 0.1 * (i % 2)}


def _alone(params: list[torch.nn.Parameter]) -> list[list[dict[str, Any]]]:
    return [[{"params": [p], **_options(i)}] for i, p in enumerate(params)]


GROUPINGS: dict[str, Callable[..., list[list[dict[str, Any]]]]] = {
    "a group each": lambda params: [[group for groups in _alone(params) for group in groups]],
    "backwards": lambda params: [[groups[0] for groups in _alone(params)[::-1]]],
    "two optimizers": lambda params: [[groups[0] for groups in _alone(params)[half::2]] for half in (0, 1)],
    "a group for each set of options": lambda params: [
        [{"params": params[k::6], **_options(k)} for k in range(6)]
    ],
}


@cases
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouping_changes_nothing(backend: str, grouping: str, case: Case):
    """Also with groups that decay beside groups that do not, which share a launch."""
    numbers = ordinary()
    expected = run(backend, case, *numbers, arrange=_alone)
    assert_same_bits(run(backend, case, *numbers, arrange=GROUPINGS[grouping]), expected)


@cases
@pytest.mark.parametrize("columns", [64, 200, 4096, 5000, 20000, 40000])
@pytest.mark.parametrize("backend", FUSED)
def test_a_row_does_not_depend_on_its_neighbours(backend: str, columns: int, case: Case):
    """Five rows in one tensor, or in three: row means are added up in the same order."""
    whole, gradient = parameter_values((5, columns)), gradient_values((5, columns))
    sizes = [1, 3, 1]
    (together,) = run(backend, case, [whole], [[gradient]])
    apart = run(backend, case, whole.split(sizes), [gradient.split(sizes)])
    assert_same_bits([[torch.cat(t) for t in zip(*apart, strict=True)]], [together])


@uncentred
def test_nan_and_infinity_propagate_as_in_torch(case: Case):
    """In plain torch, with which the other executors agree on the same numbers, see above."""
    case = case._replace(dtypes=DTYPES["fp32"])
    start, gradients = special()
    ((found, *state),) = run("eager", case, start, gradients)
    p = torch.nn.Parameter(start[0].float())
    options = {k: v for k, v in case.options.items() if k != "centralize"}
    theirs = getattr(torch.optim, case.rule)([p], foreach=False, **options)
    for (gradient,) in gradients:
        p.grad = gradient.float()
        theirs.step()
    kept = [value for key, value in theirs.state[p].items() if key != "step"]
    for ours, his in zip([found, *state], [p.detach(), *kept], strict=True):
        torch.testing.assert_close(ours.cpu(), his, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("centralize", [False, "gradient", "update"])
@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_gradient_stays_where_it_is(backend: str, rule: str, centralize: str, bad: float):
    """In its element; with centring in its row."""
    case = named(rule, centralize)
    start, gradients = ordinary()
    expected = run(backend, case, start, gradients)
    for i, at in ((1, (3, 77)), (6, (1, 4444)), (7, (63, 0))):
        gradients[0][i][at] = bad
        place = at[:1] if centralize else at
        expected[i][0][place] = NAN if bad != bad or centralize else -bad
    found = run(backend, case, start, gradients)
    for a, b in zip(found, expected, strict=True):
        spoiled = ~b[0].isfinite()
        assert not a[0][spoiled].isfinite().any()
        assert_same_bits([[a[0].masked_fill(spoiled, 0)]], [[b[0].masked_fill(spoiled, 0)]])


@pytest.mark.parametrize("rule", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_decay_beside_decay_leaves_infinity_alone(backend: str, rule: str):
    """0 * inf would be NaN: a decay of zero is no decay, also where a launch is shared with one."""
    start = [torch.full((5,), INF), torch.ones(5)]
    gradients = [[torch.ones(5), torch.ones(5)]]
    decays = (0.0, 0.5)
    found = run(
        *(backend, named(rule, False), start, gradients),
        arrange=lambda ps: [[{"params": [p], "weight_decay": d} for p, d in zip(ps, decays, strict=True)]],
    )
    assert found[0][0].eq(INF).all()
    assert found[1][0].isfinite().all()
    assert not any(t.isnan().any() for tensors in found for t in tensors)


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
