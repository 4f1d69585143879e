"""Numbers that are known, or recorded: what a rule computes its scalars with.

Called with Python numbers the functions here compute. Called with `Recorded` ones, whose values only a device
will know, they note what is to be computed there: see scalars.py. So a rule's `scalars` may use + - * / **,
comparisons and these functions, but no `if` on a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

Group = Mapping[str, Any]
Number = Any  # a float or a Recorded one


def sqrt(x: Number) -> Number:
    """Square root; NaN of a negative number."""
    if isinstance(x, Recorded):
        return Recorded("sqrt", (x,))
    return math.sqrt(x) if x >= 0 else math.nan


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


class Recorded:
    """A number that is not known yet: an operation and what it is applied to."""

    __hash__ = object.__hash__

    def __init__(self, name: str, operands: tuple[Any, ...]) -> None:
        self.name, self.operands = name, operands

    def __bool__(self) -> bool:
        raise TypeError("this number is known on the device only: say where(condition, x, y), not if")

    def __add__(self, other: Number) -> Recorded:
        return Recorded("add", (self, other))

    def __radd__(self, other: Number) -> Recorded:
        return Recorded("add", (other, self))

    def __sub__(self, other: Number) -> Recorded:
        return Recorded("subtract", (self, other))

    def __rsub__(self, other: Number) -> Recorded:
        return Recorded("subtract", (other, self))

    def __mul__(self, other: Number) -> Recorded:
        return Recorded("multiply", (self, other))

    def __rmul__(self, other: Number) -> Recorded:
        return Recorded("multiply", (other, self))

    def __truediv__(self, other: Number) -> Recorded:
        return Recorded("divide", (self, other))

    def __rtruediv__(self, other: Number) -> Recorded:
        return Recorded("divide", (other, self))

    def __pow__(self, other: Number) -> Recorded:
        return Recorded("power", (self, other))

    def __rpow__(self, other: Number) -> Recorded:
        return Recorded("power", (other, self))

    def __neg__(self) -> Recorded:
        return Recorded("subtract", (0.0, self))

    def __eq__(self, other: object) -> Any:
        return Recorded("equal", (self, other))

    def __ne__(self, other: object) -> Any:
        return 1 - (self == other)

    def __gt__(self, other: Number) -> Recorded:
        return Recorded("greater", (self, other))

    def __lt__(self, other: Number) -> Recorded:
        return Recorded("greater", (other, self))

    def __ge__(self, other: Number) -> Recorded:
        return where(self == other, 1.0, self > other)  # type: ignore[no-any-return]

    def __le__(self, other: Number) -> Recorded:
        return where(self == other, 1.0, self < other)  # type: ignore[no-any-return]
