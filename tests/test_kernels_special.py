"""NaN, infinity, zeros of either sign, subnormals: the same on every executor, and as torch has them."""

import inspect

import numpy
import pytest
import torch
from kernel_cases import COVERING, DTYPES, STAGES, Case, matrix
from kernel_run import Numbers, Tensors, assert_same_bits, run, special

from fusedcalib.executors import eager
from fusedcalib.layout.recipe import recipe_of
from fusedcalib.reference import ORACLES

# Elements by themselves: no tensor here has rows.
CASES = {name: case.without("centralize", "max_row_norm") for name, case in COVERING.items()}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# Loops take a second and more to compile: the first case of each rule, and one of each dtype.
LOOPS = {case.rule: name for name, case in [*CASES.items()][::-1]}
LOOPS |= {case.dtypes: name for name, case in CASES.items() if name not in LOOPS.values()}


def rooted(case: Case) -> set[str]:
    """What a square root enters: the parameter, states behind one; with coupled decay all other states."""
    if "sqrt(" not in inspect.getsource(case.ours.rule.update.fn):
        return set()
    recipe = recipe_of(
        case.ours.rule, case.ours([torch.nn.Parameter(torch.ones(1))], **case.options).param_groups[0]
    )
    behind = {
        "Adadelta": {"acc_delta"},
        "RMSprop": {"momentum_buffer"},
        "ADOPT": {"exp_avg"},
        "LaProp": {"exp_avg"},
    }
    states = set(recipe.states) if recipe.flags.decay == "coupled" else behind.get(case.rule, set())
    return {"param", *states}


def numbers_for(case: Case) -> Numbers:
    return special(7 if case.rule == "RAdam" else 3)  # of which it takes two in its second form


def _root(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(numpy.asarray(numpy.sqrt(numpy.asarray(x))))


def exactly(case: Case, numbers: Numbers) -> list[Tensors]:
    """Plain torch, with NumPy's square root: on CPUs torch's own may be off by an ulp."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(eager.NAMES, "sqrt", _root)
        eager.pipeline.cache_clear()
        found = run("eager", case, *numbers)
    eager.pipeline.cache_clear()
    return found


@pytest.mark.parametrize(
    ("backend", "case"), matrix({}, {name: CASES[name] for name in LOOPS.values()}, CASES)
)
def test_fused_and_plain_torch_agree_to_the_last_bit(backend: str, case: Case):
    """Without sums over rows, whose additions have another order, every operation is the same and exact."""
    numbers = numbers_for(case)
    assert_same_bits(run(backend, case, *numbers), exactly(case, numbers))


@cases
def test_the_square_root_of_torch_is_off_by_an_ulp_at_most(case: Case):
    """So is what it enters in plain torch, in each step; all else is not."""
    numbers = numbers_for(case)
    (found,), (expected,) = run("eager", case, *numbers), exactly(case, numbers)
    for name in found:
        if name not in rooted(case):
            assert_same_bits([{name: found[name]}], [{name: expected[name]}])
            continue
        limit = len(numbers[1]) * torch.finfo(found[name].dtype).eps  # at most the next number, each step
        torch.testing.assert_close(found[name], expected[name], rtol=limit, atol=limit, equal_nan=True)


@cases
def test_nan_and_infinity_propagate_as_in_torch(case: Case):
    """In plain torch, with which the other executors agree on the same numbers, see above.

    Where torch.optim has not the rule, as the oracle has it in fp32.
    """
    if case.ours.rule.trust:
        pytest.skip("the oracle's norms overflow in fp32, ours are fp64: see test_norms.py")
    case = case._replace(dtypes=DTYPES["fp32"])
    if hasattr(torch.optim, case.rule):
        case = case.without("l1")
        case.options.pop("eps_inside_sqrt", None)
    start, gradients = numbers_for(case)
    if case.rule == "NAdam" or case.options.get("centered"):
        start, gradients = [tamed(start[0])], [[tamed(g)] for (g,) in gradients]
    (found,) = run("eager", case, start, gradients)
    theirs = in_torch(case, start[0].float(), [g.float() for (g,) in gradients])
    assert found.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


def tamed(values: torch.Tensor) -> torch.Tensor:
    """Finite values whose squares are finite in fp32.

    Where the square of RMSprop's mean overflows torch itself is of two minds: with fused multiply-add its
    update is 0, else NaN. NAdam's sum may overflow a little before torch, which scales its terms first.
    """
    return torch.where(values.isfinite(), values.clamp(-1e18, 1e18), values)


def in_torch(case: Case, start: torch.Tensor, gradients: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameter and state by torch.optim's class, or by the oracle in fp32."""
    if hasattr(torch.optim, case.rule):
        p = torch.nn.Parameter(start)
        options = {k: v for k, v in case.options.items() if k == "weight_decay" or k not in STAGES}
        optimizer = getattr(torch.optim, case.rule)([p], foreach=False, **options)
        for g in gradients:
            p.grad = g
            optimizer.step()
        return {"param": p.detach(), **optimizer.state[p]}
    p, state = start, {}
    for g in gradients:
        p, state = ORACLES[case.rule](p, g, state, **case.options)
    return {
        "param": p,
        **{name: torch.as_tensor(value, dtype=torch.float32) for name, value in state.items()},
    }
