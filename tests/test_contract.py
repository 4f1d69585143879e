"""The drop-in contract: what a class of this package looks like from outside, before it steps."""

import inspect
import warnings

import pytest
import torch
from cases import (
    BACKENDS,
    DEVICE,
    Twin,
    assert_identical,
    parameters,
    snapshot,
    train,
    twins,
)
from rule_cases import each, each_few


def test_c01_is_a_torch_optimizer(rule, ours):
    optimizer = ours(parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, getattr(torch.optim, rule.name, torch.optim.Optimizer))
    assert torch.optim.lr_scheduler.StepLR(optimizer, 1).optimizer is optimizer


def test_c02_groups_only(rule, backend):
    """Every hyperparameter inside the group, none beside it, is as if the constructor had them."""
    built = Twin(rule, backend, parameters(), **rule.options)
    built.ours = rule.ours([{"params": built.params, **rule.options}], backend=backend)
    built.step(3).check()


@each(["SGD", "AdamW", "Lion"])
@pytest.mark.parametrize("centralize", [True, "gradient", "update"])
def test_c02_own_options_in_groups(ours, centralize):
    """Set in a group, they act as when the constructor has them, and on that group alone."""
    own = {"centralize": centralize}
    convolutions = {**own, "centralize_min_ndim": 4}
    groups = [((5, 7), own), ((5, 7), convolutions), ((4, 3, 2, 2), convolutions), ((5, 7), {})]
    params = parameters(shape for shape, _ in groups)
    together = ours([{"params": [p], **options} for p, (_, options) in zip(params, groups, strict=True)])
    apart = [ours(twins([p]), **options) for p, (_, options) in zip(params, groups, strict=True)]
    plain = [ours(twins([p])) for p in params]
    for _ in range(2):
        for p, *copies in zip(params, apart, plain, strict=True):
            p.grad = torch.randn_like(p)
            for optimizer in copies:
                optimizer.param_groups[0]["params"][0].grad = p.grad.clone()
                optimizer.step()
        together.step()
    assert_identical(snapshot(together), [snapshot(optimizer)[0] for optimizer in apart])
    uncentred = [
        torch.equal(p, snapshot(optimizer)[0][0]) for p, optimizer in zip(params, plain, strict=True)
    ]
    assert uncentred == [False, True, False, True]


@each_few
def test_c02_groups_differ(rule, twin):
    """Each group runs by its own options, those it lacks by the defaults."""

    def arrange(params):
        return [
            {"params": params[:2], "lr": 0.5, "weight_decay": 0.0},
            {"params": params[2:3], "maximize": True},
            {"params": params[3:]},
        ]

    twin(arrange=arrange).step(3).check()


def test_c04_unknown_group_keys(twin):
    foreign = {"param_names_of_mine": ["w"], "initial_lr": 0.5, "max_momentum": 0.95, "mine": {}}
    built = twin(arrange=lambda params: [{"params": params, **foreign}])
    built.step(2).check()
    assert {k: built.ours.param_groups[0][k] for k in foreign} == foreign


WAYS = {
    "list": lambda named: [p for _, p in named],
    "iterator": lambda named: iter([p for _, p in named]),
    "groups": lambda named: [{"params": [p]} for _, p in named],
    "iterator of groups": lambda named: iter([{"params": p} for _, p in named]),
    "names": list,
    "iterator of names": iter,
    "groups of names": lambda named: [{"params": named[:2]}, {"params": named[2:]}],
}


@pytest.mark.parametrize("way", WAYS)
def test_c06_ways_to_pass_parameters(twin, way):
    def arrange(params):
        return WAYS[way]([(f"layer.{i}", p) for i, p in enumerate(params)])

    built = twin(arrange=arrange)
    built.step(2).check()
    for mine, theirs in zip(built.ours.param_groups, built.theirs.param_groups, strict=True):
        assert mine.get("param_names") == theirs.get("param_names")
    assert ("names" in way) == ("param_names" in built.ours.state_dict()["param_groups"][0])


def test_c07_empty_list(ours):
    with pytest.raises(ValueError, match=r"^optimizer got an empty parameter list$"):
        ours([])


def test_c09_step_is_a_plain_method(rule, ours):
    optimizer, another = ours(parameters()), ours(parameters())
    assert inspect.isfunction(rule.ours.step)
    assert optimizer.step.__func__ is another.step.__func__ is rule.ours.step
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    optimizer.step()
    assert calls == [1], "torch wraps the class's step once, however many instances"


def test_c09_schedulers_see_the_step(ours):
    """They replace `optimizer.step`, and warn when it was not called before theirs."""
    optimizer = ours(parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()


def test_c26_no_attribute_of_another_meaning(ours):
    optimizer = ours(parameters())
    optimizer.step()
    assert [a for a in ("train", "eval", "optimizer", "lr") if hasattr(optimizer, a)] == []


def test_c27_dynamic_subclass(rule, twin):
    """As Lightning wraps an optimizer: a class made at run time, another's __dict__ taken over."""
    assert type(rule.ours) is type
    assert not any("__slots__" in vars(c) for c in rule.ours.__mro__)
    built = twin().step()

    class Wrapper:
        def __init__(self, optimizer):
            self.__dict__ = {k: v for k, v in vars(optimizer).items() if k != "step"}
            self.__class__ = type("Wrapped" + rule.name, (Wrapper, type(optimizer)), {})

    built.ours = Wrapper(built.ours)
    built.step(2).check()


def test_c27_subclass_with_its_own_step(rule, backend, twin):
    built = twin()
    seen = []

    def step(self, closure=None):
        seen.append("mine")
        return rule.ours.step(self, closure)

    mine = type("Mine", (rule.ours,), {"step": step})
    built.ours = mine(built.params, backend=backend, **rule.options)
    built.step(2).check()
    assert seen == ["mine", "mine"]


def test_c31_backend_is_visible(backend, ours):
    optimizer = ours(parameters())
    for _ in range(2):
        assert optimizer.backend == backend
        assert backend in repr(optimizer)
        optimizer.step()


def test_c31_auto_takes_the_fast_path(rule):
    optimizer = rule.ours(parameters())
    assert optimizer.backend == BACKENDS[0]
    assert BACKENDS[0] in repr(optimizer)


@each(["SGD", "Lion"])
def test_c31_no_silent_fall_back(rule, backend):
    """A dtype that the backend asked for cannot step is an error that says so."""
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64)
    for dtype in dtypes:
        (p,) = params = parameters(((4, 3),), dtype)
        p.grad = torch.ones_like(p)
        optimizer = rule.ours(params, backend=backend, **rule.options)
        try:
            optimizer.step()
        except RuntimeError as refused:
            assert f"backend={backend!r}" in str(refused)  # noqa: PT017
        else:
            assert optimizer.backend == backend


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs Triton")
def test_c31_triton_without_a_gpu(rule, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(Exception, match=r"(?is)triton.*(numba|eager|auto)"):
        train(rule.ours(parameters(), backend="triton"))
