"""Factors of a gradient's rows, multiplied where the step reads it: no pass over memory of their own."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Protocol
from weakref import ref

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Planner(Protocol):
    """What has to lay its step out anew where factors come, go or move."""

    def _drop_plans(self) -> None: ...


class RowFactors:
    """Those of one parameter.

    Args:
        values: [rows], in the type of the arithmetic; read at every step.
        optimizer: whose step multiplies them; nobody, once it is gone.

    Attributes:
        used: whether a gradient that they belong to waits for the step.
    """

    def __init__(self, values: Tensor, optimizer: Planner) -> None:
        self.values = values
        self.optimizer = ref(optimizer)
        self.used = False

    def take(self, values: Tensor) -> None:
        """Takes over new ones; in other memory where the parameter has moved or changed its type."""
        if (values.device, values.dtype) == (self.values.device, self.values.dtype):
            self.values.copy_(values)
            return
        self.values = values.clone()
        if optimizer := self.optimizer():
            optimizer._drop_plans()


_FOUND: MutableMapping[Tensor, RowFactors] = WeakTensorKeyDictionary()


def row_factors_of(param: Tensor) -> RowFactors | None:
    """Those of a parameter, if it has such and the optimizer that multiplies them lives."""
    found = _FOUND.get(param)
    return found if found and found.optimizer() is not None else None


def factors_of(params: Sequence[Tensor], optimizer: object, name: str) -> list[Tensor | None]:
    """The factors of the rows of their gradients, to be multiplied in a step of this optimizer.

    Raises:
        RuntimeError: another optimizer multiplies them.
    """
    if not _FOUND:  # most programs have none, and need not ask for each
        return [None] * len(params)
    found = [row_factors_of(param) for param in params]
    if any(factors and factors.optimizer() is not optimizer for factors in found):
        raise RuntimeError(
            f"{name}: a gradient's rows have factors that another optimizer multiplies; "
            "fusedcalib.nn.scale_in_step(model, optimizer) says which one"
        )
    return [factors.values if factors else None for factors in found]


def set_row_factors(param: Tensor, factors: RowFactors | None) -> None:
    """Gives a parameter its factors, or takes them away."""
    before = row_factors_of(param)
    _FOUND.pop(param, None)
    if factors:
        _FOUND[param] = factors
    for given in (before, factors):
        if given and (optimizer := given.optimizer()):
            optimizer._drop_plans()
