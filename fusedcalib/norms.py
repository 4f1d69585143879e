"""Norms of many tensors at once, each element counted once however the tensors are spread over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout.shards import copies_of, is_spread, local_of, summed
from .members import named

AT_ONCE = 1 << 15  # elements of a CPU's tensor that are widened at a time, within the L2 cache


class Part(NamedTuple):
    """One tensor whose norm is asked for.

    Attributes:
        name: by which errors call it.
        owner: the parameter, or the tensor itself.
        spread: what says how it lies over ranks: the gradient, or the parameter where there is none.
        values: what of it lies here; None where a parameter has no gradient.
        joins: which of the process groups named by users hold different parts of it.
    """

    name: str
    owner: Tensor
    spread: Tensor
    values: Tensor | None
    joins: tuple[int, ...] = ()

    @property
    def mesh(self) -> Any:
        return self.spread.device_mesh if is_spread(self.spread) else None  # type: ignore[attr-defined]


class Joins(NamedTuple):
    """Process groups, or meshes, over which sums go on.

    Attributes:
        everywhere: those of all parameters, as pipeline stages.
        owners: the `id` of each parameter of a pair.
        groups: the process group of each pair.
    """

    everywhere: tuple[Any, ...] = ()
    owners: tuple[frozenset[int], ...] = ()
    groups: tuple[Any, ...] = ()


def joins_of(process_groups: Any) -> Joins:
    """Takes `process_groups` of `clip_grad_norm_` apart."""
    if process_groups is None:
        return Joins()
    if not isinstance(process_groups, list | tuple):
        process_groups = [process_groups]
    elif len(process_groups) == 2 and not _is_group(process_groups[0]) and _is_group(process_groups[1]):
        process_groups = [process_groups]  # one pair
    everywhere, owners, groups = [], [], []
    for item in process_groups:
        if _is_group(item):
            everywhere.append(item)
        elif isinstance(item, tuple) and len(item) == 2 and _is_group(item[1]):
            owners.append(frozenset(id(p) for _, p in named(item[0])))
            groups.append(item[1])
        else:
            raise TypeError(
                f"process_groups has {item!r}; give process groups or meshes (over whose ranks all "
                "parameters differ, as pipeline stages) or pairs (parameters, group), as experts"
            )
    return Joins(tuple(everywhere), tuple(owners), tuple(groups))


def _is_group(item: Any) -> bool:
    return hasattr(item, "mesh_dim_names") or isinstance(item, torch.distributed.ProcessGroup)


def part_of(name: str, owner: Tensor, value: Tensor | None, joins: Joins) -> Part:
    """A tensor as it is measured.

    Raises:
        RuntimeError: it is sparse, or a sum over ranks yet to be made.
    """
    spread = owner if value is None else value
    if is_spread(spread) and any(p.is_partial() for p in spread.placements):  # type: ignore[attr-defined]
        raise RuntimeError(
            f"{name} has placements {spread.placements}: a sum yet to be made has no norm; "  # type: ignore[attr-defined]
            "call redistribute() on it first"
        )
    values = None if value is None else local_of(value).detach()
    if values is not None and values.layout != torch.strided:
        raise RuntimeError(f"{name} is {values.layout}; only dense gradients can be clipped: call to_dense()")
    where = tuple(i for i, owners in enumerate(joins.owners) if id(owner) in owners)
    return Part(name, owner, spread, values, where)


def norms_of(
    parts: Sequence[Part], sums: Sequence[int], count: int, p: float, joins: Joins, whole: bool = True
) -> Tensor:
    """The norms of groups of tensors, over all ranks: fp64 [count].

    The number of collectives is that of different meshes (of each dimension) and groups, never of tensors.
    All ranks take part also where they have no gradient, since it is the parameters that say over what.

    Args:
        parts: the tensors.
        sums: the group of each.
        count: how many there are.
        p: the order of the norm; `math.inf` for the largest magnitude.
        joins: process groups that users have named.
        whole: whether to go on over those of all parameters.
    """
    device = _device_of(parts)
    local = _powers(parts, p)
    cells: dict[tuple[Any, tuple[int, ...]], dict[int, list[Tensor]]] = {}
    for i in range(len(joins.groups)):  # also where none of these parameters is here
        cells[None, (i,)] = {}
    for part, which, power in zip(parts, sums, local, strict=True):
        cell = cells.setdefault((part.mesh, part.joins), {})
        if power is not None:
            copies = 1 if p == math.inf else copies_of(part.spread)
            cell.setdefault(which, []).append(power if copies == 1 else power / copies)
    total: Tensor | None = None
    for (mesh, where), cell in cells.items():
        there = device if mesh is None else torch.device(mesh.device_type)
        vector = _vector(cell, count, there, p)
        for group in (() if mesh is None else (mesh,), *([joins.groups[i]] for i in where)):
            vector = _over(vector, group, p)
        vector = vector.to(device)
        total = vector if total is None else _combined([total, vector], p)
    if total is None:
        total = _vector({}, count, device, p)
    if whole:
        total = _over(total, joins.everywhere, p)
    return total if p == math.inf else total.sqrt() if p == 2 else total.pow(1 / p)


def _device_of(parts: Sequence[Part]) -> torch.device:
    """Where the norm is to be: on the first GPU that has a part, else on the CPU."""
    found = [local_of(part.owner if part.values is None else part.values).device for part in parts]
    return next((d for d in found if d.type != "cpu"), torch.device("cpu"))


def wide(device: torch.device) -> torch.dtype:
    """fp64 wherever there is such."""
    return torch.float32 if device.type == "mps" else torch.float64


def _powers(parts: Sequence[Part], p: float) -> list[Tensor | None]:
    """The sum of powers of the magnitudes of each tensor, or the largest of them, of what lies here."""
    found: list[Tensor | None] = [None] * len(parts)
    by_device: dict[torch.device, list[int]] = {}
    for i, part in enumerate(parts):
        if part.values is not None and part.values.numel():
            by_device.setdefault(part.values.device, []).append(i)
    for device, places in by_device.items():
        tensors = [_real(parts[i].values, p) for i in places]
        if device.type == "cpu":
            room = torch.empty(min(AT_ONCE, max(t.numel() for t in tensors)), dtype=torch.float64)
            powers = [_power(t, p, room) for t in tensors]
        else:
            norms = torch.stack(torch._foreach_norm(tensors, p, dtype=wide(device)))
            powers = list((norms if p == math.inf else norms.pow(p)).unbind())
        for i, power in zip(places, powers, strict=True):
            found[i] = power
    return found


def _real(t: Any, p: float) -> Tensor:
    """Complex numbers as pairs where that has the same norm, else as magnitudes."""
    if not t.is_complex():
        return t  # type: ignore[no-any-return]
    return torch.view_as_real(t.resolve_conj()) if p == 2 else t.abs()


def _power(t: Tensor, p: float, room: Tensor) -> Tensor:
    """Of one tensor on a CPU, widened piece by piece into `room`."""
    flat = t.view(-1) if t.is_contiguous() else t.reshape(-1)
    powers = []
    for piece in torch.split(flat, AT_ONCE):
        values = room[: len(piece)].copy_(piece)
        if p == 2:
            powers.append(torch.dot(values, values))
        elif p == math.inf:
            powers.append(values.abs().amax())
        else:
            powers.append(values.abs().pow(p).sum())
    return powers[0] if len(powers) == 1 else _combined(powers, p)


def _combined(powers: Sequence[Tensor], p: float) -> Tensor:
    stacked = torch.stack(tuple(powers))
    return stacked.amax(dim=0) if p == math.inf else stacked.sum(dim=0)


def _vector(cell: dict[int, list[Tensor]], count: int, device: torch.device, p: float) -> Tensor:
    """The sums of some tensors, 0 where there are none."""
    zero = torch.zeros((), dtype=wide(device), device=device)
    return torch.stack(
        [
            zero if i not in cell else _combined([t.to(device) for t in cell[i]], p).to(zero.dtype)
            for i in range(count)
        ]
    )


def _over(vector: Tensor, groups: Iterable[Any], p: float) -> Tensor:
    """Goes on over process groups and meshes. A NaN is told apart: the largest of several may not be it."""
    for group in groups:
        packed = vector
        if p == math.inf:
            nan = vector.isnan()
            packed = torch.cat([vector.masked_fill(nan, math.inf), nan.to(vector.dtype)])
        packed = packed.to(_device_for(group, vector.device))
        if hasattr(group, "mesh_dim_names"):
            summed(packed, group, largest=p == math.inf)
        else:
            operation = torch.distributed.ReduceOp.MAX if p == math.inf else torch.distributed.ReduceOp.SUM
            torch.distributed.all_reduce(packed, op=operation, group=group)
        vector = packed.to(vector.device)
        if p == math.inf:
            vector = vector[: len(nan)].masked_fill(vector[len(nan) :] > 0, math.nan)
    return vector


def _device_for(group: Any, device: torch.device) -> torch.device:
    """Where a group can add up: where the numbers are, if it can."""
    if hasattr(group, "mesh_dim_names"):
        return device if device.type == group.device_type else torch.device(group.device_type)
    able = torch.distributed.distributed_c10d._device_capability(group)
    return device if not able or device.type in able else torch.device(able[0])
