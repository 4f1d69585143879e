"""What cannot be kept as it is asked for, said before anything is changed."""

import copy

import pytest
import torch
from cases import assert_identical, parameters, snapshot, train
from rule_cases import RULES
from storage_runs import BYTES

import fusedcalib

# Rule, dtype, options and what is said; the parameter before it could be stepped.
STEPS = {
    "fp16, split16": ("AdamW", torch.float16, {"master_weights": "split16"}, 'use master_weights="float32"'),
    "fp16, split8": ("SGD", torch.float16, {"master_weights": "split8"}, 'use master_weights="float32"'),
    "fp64, 8bit": ("AdamW", torch.float64, BYTES, "torch.float64, whose states cannot be kept as '8bit'"),
    "complex, 8bit": (
        "Lion",
        torch.complex64,
        BYTES,
        "torch.complex64, whose states cannot be kept as '8bit'",
    ),
    "fp64, in part": (
        "AdamW",
        torch.float64,
        {"state_dtype": {"exp_avg_sq": "8bit"}},
        "cannot be kept as '8bit'",
    ),
    "fp64, stochastic": (
        "AdamW",
        torch.float64,
        {"state_dtype": "bfloat16_stochastic"},
        "cannot be kept as 'bfloat16_stochastic'",
    ),
}


@pytest.mark.parametrize("when", ["first", "later"])
@pytest.mark.parametrize("case", STEPS)
def test_parameters_that_cannot_be_kept_so(case, when):
    """At the first step, or where a later one is asked to; neither parameter is stepped."""
    rule, dtype, options, said = STEPS[case]
    params = [*parameters(((64, 64),), device="cpu"), *parameters(((3, 4), (64, 64)), dtype, "cpu")]
    optimizer = getattr(fusedcalib, rule)(
        params, lr=0.1, backend="eager", **(options if when == "first" else {})
    )
    if when == "later":
        train(optimizer, 2)
        optimizer.param_groups[0].update(options)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"{rule}: parameter 1 of group 0.*{said}"):
        train(optimizer)
    assert_identical(snapshot(optimizer), before)
    assert bool(optimizer.state) == (when == "later" and rule != "SGD")


# Rule, options and what is said: at construction, of a new group, and of one that is changed.
GROUPS = {
    "split16": (
        "AdamW",
        {"master_weights": "split16", "stochastic_rounding": True},
        'Invalid stochastic_rounding: .*use master_weights="split8"',
    ),
    "float32": (
        "SGD",
        {"master_weights": "float32", "stochastic_rounding": True},
        'Invalid stochastic_rounding: .*use master_weights="split8"',
    ),
    "Adagrad": ("Adagrad", BYTES, 'Adagrad cannot keep sum in bytes.* or "bfloat16_stochastic"'),
    "Adagrad, by name": ("Adagrad", {"state_dtype": {"sum": "8bit"}}, "cannot keep sum in bytes"),
    "RMSprop": ("RMSprop", {**BYTES, "centered": True}, "RMSprop cannot keep .*grad_avg.* in bytes"),
    "AdEMAMix": (
        *("AdEMAMix", {"state_dtype": {"exp_avg_slow": "8bit"}}),
        r"AdEMAMix cannot keep .*exp_avg_slow.* in bytes.*use state_dtype=torch\.float32$",
    ),
    "unknown name": (
        "AdamW",
        {"state_dtype": {"exp_avg": "8bit", "momentum": "8bit"}},
        "AdamW has no state 'momentum', but exp_avg, exp_avg_sq, max_exp_avg_sq",
    ),
    "unknown name, Lion": ("Lion", {"state_dtype": {"exp_avg_sq": "8bit"}}, "Lion has no state 'exp_avg_sq'"),
    "unknown form": ("AdamW", {"state_dtype": {"exp_avg": "4bit"}}, "Invalid state_dtype"),
    "master": ("AdamW", {"master_weights": 16}, "Invalid master_weights value: 16"),
    "least": ("AdamW", {"min_8bit_size": -1}, "Invalid min_8bit_size"),
}


@pytest.mark.parametrize("case", GROUPS)
def test_options_that_do_not_go_together(case):
    name, options, said = GROUPS[case]
    cls, params = getattr(fusedcalib, name), parameters(((64, 64),), torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match=said):
        cls(params, **options)
    optimizer = cls(params, backend="eager", **RULES[name].options)
    train(optimizer)
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=said):
        optimizer.add_param_group({"params": parameters(((64, 64),)), **options})
    assert optimizer.state_dict()["param_groups"] == groups
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=said):
        train(optimizer)
    assert_identical(snapshot(optimizer), before)


def test_the_state_that_adagrad_makes_at_once():
    (p,) = parameters(((64, 64),), torch.float16, "cpu")
    optimizer = fusedcalib.Adagrad([p], master_weights="split16")
    before = p.detach().clone()
    with pytest.raises(ValueError, match="Adagrad: parameter 0 of group 0 is fp16"):
        optimizer.share_memory()
    assert_identical(p.detach(), before)
    assert not optimizer.state
