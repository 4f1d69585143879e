"""Parameters that are spread over ranks (DTensor), seen from the one that steps its own part of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor


def is_spread(t: Tensor) -> bool:
    """Whether a tensor is a DTensor. Asked at every step, so no import and no dispatch."""
    return hasattr(t, "_local_tensor")


def local_of(t: Tensor) -> Tensor:
    """What of a tensor lies here. Nothing is copied, and no DTensor is made or dispatched."""
    return getattr(t, "_local_tensor", t)


def like(param: Tensor, local: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """A local tensor as the part of one that is spread as the parameter is; of another shape, if given."""
    if not is_spread(param):
        return local
    from torch.distributed.tensor import DTensor

    spec: Any = param
    stride = param.stride()
    if shape is not None:
        stride = tuple(prod(shape[d + 1 :]) for d in range(len(shape)))
    if local.device.type != spec.device_mesh.device_type:  # from_local would move it there
        return _part(local, spec.device_mesh, spec.placements, tuple(shape or param.shape), stride)
    return DTensor.from_local(
        local,
        spec.device_mesh,
        spec.placements,
        run_check=False,
        shape=torch.Size(shape or param.shape),
        stride=stride,
    )


def of_rows(param: Tensor, local: Tensor, leading: int) -> Tensor:
    """Numbers for the rows here of a parameter as what they are for the whole: copies where ranks share rows.

    `leading`: dimensions that a row is an index of; of none, for a vector that is one row, there is one.
    """
    if not is_spread(param):
        return local
    from torch.distributed.tensor import DTensor, Replicate

    spread: Any = param
    shape = tuple(param.shape[:leading]) or (1,)
    kept = [p if getattr(p, "dim", leading) < leading else Replicate() for p in spread.placements]
    stride = tuple(prod(shape[d + 1 :]) for d in range(len(shape)))
    if local.device.type != spec_device(spread):
        return _part(local, spread.device_mesh, kept, shape, stride)
    return DTensor.from_local(
        local, spread.device_mesh, kept, run_check=False, shape=torch.Size(shape), stride=stride
    )


def spec_device(spread: Any) -> str:
    """The kind of device that a DTensor's mesh is of."""
    kind: str = spread.device_mesh.device_type
    return kind


def _part(
    local: Tensor, mesh: Any, placements: Any, shape: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    """A DTensor whose part here stays where it is, as FSDP2 makes those that it offloads."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    spec = DTensorSpec(mesh, placements, TensorMeta(torch.Size(shape), stride, local.dtype))
    made: Tensor = DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return made


def with_local(t: Tensor, local: Tensor) -> Tensor:
    """A tensor with another local part, which lies anywhere, spread as it is."""
    if not is_spread(t):
        return local
    spread: Any = t
    return _part(local, spread.device_mesh, spread.placements, tuple(t.shape), t.stride())


def beside(param: Tensor, t: Tensor) -> Tensor:
    """What of a tensor lies here, on the device of what of the parameter does: a copy if it is offloaded."""
    return local_of(t).to(local_of(param).device)


def redistribute_gradient(param: Tensor) -> bool:
    """Lays the gradient of a DTensor out as the parameter is, by a collective; whether it was otherwise."""
    grad: Any = param.grad
    spread: Any = param
    if not (is_spread(param) and is_spread(grad)) or grad.placements == spread.placements:
        return False
    param.grad = grad.redistribute(spread.device_mesh, spread.placements)
    return True


class Place(NamedTuple):
    """Where in a parameter the part of it lies that is here.

    Attributes:
        first: index of its first element in the whole parameter, row by row.
        pitch: elements of a row of the whole parameter.
        in_order: whether a row of it is one stretch of a row of the parameter, and the next a pitch on.
        mesh: the ranks that share the parameter; None where it is not spread.
        copies: how many of them have this same part.
        across: dimensions of the mesh over which its rows are split.
        parted: those over which it is split at all.
    """

    first: int
    pitch: int
    in_order: bool = True
    mesh: Any = None
    copies: int = 1
    across: tuple[int, ...] = ()
    parted: tuple[int, ...] = ()


def place_of(param: Tensor, leading: int = 1) -> Place:
    """The place of a parameter's local part.

    Args:
        param: the parameter.
        leading: dimensions that a row is an index of.

    Raises:
        RuntimeError: its placements leave sums to be made, or put its elements where nobody knows.
    """
    shape = tuple(param.shape)
    pitch = prod(shape[leading:])
    if not is_spread(param):
        return Place(0, pitch)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spread: Any = param
    mesh, placements = spread.device_mesh, spread.placements
    if any(placement.is_partial() for placement in placements):
        raise RuntimeError(f"a parameter with placements {placements} is a sum yet to be made")
    own, offset = compute_local_shape_and_global_offset(param.shape, mesh, placements)
    here = tuple(local_of(param).shape)
    if tuple(own) != here:
        raise RuntimeError(f"a parameter with placements {placements} has {here} here instead of {own}")
    # Not by what lies here: every rank has to come to the same.
    split = {i: getattr(p, "dim", 0) for i, p in enumerate(placements) if mesh.size(i) > 1}
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    return Place(
        first=sum(o * s for o, s in zip(offset, strides, strict=True)),
        pitch=pitch,
        in_order=all(own[d] == shape[d] or prod(own[leading:d]) == 1 for d in range(leading, len(shape)))
        and not any(0 < dim < leading for dim in split.values()),
        mesh=mesh,
        copies=copies_of(param),
        across=tuple(i for i, dim in split.items() if dim >= leading),
        parted=tuple(i for i in split if not placements[i].is_replicate()),
    )


def copies_of(t: Tensor) -> int:
    """How many ranks of its mesh have the part of a tensor that lies here; 1 where it is not spread."""
    if not is_spread(t):
        return 1
    spread: Any = t
    mesh, placements = spread.device_mesh, spread.placements
    return prod(mesh.size(i) for i, placement in enumerate(placements) if placement.is_replicate())


def summed(
    total: Tensor, mesh: Any, dimensions: Iterable[int] | None = None, *, largest: bool = False
) -> Tensor:
    """Added up over dimensions of a mesh (default all), in place: one collective for each of them.

    With `largest` it is the largest value instead.
    """
    operation = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
    for dimension in range(mesh.ndim) if dimensions is None else dimensions:
        torch.distributed.all_reduce(total, op=operation, group=mesh.get_group(dimension))
    return total
