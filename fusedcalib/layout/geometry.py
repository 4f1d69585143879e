"""How the tensors of one slot lie in memory together: rows and columns, and strides where they disagree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """Geometry of a slot.

    `sizes == ()` means dense: all tensors share one storage order, element (row, column) is at
    `row * columns + column`. Otherwise a column is an index over the inner dimensions `sizes`, and
    `strides[0]` holds the row stride of each tensor, `strides[1 + d]` their strides along `sizes[d]`.
    """

    rows: int
    columns: int
    sizes: tuple[int, ...] = ()
    strides: tuple[tuple[int, ...], ...] = ()


def geometry_of(tensors: Sequence[Tensor], by_rows: bool) -> Geometry:
    """The layout of tensors of one shape, paired by index. Rows (dim 0) matter only where `by_rows`."""
    first = tensors[0]
    count = first.numel()
    rows = first.shape[0] if by_rows else 1
    if all(t.is_contiguous() for t in tensors):
        return Geometry(rows, count // rows)
    strides = first.stride()
    if all(t.stride() == strides for t in tensors) and is_dense(first):
        outermost = rows == 1 or strides[0] * rows == count
        if outermost:  # also channels_last: its rows are contiguous, only permuted inside
            return Geometry(rows, count // rows)
    shape = tuple(first.shape) if first.ndim > 1 else (1, count)
    by_dim = list(zip(*(t.stride() for t in tensors), strict=True))
    if first.ndim == 1:
        by_dim = [(0,) * len(tensors), *by_dim]
    sizes, inner = _coalesced(shape[1:], by_dim[1:])
    return Geometry(shape[0], math.prod(sizes), sizes, (by_dim[0], *inner))


def _coalesced(
    sizes: tuple[int, ...], strides: list[tuple[int, ...]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Merges neighbouring dimensions that every tensor walks with one stride; drops those of size 1."""
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == tuple(s * size for s in stride):
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if not merged:
        merged = [(1, strides[0])]
    return tuple(size for size, _ in merged), [stride for _, stride in merged]


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps or overlap, in some order."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def overlaps_itself(t: Tensor) -> bool:
    """Whether two indices share memory (an expanded tensor): such a parameter cannot be stepped."""
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride <= reach:
            return _shares_an_offset(t)
        reach += stride * (size - 1)
    return False


def _shares_an_offset(t: Tensor) -> bool:
    offsets = torch.zeros((), dtype=torch.int64)
    for stride, size in zip(t.stride(), t.shape, strict=True):
        offsets = offsets[..., None] + stride * torch.arange(size)
    return int(torch.unique(offsets).numel()) < t.numel()
