"""Every optimizer by its name: for configuration files and command lines."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from . import rules
from .optimizer import FusedOptimizer, ParamsT

__all__ = ["create", "optimizers"]


def optimizers() -> dict[str, type[FusedOptimizer]]:
    """Every optimizer class under its name, in alphabetical order.

    >>> import fusedcalib
    >>> fusedcalib.optimizers()["AdamW"] is fusedcalib.AdamW
    True
    """
    modules = [import_module(f"{rules.__name__}.{found.name}") for found in iter_modules(rules.__path__)]
    classes = {
        name: thing
        for module in modules
        for name, thing in vars(module).items()
        if isinstance(thing, type) and issubclass(thing, FusedOptimizer)
        if thing.__module__ == module.__name__ and not name.startswith("_")
    }
    return dict(sorted(classes.items()))


def options_of(cls: type[FusedOptimizer]) -> dict[str, Any]:
    """The options that a class takes besides the parameters, with their defaults."""
    signature = inspect.signature(cls).parameters
    return {name: option.default for name, option in signature.items() if name != "params"}


def create(name: str, params: ParamsT, **options: Any) -> FusedOptimizer:
    """An optimizer by the name of its class.

    Args:
        name: the class, in upper or lower case: one of `optimizers()`.
        params: parameters, named parameters or param groups, as torch.optim takes them.
        **options: arguments of the class by keyword. Those not given keep the defaults of the class.

    Raises:
        ValueError: there is no optimizer of that name.
        TypeError: the optimizer has no such option.

    >>> import torch, fusedcalib
    >>> model = torch.nn.Linear(4, 2)
    >>> type(fusedcalib.create("adamw", model.parameters(), lr=1e-3, centralize=True)).__name__
    'AdamW'
    """
    classes = optimizers()
    lower = {known.lower(): known for known in classes}
    if name.lower() not in lower:
        known = ", ".join(classes)
        raise ValueError(f"no optimizer {name!r}{_nearest(name.lower(), lower)}; there are {known}")
    cls = classes[lower[name.lower()]]
    taken = options_of(cls)
    for option in options:
        if option not in taken:
            nearest = _nearest(option, {known: known for known in taken})
            raise TypeError(f"{cls.__name__} has no option {option!r}{nearest}; it has {', '.join(taken)}")
    return cls(params, **options)


def _nearest(wrong: str, known: dict[str, str]) -> str:
    found = get_close_matches(wrong, known, n=1)
    return f" (did you mean {known[found[0]]!r}?)" if found else ""
