"""Numbers that are known, or recorded: what a rule computes its scalars with.

Called with Python numbers the functions here compute. Called with `Recorded` ones, whose values only a device
will know, they note what is to be computed there, for layout/scalars.py. In its `scalars` a rule may use
these functions, + - * / ** and comparisons, but no `if` on a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

Group = Mapping[str, Any]
Number = Any  # a float or a Recorded one
Operator = Callable[[Any, Any], Any]


def sqrt(x: Number) -> Number:
    """Square root; NaN of a negative number."""
    if isinstance(x, Recorded):
        return Recorded("sqrt", (x,))
    return math.sqrt(x) if x >= 0 else math.nan


def log2(x: Number) -> Number:
    """Logarithm to base 2; minus infinity of 0, NaN of a negative number."""
    if isinstance(x, Recorded):
        return Recorded("log2", (x,))
    return math.log2(x) if x > 0 else (-math.inf if x == 0 else math.nan)


def where(condition: Number, x: Number, y: Number) -> Number:
    """x where the condition holds, else y. Both are computed."""
    if isinstance(condition, Recorded):
        return Recorded("where", (condition, x, y))
    return x if condition else y


def fp32(x: Number) -> Number:
    """Rounded to fp32."""
    return Recorded("fp32", (x,)) if isinstance(x, Recorded) else float(np.float32(x))


def number_of(value: Any) -> Any:
    """A hyperparameter as a Python number. Other things, of a user's own, stay."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def is_remote(value: Any) -> bool:
    """Whether a hyperparameter lies on a device, where the host would have to wait for it."""
    return isinstance(value, Tensor) and value.device.type != "cpu" and value.numel() == 1


def is_on(value: Any) -> bool:
    """Whether an option is neither None nor 0, as far as the host knows: on a device it may be anything."""
    return is_remote(value) or bool(value)


def _binary(name: str) -> tuple[Operator, Operator]:
    """An operator of recorded numbers, and the one with its operands exchanged."""
    return (
        lambda self, other: Recorded(name, (self, other)),
        lambda self, other: Recorded(name, (other, self)),
    )


class Recorded:
    """A number that is not known yet: an operation and what it is applied to."""

    __hash__ = object.__hash__

    def __init__(self, name: str, operands: tuple[Any, ...]) -> None:
        self.name, self.operands = name, operands

    def __bool__(self) -> bool:
        raise TypeError("this number is known on the device only: say where(condition, x, y), not if")

    __add__, __radd__ = _binary("add")
    __sub__, __rsub__ = _binary("subtract")
    __mul__, __rmul__ = _binary("multiply")
    __truediv__, __rtruediv__ = _binary("divide")
    __pow__, __rpow__ = _binary("power")
    __gt__, __lt__ = _binary("greater")

    def __neg__(self) -> Recorded:
        return Recorded("subtract", (0.0, self))

    def __eq__(self, other: object) -> Any:
        return Recorded("equal", (self, other))

    def __ne__(self, other: object) -> Any:
        return 1 - (self == other)

    def __ge__(self, other: Number) -> Any:
        return where(self == other, 1.0, self > other)

    def __le__(self, other: Number) -> Any:
        return where(self == other, 1.0, self < other)


def epsilons(group: Group) -> tuple[Number, Number]:
    """What is added under the root, and what to it: `eps` is one of them, the other exactly nothing."""
    inside, eps = group["eps_inside_sqrt"], group["eps"]
    return where(inside, eps, 0.0), where(inside, 0.0, eps)
