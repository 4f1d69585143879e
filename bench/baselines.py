"""The methods that are compared: ours, torch.optim, and what else a user might take.

Each row of `METHODS` makes an optimizer on given parameters. Another library is used if it can be
imported and is never required: what is missing is None in the results, with the reason.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
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
class Extras:
    """What a step does around its rule, besides centring."""

    clip: float | None = None  # largest norm of all gradients
    noise: float | None = None  # variance of the gradient's noise at the first step
    ema: float | None = None  # decay of the average of the parameter

    def width(self, dtype: torch.dtype) -> int:
        """Bytes that a parameter moves for them: the gradient once more, an fp32 average both ways."""
        return dtype.itemsize * (self.clip is not None) + 8 * (self.ema is not None)


def step_bytes(param: int, grad: int, states: Iterable[int]) -> int:
    """Bytes that a step must move for one parameter, from the bytes of each value.

    Parameter and states are read and written, the gradient is read.
    """
    return 2 * param + grad + 2 * sum(states)


NONE = Extras()
EXTRAS = {
    "noise": Extras(noise=0.01),
    "clip": Extras(clip=1.0),
    "ema": Extras(ema=0.999),
    "chain": Extras(1.0, 0.01, 0.999),
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


Maker = Callable[..., Built]  # of a list, its parameters and what is compared (AdamW)


@dataclass(frozen=True)
class Method:
    """One way to take a step; `gc` when it centralizes the gradient."""

    name: str
    title: str
    gc: bool
    make: Maker
    extras: Extras = NONE

    @property
    def options(self) -> dict[str, Any]:
        return {"gc": self.gc, **asdict(self.extras)}


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


def _composed(extras: Extras, gc: bool) -> Maker:
    """What users put around torch's fused step: clip, noise, centring, and the average after it."""

    def make(spec: ParamList, params: list[Tensor], subject: Subject = ADAMW) -> Built:
        flags = {"fused": True}
        optimizer = _of_torch(subject, flags)(groups_of(spec, params), **subject.options, **flags)
        averages = [param.detach().float().clone() for param in params] if extras.ema is not None else []
        eta, taken = extras.noise, 0

        def set_noise(variance: float) -> None:
            nonlocal eta
            eta = variance

        @torch.no_grad()
        def step() -> None:
            nonlocal taken
            if extras.clip is not None:
                torch.nn.utils.clip_grad_norm_(params, extras.clip, foreach=True)
            if eta is not None:
                sigma = (eta / (1 + taken) ** GAMMA) ** 0.5
                for param in params:
                    assert param.grad is not None
                    param.grad.add_(torch.randn_like(param.grad), alpha=sigma)
            if gc:
                centralize_(params)
            optimizer.step()
            if extras.ema is not None:
                torch._foreach_lerp_(averages, params, 1 - extras.ema)
            taken += 1

        return Built(
            step,
            optimizer,
            averages=(lambda: averages) if averages else None,
            set_noise=set_noise if extras.noise is not None else None,
            spoils=extras.clip is not None or extras.noise is not None or gc,
        )

    return make


def options_of(extras: Extras, gc: bool) -> dict[str, Any]:
    """The options of our optimizers that do the same."""
    import fusedcalib

    noise = None if extras.noise is None else fusedcalib.GradientNoise(extras.noise, GAMMA)
    return {"max_grad_norm": extras.clip, "noise": noise, "ema_decay": extras.ema, "centralize": gc}


def _own_extras(extras: Extras, gc: bool) -> Maker:
    """The same as options of our step."""

    def make(spec: ParamList, params: list[Tensor], subject: Subject = ADAMW) -> Built:
        import fusedcalib

        cls = getattr(fusedcalib, subject.cls)
        optimizer = cls(groups_of(spec, params), **subject.options, **options_of(extras, gc))

        def set_noise(variance: float) -> None:
            for group in optimizer.param_groups:
                group["noise"] = {**group["noise"], "eta": variance}

        return Built(
            optimizer.step,
            optimizer,
            note=f"backend {optimizer.backend}",
            averages=(lambda: [optimizer.state[p]["ema"] for p in params])
            if extras.ema is not None
            else None,
            set_noise=set_noise if extras.noise is not None else None,
        )

    return make


def _pair(key: str, by_hand: str, ours: str, gc: bool = False) -> tuple[Method, Method]:
    """A step with these extras: composed of what there is, and as ours."""
    extras = EXTRAS[key]
    return (
        Method(f"eager_{key}", f"{by_hand} + torch fused", gc, _composed(extras, gc), extras),
        Method(f"own_{key}", f"fusedcalib with {ours}", gc, _own_extras(extras, gc), extras),
    )


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
        *_pair("noise", "add_(randn_like)", "noise"),
        *_pair("clip", "clip_grad_norm_", "clip"),
        *_pair("ema", "foreach lerp", "EMA"),
        *_pair("chain", "clip, noise, eager GC, EMA", "clip, noise, GC, EMA", gc=True),
        Method("apex", "apex FusedAdam", False, _rival("apex.optimizers", "FusedAdam")),
        Method("bitsandbytes", "bitsandbytes AdamW", False, _rival("bitsandbytes.optim", "AdamW")),
        Method("optimi", "optimi AdamW", False, _rival("optimi", "AdamW")),
        Method("flashoptim", "FlashAdamW", False, _rival("flashoptim", "FlashAdamW")),
        Method("pytorch_optimizer", "pytorch_optimizer", False, _rival("pytorch_optimizer", "AdamW")),
    )
}

CORE = ("torch_fused", "torch_foreach", "torch_forloop", "eager_gc_fused", "own_plain", "own_gc")
RIVALS = ("apex", "bitsandbytes", "optimi", "flashoptim", "pytorch_optimizer")
