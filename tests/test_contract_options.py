"""The drop-in contract, C3: hyperparameters are read from the group at each step.

Every change is done to the run here and to the one that judges it; both must go on alike.
"""

import pytest
import torch
from cases import Twin, parameters
from rule_cases import RULES, each_few, oracle_optimizer


def regroup(**values):
    """Set hyperparameters in the first group."""
    return lambda optimizer, params: optimizer.param_groups[0].update(values)


HYPERPARAMETERS = [
    {"lr": 0.5},
    {"lr": torch.tensor(0.5)},
    {"weight_decay": 0},
    {"maximize": True},
    {"momentum": 0.5},
    {"momentum": 0},
    {"dampening": 0.25},
    {"nesterov": True},
    {"betas": (0.5, 0.6)},
    {"eps": 0.2},
    {"decoupled_weight_decay": True},
    {"decoupled_weight_decay": False},
    {"no_prox": True},
    {"lr_decay": 0.5},
    {"rho": 0.5},
    {"alpha": 0.5},
    {"momentum_decay": 2.0},
    {"clip_exponent": 2.0},
    {"clip_exponent": float("inf")},
    {"alpha_warmup": 5.0, "beta3_warmup": 0.0},
]


def changes_of(name):
    """Those of the hyperparameters that the rule has."""
    changes = [change for change in HYPERPARAMETERS if RULES[name].takes(*change)]
    three = len(RULES[name].options.get("betas", ())) == 3
    return [{"betas": (0.5, 0.4, 0.6)} if three and "betas" in c else c for c in changes]


@pytest.mark.parametrize(
    ("rule", "change"), [pytest.param(RULES[n], c, id=f"{n}-{c}") for n in RULES for c in changes_of(n)]
)
def test_c03_hyperparameters(rule, change, twin):
    built = twin().step(2)
    built.both(regroup(**change))
    built.step(2).check()


OWN_CHANGES = [
    ({}, {"l1": 0.3}),
    ({"l1": 0.3}, {"l1": 0.1}),
    ({"l1": 0.3}, {"l1": 0}),
    ({}, {"max_row_norm": 0.7}),
    ({"max_row_norm": 0.7}, {"max_row_norm": 0.3}),
    ({"max_row_norm": 0.7}, {"max_row_norm": float("inf")}),
    ({}, {"eps_inside_sqrt": True}),
]


@each_few
@pytest.mark.parametrize(("start", "change"), OWN_CHANGES, ids=str)
def test_c03_own_options(rule, backend, start, change):
    """Those that torch does not know, judged by the oracle: they come, go and change as the others do."""
    if change.keys() <= rule.own.keys():
        options = {**rule.options, **start}
        built = Twin(rule, backend, parameters(), judge=oracle_optimizer(rule.name), **options).step(2)
        built.both(regroup(**change))
        built.step(2).check()


@pytest.mark.parametrize(
    ("rule", "start", "change"),
    [
        (RULES["SGD"], {"momentum": 0}, {"momentum": 0.9}),
        (RULES["SGD"], {"momentum": 0, "weight_decay": 0}, {"momentum": 0.9, "weight_decay": 0.1}),
        (RULES["Adam"], {"weight_decay": 0}, {"weight_decay": 0.1}),
        (RULES["AdamW"], {"weight_decay": 0}, {"weight_decay": 0.1}),
        (RULES["Adam"], {"amsgrad": True}, {"amsgrad": False}),
        (RULES["AdamW"], {"amsgrad": True}, {"amsgrad": False}),
        (RULES["RMSprop"], {"centered": True}, {"centered": False}),
        (RULES["RMSprop"], {"momentum": 0.9}, {"momentum": 0.0}),
        (RULES["Signum"], {"momentum": 0}, {"momentum": 0.9}),
        (RULES["Adan"], {"no_prox": True}, {"no_prox": False}),
    ],
)
def test_c03_options_come_and_go(rule, start, change, twin):
    built = twin(**start).step(2)
    built.both(regroup(**change))
    built.step(2).check()


@pytest.mark.parametrize(
    ("rule", "start", "change", "missing"),
    [
        (RULES["Adam"], {}, {"amsgrad": True}, "max_exp_avg_sq"),
        (RULES["AdamW"], {}, {"amsgrad": True}, "max_exp_avg_sq"),
        (RULES["RMSprop"], {}, {"centered": True}, "grad_avg"),
        (RULES["RMSprop"], {"momentum": 0}, {"momentum": 0.5}, "momentum_buffer"),
    ],
)
def test_c03_options_that_cannot_come_late(rule, start, change, missing, twin):
    """torch has no state to go on from and says KeyError; making one up would be a guess."""
    built = twin(**start).step()
    built.both(regroup(**change))
    for optimizer, _ in built.sides:
        with pytest.raises(KeyError, match=missing):
            optimizer.step()
