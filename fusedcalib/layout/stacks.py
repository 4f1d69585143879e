"""Stacks of matrices, as the weights of experts are: which dimensions a row is an index of.

A row is one index of dimension 0. Of a stack, a parameter of three dimensions or more whose group says which
two are the matrix (`matrix_dims`), it is one index of all dimensions but the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

from torch import Tensor

FEWEST = 32  # rows and columns of what may be a stack: convolutions of one dimension have shorter kernels


def leading_dims(shape: Sequence[int], matrix_dims: Sequence[int] = ()) -> int:
    """How many dimensions a row of a parameter is an index of: 1, more of a stack."""
    return len(shape) - 1 if matrix_dims and len(shape) > 2 else 1


def matrix_shape(param: Tensor, group: Mapping[str, Any]) -> tuple[int, int, int]:
    """What a parameter is in its group, by its whole shape: how many matrices, their rows, their columns.

    What is no stack is one matrix, [1, rows, columns], of whose rows all inner dimensions are one.

    >>> import torch
    >>> experts = torch.zeros(8, 64, 32)
    >>> matrix_shape(experts, {"matrix_dims": (-2, -1)}), matrix_shape(experts, {"matrix_dims": ()})
    ((8, 64, 32), (1, 8, 2048))
    """
    shape = tuple(param.shape)
    if leading_dims(shape, group["matrix_dims"]) > 1:
        return prod(shape[:-2]), shape[-2], shape[-1]
    return 1, shape[0] if shape else 1, prod(shape[1:])


def may_be_stack(shape: Sequence[int]) -> bool:
    """Whether a shape is that of a stack rather than of a convolution.

    Three dimensions, of which the first is the smallest. Of a convolution of one dimension [out, in, kernel]
    the kernel is, or it has fewer than 32 elements.
    """
    return len(shape) == 3 and 2 <= shape[0] <= min(shape[1:]) and min(shape[1:]) >= FEWEST


def rows_first(t: Tensor, leading: int) -> Tensor:
    """A view of a tensor in which a row is one index of dimension 0.

    Raises:
        RuntimeError: its rows do not lie at one distance from each other.
    """
    return t if leading == 1 else t.view(prod(t.shape[:leading]), *t.shape[leading:])


def has_rows_first(t: Tensor, leading: int) -> bool:
    """Whether there is such a view: the leading dimensions are walked with one stride."""
    walked = zip(t.shape[:leading], t.stride(), strict=False)
    outer = [(size, stride) for size, stride in walked if size > 1]
    return not t.numel() or all(far == size * near for (_, far), (size, near) in pairwise(outer))
