"""Clipping of gradients by their norm, for any optimizer and however parameters are spread over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .layout.shards import is_spread, local_of, redistribute_gradient
from .limits import AdaGC, Limit
from .members import REST, grouped, named, named_once
from .norms import Joins, Part, joins_of, norms_of, part_of

Limits = float | Tensor | Limit
EPS = 1e-6  # as torch.nn.utils has it


@overload
def clip_grad_norm_(
    parameters: Any,
    max_norm: Limits,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    groups: None = None,
    process_groups: Any = None,
) -> Tensor: ...


@overload
def clip_grad_norm_(
    parameters: Any,
    max_norm: Mapping[str, Limits] | Limits,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    groups: Mapping[str, Any],
    process_groups: Any = None,
) -> dict[str, Tensor]: ...


@torch.no_grad()
def clip_grad_norm_(
    parameters: Any,
    max_norm: Limits | Mapping[str, Limits],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    groups: Mapping[str, Any] | None = None,
    process_groups: Any = None,
) -> Tensor | dict[str, Tensor]:
    r"""Clips gradients by their norm, in place, as `torch.nn.utils.clip_grad_norm_`, over any sharding.

    .. math::
        g \leftarrow g \cdot \min\Bigl(1, \frac{c}{\lVert g \rVert_p + 10^{-6}}\Bigr), \qquad
        \lVert g \rVert_p = \Bigl(\sum_i \lvert g_i \rvert^p\Bigr)^{1/p}

    The sum is over the elements of all gradients, each counted once. It is made in fp64, so that gradients of
    fp32 and less cannot overflow it. A DTensor is added up over its own mesh and divided by its copies;
    a plain tensor is taken to be the same on all ranks, unless `process_groups` says otherwise.

    Args:
        parameters: parameters, (name, parameter) pairs, a module, one optimizer or several. A parameter that
            is given twice counts once. Under sharding every rank must give the same parameters in the same
            order; gradients may be missing on some.
        max_norm: the limit c: a number, a 0-dim tensor, or `EMAClip`, `ZClip`, `AdaGC`; with `groups` also
            a dict of such, by name.
        norm_type: p > 0, or `math.inf`. Default 2.
        error_if_nonfinite: raises, before anything is changed, where the norm is not finite; the host waits
            for that. Default False: an infinite norm turns finite gradients to 0 and infinite ones to NaN,
            a NaN turns all to NaN, as in torch.
        foreach: False scales one tensor at a time. Default: all at once.
        groups: parameters by name; each group is clipped by its own norm. Those of `parameters` that are in
            none are the group "other".
        process_groups: a process group or mesh, or a list, over whose ranks all parameters differ (pipeline
            stages); pairs (parameters, group) for plain tensors that differ over ranks (experts).

    Returns:
        The norm before clipping, a 0-dim fp64 tensor on the gradients' device; a dict of them with `groups`.

    Raises:
        TypeError: something that holds no parameters.
        ValueError: limits, orders or groups that make no sense.
        RuntimeError: sparse gradients; a norm that is not finite, if `error_if_nonfinite`.

    >>> import torch, fusedcalib
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> fusedcalib.clip_grad_norm_([weight], max_norm=1.0).item()
    5.0
    >>> weight.grad
    tensor([0.6000, 0.8000])
    """
    p = _order(norm_type)
    joins = joins_of(process_groups)
    names, owned = grouped(parameters, groups)
    limits = _limits(max_norm, names, groups is not None)
    if any(isinstance(limit, AdaGC) for limit in limits) and p != 2:
        raise ValueError("AdaGC is of 2-norms; leave norm_type at 2")
    parts, sums = [], []
    for which, owners in enumerate(owned):
        for name, owner in owners:
            parts.append(part_of(name, owner, _gradient(owner, name), joins))
            sums.append(which)
    parts, sums = _once(parts, sums)
    norms = norms_of(parts, sums, len(names), p, joins)
    if error_if_nonfinite:
        _check_finite(norms, parts, p, joins)
    for which, limit in enumerate(limits):
        mine = [part for part, i in zip(parts, sums, strict=True) if i == which]
        if isinstance(limit, AdaGC):
            each = norms_of(mine, range(len(mine)), len(mine), p, joins, whole=False)
            _scale_each(mine, limit.factors(norms[which], each))
        else:
            _scale(mine, _factor(limit, norms[which]), foreach)
    found = dict(zip(names, norms.unbind(), strict=True))
    return found if groups is not None else found[REST]


@torch.no_grad()
def get_total_norm(
    tensors: Any,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_groups: Any = None,
) -> Tensor:
    r"""The norm of tensors, as `torch.nn.utils.get_total_norm`, over any sharding: :math:`\lVert g \rVert_p`.

    Args:
        tensors: one tensor or several, of any shapes, dtypes and devices: gradients, or parameters.
        norm_type: p > 0, or `math.inf`. Default 2.
        error_if_nonfinite: raises where the norm is not finite; the host waits for that. Default False.
        foreach: has no effect, and is there as in torch.
        process_groups: as of `clip_grad_norm_`; pairs name the tensors given.

    Returns:
        The norm, a 0-dim fp64 tensor on the tensors' device; 0 of no tensors.

    Raises:
        RuntimeError: sparse tensors, sums yet to be made; a norm that is not finite, if `error_if_nonfinite`.

    >>> import torch, fusedcalib
    >>> fusedcalib.get_total_norm([torch.tensor([3.0]), torch.tensor(4.0)]).item()
    5.0
    """
    del foreach
    p, joins = _order(norm_type), joins_of(process_groups)
    parts = [part_of(name or f"tensor {i}", t, t, joins) for i, (name, t) in enumerate(named(tensors))]
    parts, sums = _once(parts, [0] * len(parts))
    norms = norms_of(parts, sums, 1, p, joins)
    if error_if_nonfinite:
        _check_finite(norms, parts, p, joins)
    return norms[0]


@torch.no_grad()
def nonfinite_gradients(parameters: Any, *, process_groups: Any = None) -> list[str]:
    """The names of parameters whose gradient has an element that is infinite or NaN, on any rank.

    The host waits for the answer, so ask when a step was left out or a norm is not finite. Of spread
    parameters all ranks must ask together, and get the same answer.

    Args:
        parameters: as of `clip_grad_norm_`. One without a name is called "parameter" and its index.
        process_groups: as of `clip_grad_norm_`. Stages of a pipeline answer for themselves.

    >>> import torch, fusedcalib
    >>> model = torch.nn.Linear(2, 1)
    >>> model(torch.tensor([[1.0, float("inf")]])).sum().backward()
    >>> fusedcalib.nonfinite_gradients(model.named_parameters())
    ['weight']
    """
    joins = joins_of(process_groups)
    owners = named_once(parameters)
    parts = [part_of(name, owner, _gradient(owner, name), joins) for name, owner in owners]
    if not parts:
        return []
    largest = norms_of(parts, range(len(parts)), len(parts), math.inf, joins, whole=False)
    finite = largest.isfinite().tolist()
    return [part.name for part, fine in zip(parts, finite, strict=True) if not fine]


def _order(norm_type: float) -> float:
    p = float(norm_type)
    if not p > 0:
        raise ValueError(f"norm_type is {norm_type}; it has to be positive, or math.inf")
    return p


def _limits(max_norm: Any, names: Sequence[str], grouped: bool) -> list[Any]:
    """The limit of each group."""
    if isinstance(max_norm, Mapping):
        if not grouped or {*max_norm} != {*names}:
            raise ValueError(
                f"max_norm has limits for {sorted(max_norm)}, but the groups are {sorted(names)}"
            )
        limits = [max_norm[name] for name in names]
    else:
        limits = [max_norm] * len(names)
    adaptive = [id(limit) for limit in limits if isinstance(limit, Limit)]
    if len({*adaptive}) < len(adaptive):
        name = type(next(limit for limit in limits if isinstance(limit, Limit))).__name__
        raise ValueError(f"one {name} cannot follow several norms; give a dict with one for each group")
    for limit in limits:
        if not isinstance(limit, Limit | Tensor) and not float(limit) >= 0:
            raise ValueError(f"max_norm is {limit}; it has to be at least 0")
    return limits


def _gradient(owner: Tensor, name: str) -> Tensor | None:
    """The gradient, laid out as the parameter is where it is a sum over ranks yet to be made."""
    grad: Any = owner.grad
    if grad is not None and is_spread(grad) and any(p.is_partial() for p in grad.placements):
        redistribute_gradient(owner)
    return owner.grad


def _once(parts: list[Part], sums: list[int]) -> tuple[list[Part], list[int]]:
    """Without tensors that stand there again: two parameters may share a gradient."""
    seen: set[int] = set()
    kept = []
    for i, part in enumerate(parts):
        if part.values is None or id(local_of(part.spread)) not in seen:
            kept.append(i)
            if part.values is not None:
                seen.add(id(local_of(part.spread)))
    return [parts[i] for i in kept], [sums[i] for i in kept]


def _check_finite(norms: Tensor, parts: Sequence[Part], p: float, joins: Joins) -> None:
    if bool(norms.isfinite().all()):
        return
    largest = norms_of(parts, range(len(parts)), len(parts), math.inf, joins, whole=False)
    bad = [part.name for part, ok in zip(parts, largest.isfinite().tolist(), strict=True) if not ok]
    where = f"of {', '.join(bad[:5])}{' and others' if len(bad) > 5 else ''}" if bad else "on other ranks"
    raise RuntimeError(
        f"the total norm of order {p} is not finite: see the gradients {where}. Nothing was changed; to "
        "scale them all the same, set error_if_nonfinite=False"
    )


def _factor(limit: Any, norm: Tensor) -> Tensor:
    if isinstance(limit, Limit):
        limit = limit.limit(norm)
    elif isinstance(limit, Tensor):
        limit = limit.to(device=norm.device, dtype=norm.dtype)
    return torch.clamp(limit / (norm + EPS), max=1.0)


def _lists(parts: Iterable[Part]) -> dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]]:
    """Gradients by device and dtype, as a launch takes them."""
    found: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for i, part in enumerate(parts):
        if part.values is not None and part.values.numel():
            found.setdefault((part.values.device, part.values.dtype), []).append((i, part.values))
    return found


def _narrow(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A factor as gradients take it: in fp32, if they have no more."""
    doubles = (torch.float64, torch.complex128)
    return lambda t: t.to(torch.float64 if dtype in doubles else torch.float32)


def _scale(parts: Sequence[Part], factor: Tensor, foreach: bool | None) -> None:
    """Multiplies gradients by one factor, unless a CPU sees that it is 1."""
    if factor.device.type == "cpu" and not torch.compiler.is_compiling() and float(factor) == 1:
        return
    for (device, dtype), tensors in _lists(parts).items():
        own = _narrow(dtype)(factor.to(device, non_blocking=True))
        if foreach is False:
            for _, t in tensors:
                t.mul_(own)
        else:
            torch._foreach_mul_([t for _, t in tensors], own)


def _scale_each(parts: Sequence[Part], factors: Tensor) -> None:
    for (device, dtype), tensors in _lists(parts).items():
        own = _narrow(dtype)(factors.to(device, non_blocking=True)).unbind()
        torch._foreach_mul_([t for _, t in tensors], [own[i] for i, _ in tensors])
