"""Statistics of steps: equal to what plain torch finds of the weights before and after."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import BACKENDS, FUSED, device_of
from rule_cases import RULES, each

import fusedcalib
from fusedcalib.reference.statistics import statistics
from fusedcalib.statistics import NAMES

# One of each way in which a step walks rows: in a tile, by a loop, over launches; rows that do not matter.
SHAPES = [(70, 30), (2, 9000), (1, 33_000), (300,), ()]


def drawn(shapes: Any, backend: str = "eager", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Named parameters, with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = {}
    for i, shape in enumerate(shapes):
        p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(device_of(backend), dtype))
        p.grad = 3 * torch.randn(shape, generator=generator).to(p.device, dtype)
        params[f"p{i}"] = p
    return params


def check(opt: Any, params: dict[str, Any], scale: float = 1.0) -> None:
    """A step's statistics are those of the reference.

    The change is rounded once to the arithmetic's type, relative to itself 2^-24, which no sum makes larger;
    fp64 rounds sums of n numbers by n 2^-53 at most. So 2^-22 of a norm, and of 1 for the cosine.
    """
    before = [p.detach().clone() for p in params.values()]
    opt.step()
    grads = [p.grad / scale for p in params.values()]
    wanted = statistics(before, grads, [p.detach() for p in params.values()])
    found = opt.statistics()
    assert [*found] == [key for n in NAMES for key in (n, *(f"{n}/{name}" for name in params))]
    for name, (whole, *rest) in wanted.items():
        keys = [name, *(f"{name}/{param}" for param in params)]
        for key, value in zip(keys, (whole, *rest), strict=True):
            assert found[key].dtype == torch.float64
            near = pytest.approx(value.item(), rel=2**-22, abs=2**-22 if name == "cosine" else 0, nan_ok=True)
            assert found[key].item() == near, key


@each(RULES)
def test_every_rule_in_plain_torch(rule: Any):
    params = drawn([(7, 5), (12,), ()])
    opt = rule.ours(params.items(), **rule.options, backend="eager")
    opt.track(*NAMES)
    for _ in range(2):
        check(opt, params)


CASES = [("AdamW", {"centralize": True}), ("SGD", {"momentum": 0.9})]


@pytest.mark.parametrize(("name", "options"), CASES, ids=["AdamW", "SGD"])
@pytest.mark.parametrize("backend", FUSED)
def test_every_way_to_walk_rows(backend: str, name: str, options: dict[str, Any]):
    params = drawn(SHAPES, backend)
    opt = getattr(fusedcalib, name)(params.items(), lr=0.01, weight_decay=0.1, backend=backend, **options)
    opt.track(*NAMES)
    for _ in range(2):
        check(opt, params)


STAGES: list[dict[str, Any]] = [
    {"max_grad_norm": 0.1},
    {"noise": fusedcalib.WeightNoise(0.1), "seed": 3},
    {"ema_decay": 0.9},
    {"state_dtype": "8bit", "min_8bit_size": 0},
    {"maximize": True, "l1": 0.1},
    {"weight_decay": 0.1, "amsgrad": True},
]


@pytest.mark.parametrize("options", STAGES, ids=lambda options: next(iter(options)))
def test_stages_and_storage(options: dict[str, Any]):
    params = drawn([(8, 64), (70,)])
    opt = fusedcalib.AdamW(params.items(), lr=0.01, backend="eager", **options)
    opt.track(*NAMES)
    for _ in range(2):
        check(opt, params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_of_bf16_stays_and_what_is_not_finite(backend: str):
    params = drawn([(8, 64), (70,)], backend, torch.bfloat16)
    opt = fusedcalib.AdamW(params.items(), lr=1e-3, backend=backend)
    opt.track(*NAMES)
    check(opt, params)
    assert 0.1 < opt.statistics()["unmoved"].item() < 0.9
    params["p1"].grad[3], params["p1"].grad[5] = math.nan, -math.inf
    opt.step()
    found = opt.statistics()
    assert [found[key].item() for key in ("nonfinite", "nonfinite/p0", "nonfinite/p1")] == [2, 0, 2]
    assert math.isnan(found["max_abs_grad"].item())
    assert math.isfinite(found["max_abs_grad/p0"].item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_left_out_leaves_them(backend: str):
    """Also where a device decides, and knows alone; and the gradient norm is of what was unscaled."""
    params = drawn([(8, 64), (70,)], backend)
    opt = fusedcalib.SGD(params.items(), lr=0.01, backend=backend, fused=True, skip_nonfinite=True)
    opt.track(*NAMES)
    there = params["p0"].device
    opt.grad_scale, opt.found_inf = torch.full((), 4.0, device=there), torch.zeros((), device=there)
    check(opt, params, scale=4.0)
    before = {key: value.item() for key, value in opt.statistics().items()}
    params["p1"].grad[3] = math.inf
    opt.grad_scale, opt.found_inf = torch.full((), 8.0, device=there), torch.ones((), device=there)
    opt.step()
    assert {key: value.item() for key, value in opt.statistics().items()} == before
    assert opt.skipped_steps.item() == 1


def test_every_other_step_is_measured_and_the_others_are_not():
    params = drawn([(4, 4)])
    opt = fusedcalib.AdamW(params.items(), lr=0.1, backend="eager")
    assert opt.statistics() == {}
    opt.track("param_norm", every=2)
    norms = []
    for _ in range(4):
        opt.step()
        norms.append((opt.statistics()["param_norm"].item(), params["p0"].detach().double().norm().item()))
    (a, one), (b, _), (c, three), (d, four) = norms
    assert a == b == pytest.approx(one)
    assert c == d == pytest.approx(three)
    assert three != four
    assert opt.state[params["p0"]]["step"].item() == 4
    opt.track()
    opt.step()
    assert opt.statistics() == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_measured_steps_as_what_is_not(backend: str):
    one, other = drawn([(70, 30), (300,)], backend), drawn([(70, 30), (300,)], backend)
    make = {"lr": 0.01, "centralize": True, "backend": backend}
    measured, plain = (fusedcalib.AdamW(p.items(), **make) for p in (one, other))
    measured.track(*NAMES)
    for _ in range(2):
        measured.step()
        plain.step()
    for p, q in zip(one.values(), other.values(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("backend", FUSED)
def test_at_most_one_launch_more_whatever_the_number_of_tensors(backend: str):
    def launches(count: int, *names: str) -> int:
        opt = fusedcalib.SGD(drawn([(8, 8)] * count, backend).values(), lr=0.1, backend=backend)
        opt.track(*names)
        opt.step()
        return opt._engine.prepare(opt.param_groups, opt.state).step()

    assert launches(30, *NAMES) == launches(2, *NAMES) <= launches(2) + 1


def test_groups_that_join_and_parameters_without_names():
    params = [*drawn([(4, 4), (3,)]).values()]
    opt = fusedcalib.SGD(params[:1], lr=0.1, backend="eager")
    opt.track("grad_norm", "unmoved")
    opt.step()
    opt.add_param_group({"params": params[1:]})
    assert [*opt.statistics()] == ["grad_norm", "grad_norm/0.0", "unmoved", "unmoved/0.0"]
    opt.step()
    names = ["grad_norm", "grad_norm/0.0", "grad_norm/1.0", "unmoved", "unmoved/0.0", "unmoved/1.0"]
    assert [*opt.statistics()] == names
    params[0].grad = None
    opt.step()
    assert [*opt.statistics()] == ["grad_norm", "grad_norm/1.0", "unmoved", "unmoved/1.0"]


def test_keys_of_composer():
    params = drawn([(4, 4)])
    opt = fusedcalib.SGD(params.items(), lr=0.1, backend="eager")
    opt.track("grad_norm", "cosine", "nonfinite")
    opt.step()
    assert [*opt.statistics(style="composer")] == [
        *("l2_norm/grad/global", "l2_norm/grad/p0", "nonfinite", "nonfinite/p0"),
        *("cosine/update_grad/global", "cosine/update_grad/p0"),
    ]


def test_what_cannot_be_measured_is_refused():
    params = drawn([(4, 4)])
    opt = fusedcalib.SGD(params.values(), lr=0.1, backend="eager", max_row_norm=1.0)
    with pytest.raises(ValueError, match="'norm' is no statistic; choose from grad_norm, "):
        opt.track("norm")
    with pytest.raises(ValueError, match="every=0, expected a whole number"):
        opt.track("grad_norm", every=0)
    with pytest.raises(ValueError, match="style='olmo', expected one of plain, composer"):
        opt.statistics(style="olmo")
    opt.track("grad_norm")
    before = params["p0"].detach().clone()
    with pytest.raises(
        RuntimeError, match=r"group 0: track.* max_row_norm=None, or call track.. without names"
    ):
        opt.step()
    assert torch.equal(before, params["p0"])
    opt.track()
    opt.step()
    assert not torch.equal(before, params["p0"])


def test_gradient_release_is_refused():
    """When it is enabled, and by the backward pass where steps are measured from later on."""
    model = torch.nn.Linear(4, 2)
    opt = fusedcalib.SGD(model.parameters(), lr=0.1, backend="eager")
    told = r"track\(\) measures whole steps; call track\(\) without names"
    opt.track("grad_norm")
    with pytest.raises(RuntimeError, match=told):
        fusedcalib.enable_gradient_release(model, opt)
    opt.track()
    released = fusedcalib.enable_gradient_release(model, opt)
    opt.track("grad_norm")
    with pytest.raises(RuntimeError, match=told):
        model(torch.ones(1, 4)).sum().backward()
    released.remove()


def test_python_of_the_page_runs():
    page = Path(__file__).resolve().parents[1] / "docs" / "statistics.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    namespace: dict[str, Any] = {}
    printed: list[Any] = []
    namespace["print"] = printed.append
    for block in blocks:
        exec(block, namespace)
    assert printed == [["grad_norm", "grad_norm/bias", "grad_norm/weight"], "update_rms/weight"]


def test_muon_is_refused():
    model = torch.nn.Linear(4, 4, bias=False)
    opt = fusedcalib.Muon(model.parameters(), lr=0.1)
    opt.track("grad_norm")
    model(torch.ones(1, 4)).sum().backward()
    before = model.weight.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"moves its matrices in a second one; call track\(\) without names"
    ):
        opt.step()
    assert torch.equal(before, model.weight)
