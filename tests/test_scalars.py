"""The numbers of a step: what is recorded for a device is what the host computes."""

import math

import numpy as np
import pytest
import torch
from rule_cases import RULES, each

import fusedcalib
from fusedcalib import GradientNoise, LangevinNoise, WeightNoise
from fusedcalib.hostmath import Recorded
from fusedcalib.kernels.tape import CODES
from fusedcalib.layout import scalars
from fusedcalib.layout.recipe import recipe_of

each_rule = each(RULES)
# Options of one group each; a tape is one for all of them.
GROUPS = [
    {},
    {"weight_decay": 0.1, "noise": GradientNoise(0.3, 0.4), "max_grad_norm": 2.0},
    {"lr": 0.0, "weight_decay": 0.1, "noise": WeightNoise(0.3), "max_row_norm": 3.0, "ema_decay": 0.9},
    {"lr": 0.3, "noise": LangevinNoise(0.7), "l1": 0.1, "max_grad_norm": math.inf},
    {"lr": 0.2, "betas": (0.0, 0.6), "clip_exponent": None, "eps_inside_sqrt": True, "momentum": 0.5},
    {"betas": (0.0, 0.6), "alpha_warmup": 10.0, "beta3_warmup": 10.0},
    {
        "lr": 0.2,
        "alpha_warmup": 5.0,
        "beta3_warmup": 7.0,
        "decoupled_weight_decay": True,
        "no_prox": True,
        "weight_decay": 0.2,
        "lr_decay": 0.1,
    },
]
SITUATIONS = [
    scalars.StepFacts(1, 1.0),
    scalars.StepFacts(2, 0.5, norm=3.0, scale=1024.0),
    scalars.StepFacts(9, 0.25, norm=0.5, skip=1.0),
    scalars.StepFacts(5000, 1e-9, norm=math.inf, scale=0.5),
]
DOES = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "power": np.power,
    "sqrt": np.sqrt,
    "where": lambda c, x, y: np.where(c != 0, x, y),
    "equal": lambda x, y: float(x == y),
    "greater": lambda x, y: float(x > y),
    "fp32": lambda x: np.float64(np.float32(x)),
    "log2": np.log2,
}


def played(tape, recipe, group, now):
    """The tape run by NumPy."""
    values = [np.float64(x) for x in (*now, *scalars.leaves_of(tape, recipe, group))]
    names = list(CODES)
    for i in range(0, len(tape.code), 4):
        code, *places = tape.code[i : i + 4]
        count = {"where": 3, "sqrt": 1, "fp32": 1, "log2": 1}.get(names[code], 2)
        with np.errstate(all="ignore"):
            values.append(DOES[names[code]](*(values[place] for place in places[:count])))
    return [float(values[place]) for place in tape.outputs]


@each_rule
@pytest.mark.parametrize("now", SITUATIONS, ids=lambda now: f"step {now.step}")
def test_a_tape_gives_the_numbers_of_the_host(rule, now):
    """To the last bit but for powers, where NumPy and Python may round differently."""
    torch.manual_seed(0)
    taken = [{k: v for k, v in group.items() if rule.takes(k)} for group in GROUPS]
    if "betas" in rule.options and len(rule.options["betas"]) == 3:
        taken = [{k: (*v, 0.7) if k == "betas" else v for k, v in group.items()} for group in taken]
    opt = rule.ours([{"params": [torch.nn.Parameter(torch.zeros(1))], **group} for group in taken])
    (tape,) = {scalars.tape_of(rule.ours.rule, scalars.shape_of(group)) for group in opt.param_groups}
    for group in opt.param_groups:
        recipe = recipe_of(rule.ours.rule, group)
        row, product = scalars.row_of(rule.ours.rule, scalars.numbers_of(recipe, group), now)
        found = played(tape, recipe, group, now)
        np.testing.assert_allclose(found, [*row, product], rtol=1e-14)


def test_a_recorded_number_decides_nothing():
    with pytest.raises(TypeError, match="where"):
        bool(Recorded("add", (1, 2)) > 3)


def test_tensors_are_leaves_where_they_are():
    """A number on a device is not waited for: the kernel is given its address."""
    opt = fusedcalib.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.5))
    (group,) = opt.param_groups
    recipe = recipe_of(opt.rule, group)
    tape = scalars.tape_of(opt.rule, scalars.shape_of(group))
    place = tape.leaves.index(("lr", 0))
    assert scalars.leaves_of(tape, recipe, group)[place] == 0.5
    group["lr"] = torch.tensor(0.5, device="meta")
    assert scalars.leaves_of(tape, recipe, group)[place] is group["lr"]
    group["lr"] = torch.zeros((), dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"lr on a device must be fp32 or fp64, not torch.int64"):
        scalars.leaves_of(tape, recipe, group)
