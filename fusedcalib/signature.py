"""What an optimizer class can be called with, as `inspect.signature` and configuration files ask for it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from textwrap import fill, indent
from types import FunctionType
from typing import Any, TypeVar, get_type_hints

from .options import EXTRAS, SHARED, WHOLE, Options

T = TypeVar("T")
KEYWORD = inspect.Parameter.KEYWORD_ONLY
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
ANNOTATIONS = {option.name: option.type for option in SHARED}
# The entries of all options in a docstring, and the entry that stands for them where one is written by hand.
ENTRIES = "\n".join(fill(f"{o.name}: {o.text}", 100, subsequent_indent=4 * " ") for o in SHARED)
PLACE = re.compile(r"^( *)\*\*options: .*$", re.MULTILINE)


def extras_of(cls: type, own: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a class that the constructor it has does not take: `fused` and `capturable` are for all."""
    bases = [base for base in cls.__mro__ if base is Options or _is_torch(base)]
    taken = {name for base in bases for name in inspect.signature(vars(base)["__init__"]).parameters}
    flags = {"fused": False, "capturable": False}
    return {**EXTRAS, **{k: v for k, v in flags.items() if k not in taken}, **own}


def _is_torch(cls: type) -> bool:
    return cls.__module__.startswith("torch.optim.")


def declare(cls: type, own: Mapping[str, Any]) -> None:
    """Gives a class and its constructor the signature of all that it can be called with.

    Args:
        cls: the class. Where it has no constructor it gets one, which hands on what it is given.
        own: options that its rule has and torch.optim's class has not, with their defaults.
    """
    whole = {option.name: option.default for option in WHOLE}
    signature = signature_of(cls, {**extras_of(cls, own), **whole})
    cls.__signature__ = signature  # type: ignore[attr-defined]
    init: Any = vars(cls).get("__init__")
    if init is None:
        init = cls.__init__ = _handing_on(cls)  # type: ignore[misc]
    elif not isinstance(init, FunctionType) or not _hands_on(init):
        return
    taken = list(signature.parameters.values())
    self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    init.__signature__ = signature.replace(parameters=[self, *taken])
    init.__annotations__ = {p.name: p.annotation for p in taken if p.annotation is not p.empty}
    init.__annotations__["return"] = None
    init.__doc__ = init.__doc__ or f"Args:\n{indent(ENTRIES, 4 * ' ')}"


def signature_of(cls: type, extras: Mapping[str, Any]) -> inspect.Signature:
    """What a class can be called with: its own arguments, those it hands on, and the extras."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is None or getattr(init, "made_here", False):
            continue
        for p in _parameters(init):
            if p.kind not in (*VARIADIC, p.POSITIONAL_ONLY):
                found.setdefault(p.name, p)
        if not _hands_on(init):
            if base is Options or _is_torch(base):
                for name, default in extras.items():
                    annotation = ANNOTATIONS.get(name, type(default))
                    extra = inspect.Parameter(name, KEYWORD, default=default, annotation=annotation)
                    found.setdefault(name, extra)
            break
    return inspect.Signature(sorted(found.values(), key=lambda p: p.kind), return_annotation=None)


def _parameters(init: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a constructor but `self`, with their annotations as types."""
    try:
        types = get_type_hints(init)
    except Exception:  # names that only a type checker knows
        types = {}
    taken = list(inspect.signature(init).parameters.values())[1:]
    return [p.replace(annotation=types.get(p.name, p.annotation)) for p in taken]


def _hands_on(init: Callable[..., Any]) -> bool:
    return any(p.kind in VARIADIC for p in inspect.signature(init).parameters.values())


def _handing_on(cls: Any) -> Any:
    """A constructor of a class that has none."""

    def __init__(self: Any, *args: Any, **options: Any) -> None:  # noqa: N807
        super(cls, self).__init__(*args, **options)

    __init__.made_here = True  # type: ignore[attr-defined]
    __init__.__module__, __init__.__qualname__ = cls.__module__, f"{cls.__qualname__}.__init__"
    return __init__


def documented(cls: type[T]) -> type[T]:
    """Writes every option into the docstring of a class, in the place of its entry `**options`."""
    if cls.__doc__:  # python -OO leaves none
        cls.__doc__ = PLACE.sub(lambda found: indent(ENTRIES, found[1]), cls.__doc__)
    return cls
