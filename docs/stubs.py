"""Makes the stubs beside the rules from the classes: their arguments, for type checkers and editors."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from textwrap import fill
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch

from fusedcalib.optimizer import FusedOptimizer
from fusedcalib.options import SHARED, Option

WIDTH = 110
HEAD = '''"""What type checkers and editors read of {module}.py. Made by docs/build.py; do not edit."""

from typing import Any, Literal

import torch
from torch import Tensor

from ..noise import GradientNoise, LangevinNoise, WeightNoise
from ..optimizer import FusedOptimizer, ParamsT
'''
OPTIONS = {option.name: option for option in SHARED}
# What has None for its default or may be it, of the arguments that a rule has of its own.
MAY_BE_NONE = dict.fromkeys(("clip_exponent", "alpha_warmup", "beta3_warmup"), "float | Tensor | None")
Entries = Callable[[type], Mapping[str, str]]


def written(type_: Any) -> str:
    """A type as an annotation has it, in any version of Python."""
    if get_origin(type_) in (Union, UnionType):
        return " | ".join(map(written, get_args(type_)))
    if get_origin(type_) is Literal:
        return f"Literal[{', '.join(quoted(value) for value in get_args(type_))}]"
    if get_origin(type_):
        return f"{get_origin(type_).__name__}[{', '.join(map(written, get_args(type_)))}]"
    if type_ is NoneType:
        return "None"
    return "torch.dtype" if type_ is torch.dtype else str(getattr(type_, "__name__", type_))


def quoted(value: Any) -> str:
    """A value as source code has it."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


def annotation(name: str, default: Any) -> str:
    """What an argument may be: every number also a tensor of no dimensions."""
    if name in OPTIONS:
        return written(OPTIONS[name].type)
    if name in MAY_BE_NONE:
        return MAY_BE_NONE[name]
    if isinstance(default, tuple):
        return f"tuple[{', '.join(annotation('', value) for value in default)}]"
    return "bool" if isinstance(default, bool) else "float | Tensor"


def short(option: Option) -> str:
    """The first sentence of what is said of an option, and its default."""
    return f"{option.doc.partition('. ')[0].rstrip('.')}. {option.text.removeprefix(option.doc).strip()}"


def constructor(cls: type[FusedOptimizer], said: Mapping[str, str]) -> Iterable[str]:
    """The lines of a class's `__init__`."""
    yield "    def __init__("
    yield "        self,"
    yield "        params: ParamsT,"
    arguments = [p for p in inspect.signature(cls).parameters.values() if p.name != "params"]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    for p in arguments:
        if p.kind is p.KEYWORD_ONLY and kind is not p.kind:
            yield "        *,"
        kind = p.kind
        yield f"        {p.name}: {annotation(p.name, p.default)} = {quoted(p.default)},"
    yield "    ) -> None:"
    summary = (cls.__doc__ or "").partition("\n")[0]
    yield fill(f'r"""{summary}', WIDTH, initial_indent=8 * " ", subsequent_indent=8 * " ")
    yield ""
    yield "        Args:"
    yield "            params: parameters, named parameters or param groups, as torch.optim takes them."
    for p in arguments:
        words = short(OPTIONS[p.name]) if p.name in OPTIONS else said[p.name]
        words = re.sub(r":math:(`[^`]*`)", r"\1", words)
        yield fill(f"{p.name}: {words}", WIDTH, initial_indent=12 * " ", subsequent_indent=16 * " ")
    yield '        """'


def stub(cls: type[FusedOptimizer], said: Mapping[str, str]) -> str:
    """One class."""
    bases = [
        f"torch.optim.{b.__name__}" if b.__module__.startswith("torch.") else b.__name__
        for b in cls.__bases__
    ]
    methods = [
        f"    def {name}{inspect.signature(thing, eval_str=True)}: ..."
        for name, thing in vars(cls).items()
        if getattr(thing, "__qualname__", "") == f"{cls.__name__}.{name}" and not name.startswith("_")
    ]
    return "\n".join([f"class {cls.__name__}({', '.join(bases)}):", *constructor(cls, said), *methods])


def files(classes: Iterable[type[FusedOptimizer]], entries: Entries) -> dict[Path, str]:
    """The stub of every file that has some of these classes.

    Args:
        classes: the optimizers.
        entries: what the documentation says of the arguments of a class.
    """
    modules: dict[str, list[type[FusedOptimizer]]] = {}
    for cls in classes:
        modules.setdefault(cls.__module__, []).append(cls)
    found = {}
    for module, own in modules.items():
        own.sort(key=lambda cls: len(cls.__mro__))  # a base first
        path = Path(sys.modules[module].__file__ or "")
        text = "\n".join([HEAD.format(module=path.stem), *(f"{stub(cls, entries(cls))}\n" for cls in own)])
        if "Options):" in text:
            text = text.replace("ParamsT\n", "ParamsT\nfrom ..options import Options\n", 1)
        found[path.with_suffix(".pyi")] = text
    return found
