"""How a parameter and its states are kept: what a param group asks for, what a tensor gets, its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.storage import BLOCK, CODED, COMPANIONS

MASTERS = ("none", *COMPANIONS)
HALF = (torch.bfloat16, torch.float16)
FEWEST_COLUMNS = 32  # of a row that is kept in bytes: shorter ones would have as much in scales
FLAT = 1 << 20  # elements of a vector that is kept in bytes: what FSDP1 and ZeRO make of many parameters
REMAINDER, MASTER = "param_remainder", "master_param"
BESIDE = {"split16": REMAINDER, "split8": REMAINDER, "float32": MASTER}


class Storage(NamedTuple):
    """How a parameter is kept, and each of the rule's own states; kinds of kernels/storage.py.

    Attributes:
        master: of the parameter: "none", or what it has beside it.
        states: kinds of the states, () if all are cast. As asked for, those in bytes may turn out to be cast.
        least: elements of a parameter, from which on states are kept in bytes.
    """

    master: str = "none"
    states: tuple[str, ...] = ()
    least: int = 0

    @property
    def dithered(self) -> bool:
        """Whether states are rounded at random."""
        return "stochastic" in self.states

    def of(self, param: Tensor, leading: int = 1) -> Storage:
        """How a parameter is kept where this is asked for: by the whole parameter, not what is here of it.

        `leading`: dimensions that a row is an index of.
        """
        master = self.master if param.dtype in HALF else "none"
        states = self.states
        if not in_bytes(param, self.least, leading):
            states = tuple("cast" if kind in CODED else kind for kind in states)
        return Storage(master, states if {*states} - {"cast"} else ())


CAST = Storage()


def in_bytes(param: Tensor, least: int, leading: int = 1) -> bool:
    """Whether states of a parameter are kept in bytes where that is asked for."""
    columns = prod(param.shape[leading:])
    if param.ndim >= 2:
        return columns >= FEWEST_COLUMNS and param.numel() >= least
    return param.ndim == 1 and not hasattr(param, "_local_tensor") and param.numel() >= max(FLAT, least)


def names_of(name: str, kind: str) -> tuple[str, ...]:
    """The keys in the state of what keeps a state."""
    return (f"{name}_codes", f"{name}_scales") if kind in CODED else (name,)


def scales_shape(shape: Sequence[int], leading: int = 1) -> tuple[int, ...]:
    """The shape of the scales of a tensor: the dimensions of its rows, and blocks of a row.

    A vector is one row. A stack keeps its dimensions, so that its scales are divided over ranks as it is.
    """
    rows, inner = (shape[:leading], shape[leading:]) if len(shape) > 1 else ((1,), shape)
    return *rows, -(-prod(inner) // BLOCK)


def leading_of(scales: Tensor) -> int:
    """How many dimensions the rows of a tensor are indices of, by its scales."""
    return scales.ndim - 1


def remainder_shape(shape: Sequence[int], master: str) -> tuple[int, ...]:
    """The shape of a remainder, in bytes: of those of an element the lower comes first."""
    return (*shape, 2) if master == "split16" else tuple(shape)


def remainder_view(t: Tensor, master: str) -> Tensor:
    """A remainder (uint8) as the signed integers that it keeps, in the parameter's shape."""
    return t.view(torch.int16).squeeze(-1) if master == "split16" else t.view(torch.int8)


def remainder_bytes(t: Tensor, master: str) -> Tensor:
    """Signed integers as a remainder (uint8) keeps them: what `remainder_view` undoes."""
    return (t.unsqueeze(-1) if master == "split16" else t).view(torch.uint8)
