"""The methods that are compared: ours, torch.optim, and what else a user might take.

Each row of `METHODS` makes an optimizer on given parameters. Another library is used if it can be
imported and is never required: what is missing is None in the results, with the reason.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .shapes import ParamList
from .timing import Step

HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


@dataclass(frozen=True)
class Subject:
    """What is compared: an optimizer class by name, and its options."""

    cls: str
    options: dict[str, Any]

    def states(self) -> int:
        """State tensors of a parameter, which make the bytes that a step must move."""
        import fusedcalib

        optimizer = getattr(fusedcalib, self.cls)([torch.zeros(1)], **self.options)
        return len(optimizer.rule.states[optimizer.rule.variant(optimizer.param_groups[0])])


_DECAY = {"lr": 1e-3, "weight_decay": 1e-2}
SUBJECTS: dict[str, Subject] = {
    "AdamW": Subject("AdamW", HYPER),
    "AdamW amsgrad": Subject("AdamW", {**HYPER, "amsgrad": True}),
    "Adam": Subject("Adam", HYPER),
    "NAdam": Subject("NAdam", HYPER),
    "RAdam": Subject("RAdam", HYPER),
    "Adamax": Subject("Adamax", HYPER),
    "Adan": Subject("Adan", _DECAY),
    "ADOPT": Subject("ADOPT", _DECAY),
    "Adagrad": Subject("Adagrad", {**_DECAY, "initial_accumulator_value": 0.1}),
    "Adadelta": Subject("Adadelta", {**_DECAY, "lr": 1.0}),
    "RMSprop": Subject("RMSprop", _DECAY),
    "RMSprop centered momentum": Subject("RMSprop", {**_DECAY, "centered": True, "momentum": 0.9}),
    "SGD": Subject("SGD", _DECAY),
    "SGD momentum": Subject("SGD", {**_DECAY, "momentum": 0.9}),
    "SGDW momentum": Subject("SGDW", {**_DECAY, "momentum": 0.9}),
    "Lion": Subject("Lion", _DECAY),
    "Signum": Subject("Signum", _DECAY),
}
ADAMW = SUBJECTS["AdamW"]


class NotAvailableError(Exception):
    """The method cannot run here; the message says why, for the results."""


@dataclass(frozen=True)
class Built:
    """A method at work on its own copy of a list."""

    step: Step
    optimizer: torch.optim.Optimizer | None = None  # None for a plain function
    note: str = ""


Maker = Callable[..., Built]  # of a list, its parameters and what is compared (AdamW)


@dataclass(frozen=True)
class Method:
    """One way to take a step; `gc` when it centralizes the gradient."""

    name: str
    title: str
    gc: bool
    make: Maker


def groups_of(spec: ParamList, params: list[Tensor]) -> list[Any]:
    return [{"params": [param]} for param in params] if spec.group_each else list(params)


def _of_torch(subject: Subject, flags: dict[str, Any]) -> Callable[..., torch.optim.Optimizer]:
    cls: type[torch.optim.Optimizer] | None = getattr(torch.optim, subject.cls, None)
    if cls is None:
        raise NotAvailableError(f"torch.optim has no {subject.cls}")
    for flag in flags:
        if flag not in inspect.signature(cls).parameters:
            raise NotAvailableError(f"torch.optim.{subject.cls} has no {flag} form")
    return cls


def _torch(**flags: Any) -> Maker:
    def make(spec: ParamList, params: list[Tensor], subject: Subject = ADAMW) -> Built:
        optimizer = _of_torch(subject, flags)(groups_of(spec, params), **subject.options, **flags)
        return Built(optimizer.step, optimizer)

    return make


@torch.no_grad()
def centralize_(params: list[Tensor]) -> None:
    """Gradient centralization as users write it: the row mean is taken off in place."""
    for param in params:
        grad = param.grad
        if grad is not None and grad.ndim > 1:
            grad.sub_(grad.mean(dim=tuple(range(1, grad.ndim)), keepdim=True))


def _eager_gc(**flags: Any) -> Maker:
    def make(spec: ParamList, params: list[Tensor], subject: Subject = ADAMW) -> Built:
        optimizer = _of_torch(subject, flags)(groups_of(spec, params), **subject.options, **flags)

        def step() -> None:
            centralize_(params)
            optimizer.step()

        return Built(step, optimizer)

    return make


def _own(**flags: Any) -> Maker:
    def make(spec: ParamList, params: list[Tensor], subject: Subject = ADAMW) -> Built:
        import fusedcalib

        cls = getattr(fusedcalib, subject.cls)
        optimizer = cls(groups_of(spec, params), **subject.options, **flags)
        return Built(optimizer.step, optimizer, note=f"backend {optimizer.backend}")

    return make


def _compiled(spec: ParamList, params: list[Tensor], subject: Subject = ADAMW) -> Built:
    """torch.compile of a hand-written in-place step: the whole list, or else tensor by tensor."""
    if not params[0].is_cuda:
        raise NotAvailableError("torch.compile is measured on a GPU only")
    from .compiled import build

    step, note = build(params, subject.options)
    return Built(step, note=note)


def _rival(module: str, name: str, **options: Any) -> Maker:
    def make(spec: ParamList, params: list[Tensor], subject: Subject = ADAMW) -> Built:
        try:
            library = importlib.import_module(module)
        except ImportError as error:
            raise NotAvailableError(f"{error.name or module} is not installed") from error
        optimizer = getattr(library, name)(groups_of(spec, params), **subject.options, **options)
        version = getattr(importlib.import_module(module.partition(".")[0]), "__version__", "?")
        return Built(optimizer.step, optimizer, note=f"{module} {version}")

    return make


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("torch_fused", "torch fused", False, _torch(fused=True)),
        Method("torch_foreach", "torch foreach", False, _torch(foreach=True)),
        Method("torch_forloop", "torch for-loop", False, _torch(foreach=False, fused=False)),
        Method("eager_gc_fused", "eager GC + torch fused", True, _eager_gc(fused=True)),
        Method("eager_gc_foreach", "eager GC + torch foreach", True, _eager_gc(foreach=True)),
        Method("compiled_gc", "torch.compile GC", True, _compiled),
        Method("own_plain", "fusedcalib", False, _own()),
        Method("own_gc", "fusedcalib with GC", True, _own(centralize=True)),
        Method(
            "own_gc_eager",
            "fusedcalib with GC, no numba",
            True,
            _own(centralize=True, backend="eager"),
        ),
        Method("apex", "apex FusedAdam", False, _rival("apex.optimizers", "FusedAdam")),
        Method("bitsandbytes", "bitsandbytes AdamW", False, _rival("bitsandbytes.optim", "AdamW")),
        Method("optimi", "optimi AdamW", False, _rival("optimi", "AdamW")),
        Method("flashoptim", "FlashAdamW", False, _rival("flashoptim", "FlashAdamW")),
        Method("pytorch_optimizer", "pytorch_optimizer", False, _rival("pytorch_optimizer", "AdamW")),
    )
}

CORE = ("torch_fused", "torch_foreach", "torch_forloop", "eager_gc_fused", "own_plain", "own_gc")
RIVALS = ("apex", "bitsandbytes", "optimi", "flashoptim", "pytorch_optimizer")
