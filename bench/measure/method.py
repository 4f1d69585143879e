"""What is compared, and what a method of the comparison is; the methods themselves stand in baselines.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models.shapes import ParamList
from ..models.traffic import Storage
from .timing import Step

HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


@dataclass(frozen=True)
class Subject:
    """What is compared: an optimizer class by name, and its options."""

    cls: str
    options: dict[str, Any]  # of the rule, which every method takes that can be compared
    own: dict[str, Any] = field(default_factory=dict)  # of our class alone: they change roundings at most
    title: str = ""  # what tables call it

    def states(self) -> int:
        """State tensors of a parameter, which make the bytes that a step must move."""
        import fusedcalib

        optimizer = getattr(fusedcalib, self.cls)([torch.zeros(1)], **self.options)
        return len(optimizer.rule.states[optimizer.rule.variant(optimizer.param_groups[0])])

    def looked(self) -> tuple[str, ...]:
        """What a step looks at before it, for norms of whole tensors."""
        import fusedcalib

        trust = getattr(fusedcalib, self.cls).rule.trust
        return trust.reads if trust else ()

    def rule_options(self) -> dict[str, Any]:
        """All options of the rule with their values: another library's defaults may be others."""
        return reference_options(self.cls) | self.options

    def coupled_decay(self) -> float:
        """The weight decay that is added to the gradient."""
        options = self.rule_options()
        return float(options["weight_decay"]) if options.get("decoupled_weight_decay") is False else 0.0


def reference_options(cls: str) -> dict[str, Any]:
    """What the reference of a class can be told of its rule, with the defaults of our class."""
    from fusedcalib.options import EXTRAS, WHOLE
    from fusedcalib.reference import ORACLES
    from fusedcalib.registry import optimizers, options_of

    whole = [option.name for option in WHOLE]
    aside = {*EXTRAS, *whole, "foreach", "fused", "capturable", "differentiable"} - {"l1", "max_row_norm"}
    known = inspect.signature(ORACLES[cls]).parameters.values()
    around = {p.name: p.default for p in known if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    found = around | options_of(optimizers()[cls])
    return {name: default for name, default in found.items() if name not in aside}


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
    "AdEMAMix": Subject("AdEMAMix", _DECAY),
    "AdaBelief": Subject("AdaBelief", _DECAY),
    "LaProp": Subject("LaProp", _DECAY),
    "LAMB": Subject("LAMB", _DECAY),
    "LARS": Subject("LARS", {"lr": 1.0, "weight_decay": 1e-2, "momentum": 0.9}),
    "StableAdamW": Subject("StableAdamW", _DECAY),
    "AdamMini": Subject("AdamMini", _DECAY),
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
class Extras:
    """What a step does around its rule."""

    clip: float | None = None  # largest norm of all gradients
    noise: float | None = None  # variance of the gradient's noise at the first step
    ema: float | None = None  # decay of the average of the parameter
    gc: bool = False  # whether it centralizes the gradient

    @property
    def values(self) -> dict[str, Any]:
        """What is on, by the names that users have for it, in the order of the step."""
        named = {"clip": self.clip, "noise": self.noise, "centralize": self.gc or None, "ema": self.ema}
        return {name: value for name, value in named.items() if value is not None}

    def width(self, storage: Storage, states: int, looked: Sequence[str] = ()) -> float:
        """Bytes that a step with them must move for each parameter."""
        return storage.moved(states, self.clip is not None, self.ema is not None, looked)


NONE, GC = Extras(), Extras(gc=True)
EXTRAS = {
    "noise": Extras(noise=0.01),
    "clip": Extras(clip=1.0),
    "ema": Extras(ema=0.999),
    "chain": Extras(1.0, 0.01, 0.999, gc=True),
}
GAMMA = 0.55  # how fast the noise falls


@dataclass(frozen=True)
class Built:
    """A method at work on its own copy of a list."""

    step: Step
    optimizer: torch.optim.Optimizer | None = None  # None for a plain function
    note: str = ""
    averages: Callable[[], list[Tensor]] | None = None  # of the parameters, where the method keeps them
    set_noise: Callable[[float], None] | None = None  # sets the variance, where there is noise
    spoils: bool = False  # whether a step changes gradients, so that the next must be given new ones
    fresh: Step | None = None  # gives them
    params: list[Tensor] = field(default_factory=list)  # its copy of the list


Maker = Callable[..., Built]  # of a list, its parameters and what is compared (AdamW)


@dataclass(frozen=True)
class Method:
    """One way to take a step."""

    name: str
    title: str
    make: Maker
    extras: Extras = NONE  # what it does besides the rule
    reference: bool = False  # whether the times of others are written as ratios to this one's
    like: Maker | None = None  # makes the same extras around torch's step, which are judged in its place
    narrow: bool = False  # whether it makes the numbers of a step, as bias corrections, in fp32
    kept: Storage | None = None  # how it keeps things, if not as the case says
    form: str = ""  # of gate.FORMATS, where it has states in bytes that are not ours

    @property
    def own(self) -> bool:
        return self.name.startswith("own")

    def storage(self, asked: Storage) -> Storage:
        """How it keeps things where that is asked for: what only ours can do others leave."""
        return self.kept or (asked if self.own or not asked.packed else asked.plain)


def groups_of(spec: ParamList, params: list[Tensor]) -> list[Any]:
    return [{"params": [param]} for param in params] if spec.group_each else list(params)
