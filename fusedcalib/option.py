"""What an option is: its default, what None stands for, its check, what documents say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Of a stack of any number of dimensions, of three; () where there is none: what `matrix_dims` may be.
LAST, OF_THREE = (-2, -1), (1, 2)
MATRIX_DIMS: tuple[Any, ...] = (  # from `fits` on
    lambda value: isinstance(value, (tuple, list)) and tuple(value) in ((), LAST, OF_THREE),
    "(-2, -1), or (1, 2) in a stack of three dimensions, or None; transpose parameters that lie otherwise",
    "",
    (),
    "a row is one index of dimension 0",
    tuple,
)


@dataclass(frozen=True)
class Option:
    """An argument by keyword that every optimizer takes.

    Attributes:
        name: the keyword of constructors, and the key in param groups.
        default: its value where nothing is said.
        type: its annotation.
        doc: what it does, for docstrings and documents, which state the default after it.
        fits: whether a value is one that it may have.
        expected: what it may have, as errors say it.
        called: what errors call it, where that is not its name and "value".
        none: what None stands for in param groups, which may be saved; None where None itself is kept.
        means: what None stands for, in words.
        stored: a value as param groups have it: a number, a string or a dict.
    """

    name: str
    default: Any
    type: Any
    doc: str
    fits: Callable[[Any], bool] = lambda value: True
    expected: str = ""
    called: str = ""
    none: Any = None
    means: str = ""
    stored: Callable[[Any], Any] = lambda value: value

    def check(self, value: Any) -> None:
        """Raises ValueError for a value that it cannot have."""
        if value is self.default or (value is None and self.none is not None):
            return
        if not self.fits(value):
            raise ValueError(
                f"Invalid {self.called or f'{self.name} value'}: {value!r}, expected {self.expected}"
            )

    @property
    def text(self) -> str:
        """What documents say of it."""
        value = f'"{self.default}"' if isinstance(self.default, str) else str(self.default).removesuffix(".0")
        return f"{self.doc} Default {value}{self.means and ': ' + self.means}."
