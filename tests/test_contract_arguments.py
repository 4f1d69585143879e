"""The drop-in contract: what a constructor and a param group accept, and what they refuse by name."""

import inspect
import math
import re

import pytest
import torch
from cases import Twin, assert_identical, documentation, parameters, snapshot, train, twins
from rule_cases import COUNTED, IN_TORCH, OWN, RULES, each, each_few

# Torch's own classes are checked as torch checks them: what a constructor is told, not what a group is.
CHECKED = ["Lion", "Signum", "Adan", "ADOPT", "AdEMAMix"]
FLAGS = [
    {"foreach": True},
    {"foreach": False},
    {"foreach": None},
    {"fused": True},
    {"fused": False},
    {"maximize": True},
    {"foreach": True, "maximize": True},
    {"fused": True, "maximize": True},
    {"differentiable": False},
]


@pytest.mark.parametrize(
    ("rule", "flags"),
    [pytest.param(r, f, id=f"{r.name}-{f}") for r in RULES.values() for f in FLAGS if r.takes(*f)],
)
def test_c05_torchs_flags(rule, twin, flags):
    built = twin(**flags)
    built.step(2).check()
    assert {k: built.ours.param_groups[0][k] for k in flags} == flags


@each([name for name, rule in RULES.items() if rule.in_torch and rule.takes("fused", "foreach")])
def test_c05_contradicting_flags(rule, ours):
    """The errors of torch's own class."""
    with pytest.raises(RuntimeError) as theirs:
        rule.theirs(parameters(), fused=True, foreach=True)
    with pytest.raises(RuntimeError) as mine:
        ours(parameters(), fused=True, foreach=True)
    assert str(mine.value) == str(theirs.value)


@pytest.mark.parametrize("flag", ["fused", "capturable"])
def test_c05_every_class_takes_what_steps_here_can_do(rule, backend, flag):
    """Also where torch's does not: what it stands for is for every rule."""
    assert rule.ours(parameters(), backend=backend, **{flag: True}).param_groups[0][flag] is True
    assert rule.ours(parameters(), backend=backend).param_groups[0][flag] in (None, False)


@pytest.mark.parametrize("flag", ["differentiable", "foreach"])
def test_c05_flags_are_those_of_torch(rule, backend, flag):
    """What torch's class does not take is refused; an unsupported flag by name, with what to use instead."""
    expected, message = TypeError, flag
    if rule.takes(flag):
        if flag == "foreach":
            return
        instead = rf"torch\.optim\.{rule.name}\b" if rule.in_torch else "set it to False"
        expected, message = ValueError, rf"(?s){flag}.*{instead}"
    with pytest.raises(expected, match=message):
        rule.ours(parameters(), backend=backend, **{flag: True})


@pytest.mark.parametrize(
    ("option", "value"),
    [("backend", "cudnn"), ("centralize", "weights"), ("centralize_min_ndim", 0)],
)
def test_unknown_words_are_refused(rule, option, value):
    with pytest.raises(ValueError, match=rf"(?s){option}.*{value}"):
        rule.ours(parameters(), **{option: value})


def test_own_options_are_keyword_only_and_documented(rule):
    arguments = inspect.signature(rule.ours).parameters
    assert next(iter(arguments)) == "params"
    defaults = [a.default for a in arguments.values() if a.kind is a.POSITIONAL_OR_KEYWORD][1:]
    rule.ours(parameters(), *defaults)
    with pytest.raises(TypeError, match="positional argument"):
        rule.ours(parameters(), *defaults, False)
    for option in (*rule.own, "backend"):
        assert arguments[option].kind is inspect.Parameter.KEYWORD_ONLY
        assert re.search(rf"\b{option}\b[^.]*:", documentation(rule.ours))


@pytest.mark.parametrize("option", ["centralise", "no_such_option", "params_"])
def test_unknown_options_are_refused(rule, option):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        rule.ours(parameters(), **{option: True})


NAN = math.nan
# option -> values out of its range, for every class that takes it
OUT_OF_RANGE = {
    "lr": [-1.0, NAN, torch.tensor(-1.0)],
    "weight_decay": [-1.0, NAN],
    "eps": [-1.0, NAN],
    "betas": [(-0.1, 0.5), (0.5, 1.0), (0.5, NAN)],
}
SIGNED = {"l1": [-1.0, NAN, math.inf], "max_row_norm": [0.0, -1.0, NAN]}
OF_CHECKED = {**OUT_OF_RANGE, "momentum": [-0.1, 1.0, NAN], "clip_exponent": [-1.0, NAN]}
OF_CHECKED |= {"alpha": [-1.0, NAN], "alpha_warmup": [-1.0], "beta3_warmup": [NAN]}


def bad(names, table):
    """(rule, {option: bad value}) for every option that the rule takes."""
    return [
        pytest.param(RULES[name], {option: fitting(RULES[name], value)}, id=f"{name}-{option}={value}")
        for name in names
        for option, values in table.items()
        for value in values
        if RULES[name].takes(option) or option in OWN
    ]


def fitting(rule, value):
    """Betas also for a rule that has three."""
    return (0.5, *value) if isinstance(value, tuple) and len(rule.options["betas"]) == 3 else value


# The words of torch's classes differ ("learning rate", "epsilon value", "beta parameter at index 0").
WORDS = {"lr": "learning rate", "eps": r"\bep", "betas": "beta"}


@pytest.mark.parametrize(("rule", "wrong"), bad(CHECKED, OF_CHECKED) + bad(RULES, SIGNED))
def test_out_of_range_for_the_constructor(rule, wrong):
    (option,) = wrong
    with pytest.raises(ValueError, match=f"Invalid {WORDS.get(option, option)}"):
        rule.ours(parameters(), **{**rule.options, **wrong})
    if option not in OWN:  # also where every group has a good one, as torch's
        groups = [{"params": parameters(), option: inspect.signature(rule.ours).parameters[option].default}]
        with pytest.raises(ValueError, match=f"Invalid {WORDS.get(option, option)}"):
            rule.ours(groups, **{**rule.options, **wrong})


@pytest.mark.parametrize(("rule", "wrong"), bad([*IN_TORCH, "SGDW"], OUT_OF_RANGE))
def test_out_of_range_for_the_constructor_of_torchs_classes(rule, wrong):
    """What torch refuses, and in its words; SGDW as SGD."""
    theirs = rule.theirs if rule.in_torch else torch.optim.SGD
    refusals = []
    for cls in (rule.ours, theirs):
        try:
            cls(parameters(), **{**rule.options, **wrong})
        except ValueError as error:
            refusals.append(str(error))
    assert refusals[:1] == refusals[1:]
    assert refusals or (theirs is torch.optim.SGD and NAN in wrong.values()), "torch's SGD takes NaN"


@pytest.mark.parametrize(("rule", "wrong"), bad(RULES, SIGNED) + bad(CHECKED, OF_CHECKED))
def test_out_of_range_in_a_group(rule, wrong):
    """Refused before anything has changed: when it comes with the group, and when it is set later."""
    (option,) = wrong
    refused = pytest.raises(ValueError, match=f"Invalid {WORDS.get(option, option)}")
    with refused:
        rule.ours([{"params": parameters(), **wrong}], backend="eager")
    optimizer = rule.ours(parameters(), backend="eager", **rule.options)
    with refused:
        optimizer.add_param_group({"params": parameters(((2, 3),)), **wrong})
    assert len(optimizer.param_groups) == 1
    (group,) = optimizer.param_groups
    for steps in (0, 1):
        train(optimizer, steps)
        for p in group["params"]:
            p.grad = torch.ones_like(p)
        before, good = snapshot(optimizer), {option: group.get(option)}
        group.update(wrong)
        with refused:
            optimizer.step()
        assert_identical(snapshot(optimizer), before)
        group.update(good)
    train(optimizer)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@each(["Lion", "Adan", "ADOPT", "AdEMAMix"])
def test_a_wrong_number_of_betas(rule, count):
    betas = (0.5,) * count
    if count == len(rule.options["betas"]):
        train(rule.ours(parameters(), betas=betas, backend="eager"))
        return
    with pytest.raises(ValueError, match="Invalid betas"):
        rule.ours(parameters(), betas=betas)


@each(["SGD", "AdamW"])
@pytest.mark.parametrize("option", ["l1", "max_row_norm"])
def test_complex_parameters_have_no_sign_and_no_rows(ours, option):
    """Refused by the step in their own group; beside another group that has the option they train on."""
    real, complex_ = parameters(((4, 3),)), parameters(((4, 3),), torch.complex64)
    alone = ours([{"params": twins(complex_)}])
    together = ours([{"params": real, option: 0.5}, {"params": complex_}])
    for _ in range(2):
        real[0].grad, complex_[0].grad = torch.randn_like(real[0]), torch.randn_like(complex_[0])
        (other,) = alone.param_groups[0]["params"]
        other.grad = complex_[0].grad.clone()
        together.step()
        alone.step()
    assert_identical(snapshot(together)[1], snapshot(alone)[0])
    together.param_groups[1][option] = 0.5
    before = snapshot(together)
    with pytest.raises(ValueError, match=rf"complex.*{option}"):
        together.step()
    assert_identical(snapshot(together), before)


@pytest.mark.parametrize("option", ["max_row_norm", "clip_exponent"])
@each_few
def test_no_limit_in_a_group(rule, backend, option):
    """None in a group is what None is to the constructor, and is stored as a number (contract C16)."""
    if not rule.takes(option) and option not in OWN:
        return
    options = {**rule.options, option: 0.5}
    params = parameters()
    copies = twins(params)
    told = rule.ours(copies, backend=backend, **{**options, option: None})
    grouped = rule.ours([{"params": params, option: None}], backend=backend, **options)
    late = rule.ours(twins(params), backend=backend, **options)
    late.param_groups[0][option] = None
    assert [o.param_groups[0][option] for o in (told, grouped)] == [math.inf] * 2
    for _ in range(3):
        for p, q, r in zip(params, copies, late.param_groups[0]["params"], strict=True):
            p.grad = torch.randn_like(p)
            q.grad, r.grad = p.grad.clone(), p.grad.clone()
        for optimizer in (told, grouped, late):
            optimizer.step()
    assert_identical(snapshot(grouped), snapshot(told))
    assert_identical(snapshot(late), snapshot(told))


@each([name for name in COUNTED if not RULES[name].takes("decoupled_weight_decay")])
def test_c04_another_classs_option_in_a_group_is_the_users(rule, backend):
    """torch's Adagrad does not know `decoupled_weight_decay`; neither does ours."""

    def arrange(params):
        return [{"params": params, "decoupled_weight_decay": True}]

    Twin(rule, backend, parameters(), arrange=arrange, **rule.options).step(2).check()
