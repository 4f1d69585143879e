"""Rules that keep a number for each row, as AdamMini does: what generic tests do not know of them."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from cases import assert_identical, snapshot
from kernel_cases import BACKENDS, TRITON, device_of
from rule_cases import RULES
from storage_runs import BYTES

import fusedcalib
from fusedcalib import AdamMini
from fusedcalib.engine.check_storage import check_row_state
from fusedcalib.layout.recipe import recipe_of
from fusedcalib.reference import ORACLES

OPTIONS = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
# Rows in a tile, in a tile of one, by a loop, longer than the loop's; a vector of each; a scalar; none.
SHAPES = ((5, 7), (2, 2000), (2, 9000), (1, 33000), (9,), (33000,), (), (0, 3))


def step(optimizer, params):
    for p in params:
        p.grad = torch.randn(p.shape, dtype=torch.float64).to(p.device, p.dtype)
    optimizer.step()


def parameters(shapes, dtype=torch.float32, device="cpu"):
    return [torch.nn.Parameter(torch.randn(s, dtype=torch.float64).to(device, dtype)) for s in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("centralize", [False, "gradient", "update"])
def test_rows_of_every_length_follow_the_reference(backend, centralize):
    """In fp64: sums of 33000 squares in another order are off by some hundred roundings of 1e-16."""
    if backend == "numba" and centralize:
        pytest.skip("tests/test_kernels.py has the loops of these")
    options = {**OPTIONS, "centralize": centralize, "max_row_norm": 50.0}
    params = parameters(SHAPES, torch.float64, device_of(backend))
    optimizer = AdamMini(params, backend=backend, **options)
    expected = [(p.detach().clone(), {}) for p in params]
    for _ in range(3):
        step(optimizer, params)
        for i, p in enumerate(params):
            expected[i] = ORACLES["AdamMini"](expected[i][0], p.grad, expected[i][1], **options)
    for p, (wanted, state) in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-11, atol=1e-11)
        found = optimizer.state[p]["exp_avg_sq"]
        assert found.shape == (p.shape[:1] if p.ndim > 1 else (1,))
        torch.testing.assert_close(found, state["exp_avg_sq"], rtol=1e-12, atol=0)


def test_elements_of_a_row_have_one_denominator():
    """With one average alone an update is the gradient over a number of the row."""
    (p,) = parameters([(4, 6)])
    before = p.detach().clone()
    step(AdamMini([p], lr=1.0, betas=(0.0, 0.5), eps=0.0, backend="eager"), [p])
    scale = (before - p.detach()) / p.grad
    assert (scale.amax(1) - scale.amin(1)).max() < 1e-4 * scale.mean()
    torch.testing.assert_close(scale[:, 0], p.grad.square().mean(1).rsqrt())


@pytest.mark.parametrize("options", [{}, {"centralize": "update", "max_row_norm": 1.0}, {**BYTES}], ids=len)
def test_a_stack_is_its_matrices(options):
    """States of rows too: [matrices, rows]."""
    start = torch.randn(3, 5, 70)
    options = {**OPTIONS, "backend": "eager", "min_8bit_size": 0, **options}
    stack, matrices = torch.nn.Parameter(start.clone()), [torch.nn.Parameter(m.clone()) for m in start]
    ours = AdamMini([stack], matrix_dims=(-2, -1), **options)
    theirs = AdamMini(matrices, **options)
    for _ in range(2):
        step(ours, [stack])
        for m, g in zip(matrices, stack.grad, strict=True):
            m.grad = g.clone()
        theirs.step()
    for i, m in enumerate(matrices):
        assert torch.equal(stack[i], m)
        assert torch.equal(ours.state[stack]["exp_avg_sq"][i], theirs.state[m]["exp_avg_sq"])
    assert ours.state[stack]["exp_avg_sq"].shape == (3, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_goes_on_where_it_was_saved(dtype):
    """The state of rows keeps its type, which is not the parameter's."""
    runs = []
    for saves in (False, True):
        torch.manual_seed(0)
        params = parameters(((4, 8), (6,)), dtype)
        optimizer = AdamMini(params, **OPTIONS, backend="eager", ema_decay=0.9)
        step(optimizer, params)
        if saves:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = AdamMini(params, **OPTIONS, backend="eager", ema_decay=0.9)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        step(optimizer, params)
        runs.append([*(p.detach() for p in params), *(optimizer.state[p]["exp_avg_sq"] for p in params)])
    assert runs[0][-1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("backend", ["eager", TRITON])
def test_a_step_that_is_left_out_leaves_the_states_of_rows(backend):
    params = parameters(((4, 8), (6,)), device=device_of(backend))
    optimizer = AdamMini(params, **OPTIONS, skip_nonfinite=True, backend=backend)
    step(optimizer, params)
    before = [optimizer.state[p]["exp_avg_sq"].clone() for p in params]
    params[0].grad[0, 0] = float("nan")
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    assert all(map(torch.equal, before, [optimizer.state[p]["exp_avg_sq"] for p in params]))
    assert all(value.min() > 0 for value in before)


def test_states_that_are_not_those_of_rows():
    """A checkpoint of AdamW has such a state of every element; nothing is changed."""
    params = parameters(((4, 8), (6,)))
    other = fusedcalib.AdamW(params, lr=0.1, backend="eager")
    step(other, params)
    optimizer = AdamMini(params, **OPTIONS, backend="eager")
    saved = copy.deepcopy(other.state_dict())
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        group |= {key: value for key, value in own.items() if key != "params"}
    optimizer.load_state_dict(saved)
    before = snapshot(optimizer)
    said = r"parameter 0 of group 0: its state 'exp_avg_sq' is \(4, 8\) .* must be \(4,\) of torch.float32"
    with pytest.raises(RuntimeError, match=said):
        optimizer.step()
    assert_identical(snapshot(optimizer), before)


# Shape, dimension that is divided, over how many ranks, options; what is said.
OVER_RANKS = {
    "centred": ((8, 8), 1, 2, {"centralize": True}, "set centralize=False for it, or divide it by rows"),
    "a rank without a part": ((9,), 0, 8, {}, "some of the ranks .* have nothing: 'exp_avg_sq'.*AdamW"),
}


@pytest.mark.parametrize("case", OVER_RANKS)
def test_rows_over_ranks_that_cannot_be(case):
    """Nine elements over eight ranks are two on each of four, one on the fifth."""
    shape, dim, ranks, options, said = OVER_RANKS[case]
    p = torch.nn.Parameter(torch.zeros(shape))
    p.placements, p.device_mesh = (SimpleNamespace(dim=dim),), SimpleNamespace(size=lambda i: ranks)
    (group,) = AdamMini([p], **options).param_groups
    with pytest.raises(ValueError, match=f"AdamMini: parameter 0 of group 0.*{said}"):
        check_row_state("AdamMini: parameter 0 of group 0", p, recipe_of(AdamMini.rule, group))
    p.device_mesh = SimpleNamespace(size=lambda i: 3)
    group["centralize"] = False
    check_row_state("AdamMini: parameter 0 of group 0", p, recipe_of(AdamMini.rule, group))


def test_launches_do_not_grow_with_parameters():
    params = parameters(((4, 8), (8, 8), (3, 8), (5, 8)))
    optimizer = AdamMini(params, **OPTIONS, backend="eager")
    step(optimizer, params)
    assert len(optimizer._engine.plan.buckets) == 1


def test_it_has_half_of_adamws_states():
    found = {}
    for name in ("AdamW", "AdamMini"):
        (p,) = parameters([(64, 256)])
        optimizer = RULES[name].ours([p], backend="eager")
        step(optimizer, [p])
        held = optimizer.state_bytes()
        found[name] = held["exp_avg"] + held["exp_avg_sq"]
    assert found["AdamMini"] == found["AdamW"] / 2 + 4 * 64
