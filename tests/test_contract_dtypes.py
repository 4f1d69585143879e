"""The drop-in contract: dtypes of parameters and of stored state, the same or not.

Narrow numbers are judged by torch.optim in float64 from the same values and gradients.
"""

import pytest
import torch
from cases import BACKENDS, documentation, parameters, tolerance
from rule_cases import FEW, RULES, each, each_few

# Steps large enough to be seen; an epsilon that keeps tiny second moments, which float16 rounds to
# nothing, out of the quotient: torch's own float16 inputs have the same.
VISIBLE = {"lr": 0.5}
SAFE = {"eps": 0.1}
STEPS = 3
NARROW = (torch.bfloat16, torch.float16, torch.float32)


def doubles(params):
    return [torch.nn.Parameter(p.detach().to(torch.float64, copy=True)) for p in params]


def rounding(dtype):
    """What storing values of magnitude below 8 adds up to over the steps: half a unit each time."""
    return STEPS * 8 / 2 * torch.finfo(dtype).eps


def judged(rule, twin, *dtypes):
    """Against float64. A sign is not rounded, it is right or wrong: no average comes near zero."""
    params = [p for dtype in dtypes for p in parameters(dtype=dtype)]
    built = twin(params, expected=doubles(params), **VISIBLE, **(SAFE if rule.counted else {}))
    return built.steady() if rule.signs else built


def check(built, param_dtype, state_dtype):
    """Every moment is stored, decay feeds on the weights, the step is lr times a direction below 8.

    The direction is a quotient of moments, or of the gradient and one: relative errors add up.
    """
    decay = STEPS * built.rule.options["weight_decay"]
    state = len(built.rule.moments) * rounding(state_dtype) + decay * rounding(param_dtype)
    state += tolerance(torch.float32, STEPS)
    built.check(rounding(param_dtype) + VISIBLE["lr"] * state, state)


def stored_dtypes(built):
    return {built.ours.state[p][key].dtype for p in built.params for key in built.rule.moments}


@pytest.mark.parametrize(
    ("rule", "backend", "dtype"),
    [(rule, "eager", torch.bfloat16) for rule in RULES.values()]
    + [
        (RULES[n], b, d) for n in FEW for b in BACKENDS for d in NARROW if (b, d) != ("eager", torch.bfloat16)
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_narrow_parameters(rule, twin, dtype):
    built = judged(rule, twin, dtype).step(STEPS)
    check(built, dtype, dtype)


@each_few
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters_are_computed_in_float32(rule, twin, dtype):
    """One step is off by the rounding of the result alone: half a unit, and what float32 is off."""
    built = judged(rule, twin, dtype).step()
    close = {"rtol": torch.finfo(dtype).eps / 2, "atol": tolerance(torch.float32, 1)}
    for p, q in zip(built.params, built.expected, strict=True):
        torch.testing.assert_close(p.double(), q, **close)
        for key in rule.moments:
            stored, exact = built.ours.state[p][key], built.theirs.state[q][key]
            torch.testing.assert_close(stored.double(), exact, **close)


@pytest.mark.parametrize("backend", ["eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_state_dtype_of_narrow_parameters_is_documented(rule, twin, dtype):
    """AReaL #1292: the moments of narrow parameters have the dtype that the docstring tells."""
    built = judged(rule, twin, dtype).step()
    (stored,) = stored_dtypes(built)
    words = {torch.float32: "float32", dtype: "like the parameter"}
    assert words[stored] in documentation(rule.ours)


@each_few
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_c11_prefilled_state_of_another_dtype(rule, twin, dtype, stored):
    """State made by the user, or by a step hook as torchtitan's, keeps its dtype."""
    built = judged(rule, twin, dtype)

    def fill(optimizer, args, kwargs):
        for p in built.params:
            if p not in optimizer.state:
                optimizer.state[p] = rule.new_state(p, stored)

    built.ours.register_step_pre_hook(fill)
    built.step(STEPS)
    assert stored_dtypes(built) == {stored}
    check(built, dtype, stored)


@each(["SGD", "AdamW", "NAdam"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_c15_dtype_changes_between_steps(rule, twin, dtype):
    """`module.half()` in mid-training, which torch's Adam refuses: the state stays as it is."""
    built = judged(rule, twin, torch.float32).step()
    for p, q in zip(built.params, built.expected, strict=True):
        p.grad = q.grad = None
        p.data = p.data.to(dtype)
        q.data = p.data.to(torch.float64, copy=True)
    built.step(STEPS - 1)
    assert stored_dtypes(built) == {torch.float32}
    check(built, dtype, torch.float32)


@each_few
def test_c15_mixed_dtypes_in_one_group(rule, twin):
    built = judged(rule, twin, torch.float32, torch.bfloat16, torch.float64).step(STEPS)
    check(built, torch.bfloat16, torch.bfloat16)


def test_c33_float64_is_computed_in_float64(twin):
    """Bias corrections too: in float32 they would be off by 1e-8."""
    twin(dtype=torch.float64).step(5).check()


def test_c33_float64_late_in_training(twin):
    def skip(optimizer, params):
        for p in params:
            optimizer.state[p].get("step", torch.tensor(0)).fill_(9999)

    built = twin(dtype=torch.float64).step()
    built.both(skip)
    built.step(2).check()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_c33_complex(rule, twin, dtype):
    if rule.of_rows:
        with pytest.raises(ValueError, match=r"is complex, which has no row means .* no state of rows"):
            twin(dtype=dtype).step()
        return
    twin(dtype=dtype).step(4).check()
