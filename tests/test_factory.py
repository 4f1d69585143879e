"""Optimizers by name: which there are, and what a wrong name or option is answered."""

import inspect
import sys

import pytest
import torch

import fusedcalib
from fusedcalib import rules
from fusedcalib.optimizer import FusedOptimizer
from fusedcalib.registry import create, optimizers

CLASSES = optimizers()


def weight():
    return torch.nn.Parameter(torch.ones(2, 3))


def test_the_classes_stand_under_their_names():
    assert list(CLASSES) == sorted(CLASSES)
    assert {"SGD", "Adam", "AdamW"} <= set(CLASSES)
    for name, cls in CLASSES.items():
        assert cls.__name__ == name
        assert issubclass(cls, FusedOptimizer)
        assert getattr(fusedcalib, name) is cls


NEW_RULE = """
from fusedcalib.optimizer import FusedOptimizer
from fusedcalib.rules.sgd import SGD
class Heavy(SGD): pass
class _Unfinished(SGD): pass
class Unrelated: pass
"""


def test_a_new_file_is_all_that_a_new_class_takes(monkeypatch, tmp_path):
    (tmp_path / "new_rule.py").write_text(NEW_RULE)
    monkeypatch.setattr(rules, "__path__", [*rules.__path__, str(tmp_path)])
    try:
        found = optimizers()
    finally:
        sys.modules.pop("fusedcalib.rules.new_rule", None)
        vars(rules).pop("new_rule", None)
    assert set(found) - set(CLASSES) == {"Heavy"}
    assert set(CLASSES) <= set(found)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("case", [str, str.lower, str.upper], ids=["as is", "lower", "upper"])
def test_a_name_in_any_case(name, case):
    assert type(create(case(name), [weight()])) is CLASSES[name]


@pytest.mark.parametrize("name", CLASSES)
def test_options_are_those_of_the_class(name):
    options = {"lr": 0.25, "weight_decay": 0.5, "centralize": "update", "backend": "eager"}
    optimizer = create(name, [{"params": [weight()], "centralize": False}, {"params": [weight()]}], **options)
    assert optimizer.backend == "eager"
    for group, centralize in zip(optimizer.param_groups, (False, "update"), strict=True):
        assert (group["lr"], group["weight_decay"], group["centralize"]) == (0.25, 0.5, centralize)


@pytest.mark.parametrize("name", CLASSES)
def test_options_not_given_are_the_defaults_of_the_class(name):
    made = create(name, [weight()]).defaults
    assert made == CLASSES[name]([weight()]).defaults
    assert made["lr"] == inspect.signature(CLASSES[name]).parameters["lr"].default


@pytest.mark.parametrize(
    ("name", "said"),
    [("adam_w", "mean 'AdamW'"), ("SDG", "mean 'SGD'"), ("zz", "'zz'; there are"), ("", "''")],
)
def test_a_wrong_name_gets_the_right_ones(name, said):
    with pytest.raises(ValueError, match="no optimizer") as error:
        create(name, [weight()])
    assert said in str(error.value)
    assert ", ".join(CLASSES) in str(error.value)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("option", "said"), [("weight_decy", "mean 'weight_decay'"), ("zz", "'zz'; it has lr, "), ("params", "")]
)
def test_a_wrong_option_is_told_before_anything_is_read(name, option, said):
    params = iter([weight()])
    with pytest.raises(TypeError) as error:
        create(name, params, lr=0.1, **{option: 1})
    assert said in str(error.value)
    assert len(list(params)) == 1
    if option != "params":  # which Python itself refuses
        assert f"{name} has no option {option!r}" in str(error.value)
        known = list(inspect.signature(CLASSES[name]).parameters)
        assert ", ".join(known[1:]) in str(error.value)
