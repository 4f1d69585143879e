"""The methods that are compared: ours, torch.optim, and what else a user might take.

Each row of `METHODS` makes an optimizer on given parameters. Another library is used if it can be
imported and is never required: what is missing is None in the results, with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..models.shapes import ParamList
from . import compiled, rivals
from .method import (
    ADAMW,
    EXTRAS,
    GAMMA,
    GC,
    NONE,
    Built,
    Extras,
    Maker,
    Method,
    NotAvailableError,
    Subject,
    groups_of,
)


def _class_of(subject: Subject, flags: dict[str, Any]) -> Callable[..., torch.optim.Optimizer]:
    cls: type[torch.optim.Optimizer] | None = getattr(torch.optim, subject.cls, None)
    if cls is None:
        raise NotAvailableError(f"torch.optim has no {subject.cls}")
    for flag, value in flags.items():
        if value and flag not in inspect.signature(cls).parameters:
            raise NotAvailableError(f"torch.optim.{subject.cls} has no {flag} form")
    for option in subject.options:
        if option not in inspect.signature(cls).parameters:
            raise NotAvailableError(f"torch.optim.{subject.cls} has no option {option!r}")
    return cls


def of_torch(**flags: Any) -> Maker:
    def make(spec: ParamList, params: list[Tensor], subject: Subject = ADAMW) -> Built:
        cls = _class_of(subject, flags)
        asked = {flag: value for flag, value in flags.items() if flag in inspect.signature(cls).parameters}
        optimizer = cls(groups_of(spec, params), **subject.options, **asked)
        return Built(optimizer.step, optimizer)

    return make


@torch.no_grad()
def centralize_(params: list[Tensor]) -> None:
    """Gradient centralization as users write it: the row mean is taken off in place."""
    for param in params:
        grad = param.grad
        if grad is not None and grad.ndim > 1:
            grad.sub_(grad.mean(dim=tuple(range(1, grad.ndim)), keepdim=True))


def composed(extras: Extras, inner: Maker | None = None) -> Maker:
    """What users put around a step (torch's fused): clip, noise, centring, and the average after it."""

    def make(spec: ParamList, params: list[Tensor], subject: Subject = ADAMW) -> Built:
        decay = subject.coupled_decay() if extras.gc else 0.0
        if decay:  # is part of what is centred, and so added before
            subject = replace(subject, options={**subject.options, "weight_decay": 0.0})
        around = (inner or of_torch(fused=True))(spec, params, subject)
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
            if decay:
                torch._foreach_add_([p.grad for p in params if p.grad is not None], params, alpha=decay)
            if extras.gc:
                centralize_(params)
            around.step()
            if extras.ema is not None:
                torch._foreach_lerp_(averages, params, 1 - extras.ema)
            taken += 1

        return Built(
            step,
            around.optimizer,
            note=around.note,
            averages=(lambda: averages) if averages else None,
            set_noise=set_noise if extras.noise is not None else None,
            # Centring alone is done again without effect.
            spoils=extras.clip is not None or extras.noise is not None or decay > 0,
        )

    return make


def options_of(extras: Extras) -> dict[str, Any]:
    """The options of our optimizers that do the same."""
    import fusedcalib

    noise = None if extras.noise is None else fusedcalib.GradientNoise(extras.noise, GAMMA)
    return {"max_grad_norm": extras.clip, "noise": noise, "ema_decay": extras.ema, "centralize": extras.gc}


def own(extras: Extras = NONE, **flags: Any) -> Maker:
    """Our step, with the same as options of it."""

    def make(spec: ParamList, params: list[Tensor], subject: Subject = ADAMW) -> Built:
        import fusedcalib

        options = {**subject.options, **subject.own, **options_of(extras), **flags}
        optimizer = getattr(fusedcalib, subject.cls)(groups_of(spec, params), **options)

        def set_noise(variance: float) -> None:
            for group in optimizer.param_groups:
                group["noise"] = {**group["noise"], "eta": variance}

        averaged, noisy = extras.ema is not None, extras.noise is not None
        return Built(
            optimizer.step,
            optimizer,
            note=f"backend {optimizer.backend}",
            averages=(lambda: [optimizer.state[p]["ema"] for p in params]) if averaged else None,
            set_noise=set_noise if noisy else None,
        )

    return make


def _pair(key: str, by_hand: str, ours: str) -> tuple[Method, Method]:
    """A step with these extras: composed of what there is, and as ours."""
    extras = EXTRAS[key]
    return (
        Method(f"eager_{key}", f"{by_hand} + torch fused", composed(extras), extras, reference=True),
        Method(f"own_{key}", f"fusedcalib with {ours}", own(extras), extras),
    )


def _compiled(spec: ParamList, params: list[Tensor], subject: Subject = ADAMW) -> Built:
    """torch.compile of a hand-written in-place step: the whole list, or else tensor by tensor."""
    if not params[0].is_cuda:
        raise NotAvailableError("torch.compile is measured on a GPU only")

    step, note = compiled.build(params, subject.options)
    return Built(step, note=note)


def compiled_step(spec: ParamList, params: list[Tensor], subject: Subject = ADAMW) -> Built:
    """torch.compile of torch.optim's own step."""
    if len(params) > compiled.WHOLE_LIST:
        raise NotAvailableError(f"torch.compile of a step takes minutes above {compiled.WHOLE_LIST} tensors")
    optimizer = _class_of(subject, {})(groups_of(spec, params), **subject.options)
    # Each optimizer compiles the same code anew; beyond the limit it would run uncompiled without a word.
    torch._dynamo.config.recompile_limit = 1000
    return Built(torch.compile(optimizer.step), optimizer)


_FOREACH = of_torch(foreach=True)
METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("torch_fused", "torch fused", of_torch(fused=True), reference=True),
        Method("torch_foreach", "torch foreach", _FOREACH, reference=True),
        Method("torch_forloop", "torch for-loop", of_torch(foreach=False, fused=False)),
        Method("torch_compiled", "torch.compile", compiled_step, narrow=True),
        Method("eager_gc_fused", "eager GC + torch fused", composed(GC), GC, reference=True),
        Method("eager_gc_foreach", "eager GC + torch foreach", composed(GC, _FOREACH), GC),
        Method("compiled_gc", "torch.compile GC", _compiled, GC, reference=True),
        Method("own_plain", "fusedcalib", own(), reference=True),
        Method("own_gc", "fusedcalib with GC", own(GC), GC),
        Method("own_offload", "fusedcalib, states offloaded", own(offload="states")),
        Method("own_gc_eager", "fusedcalib with GC, no numba", own(GC, backend="eager"), GC),
        *_pair("noise", "add_(randn_like)", "noise"),
        *_pair("clip", "clip_grad_norm_", "clip"),
        *_pair("ema", "foreach lerp", "EMA"),
        *_pair("chain", "clip, noise, eager GC, EMA", "clip, noise, GC, EMA"),
        *(Method(name, of.title, of.make, narrow=of.narrow) for name, of in rivals.RIVALS.items()),
    )
}

CORE = ("torch_fused", "torch_foreach", "torch_forloop", "eager_gc_fused", "own_plain", "own_gc")
RIVALS = tuple(rivals.RIVALS)
