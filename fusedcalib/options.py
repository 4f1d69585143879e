"""The arguments of an optimizer class: what torch.optim's class of its name takes, and what is ours."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from .hostmath import is_remote
from .noise import as_dict

# Options of every param group that torch.optim does not know, with their defaults.
EXTRAS: dict[str, Any] = {
    "centralize": False,
    "centralize_min_ndim": 2,
    "l1": 0.0,
    "max_row_norm": None,  # in param groups infinity, for checkpoints hold numbers only
    "noise": None,  # in param groups a dict
    "seed": 0,
    "max_grad_norm": None,  # in param groups 0, as trainers have it
    "skip_nonfinite": False,
    "ema_decay": None,  # in param groups 0
    "stochastic_rounding": False,
    "state_dtype": None,  # in param groups "parameter" or the name of a dtype
}
# What None stands for in param groups, which may be saved: no limit, or off.
NONE_IS = {
    "max_row_norm": math.inf,
    "clip_exponent": math.inf,
    "max_grad_norm": 0.0,
    "ema_decay": 0.0,
    "state_dtype": "parameter",
}
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def extras_of(cls: type, own: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a class that the constructor it has does not take: `fused` and `capturable` are for all."""
    bases = [base for base in cls.__mro__ if base is Options or _is_torch(base)]
    taken = {name for base in bases for name in inspect.signature(vars(base)["__init__"]).parameters}
    flags = {"fused": False, "capturable": False}
    return {**EXTRAS, **{k: v for k, v in flags.items() if k not in taken}, **own}


def _is_torch(cls: type) -> bool:
    return cls.__module__.startswith("torch.optim.")


class Options(Optimizer):
    """In the place of torch.optim's class for optimizers that it does not have: checks and keeps options."""

    def __init__(
        self,
        params: Any,
        own: dict[str, Any],
        /,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        check_ranges(own, type(self))
        common = {
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, {**plain(own), **common})


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as param groups hold them: numbers, strings and dicts, so that they can be saved."""
    found: dict[str, Any] = {k: NONE_IS[k] if v is None and k in NONE_IS else v for k, v in options.items()}
    if "noise" in found:
        found["noise"] = as_dict(found["noise"])
    if isinstance(found.get("state_dtype"), torch.dtype):
        found["state_dtype"] = str(found["state_dtype"]).removeprefix("torch.")
    return found


_NAMES = {"lr": "learning rate"}  # as torch.optim's messages have them


def check_ranges(options: Mapping[str, Any], cls: type) -> None:
    """Raises ValueError for an option out of its range: averaging factors in [0, 1), others at least 0."""
    for key, value in options.items():
        if not is_remote(value):
            _check_range(key, value)
    signature: inspect.Signature = cls.__signature__  # type: ignore[attr-defined]
    betas = signature.parameters.get("betas")
    if betas and isinstance(betas.default, tuple) and len(options["betas"]) != len(betas.default):
        raise ValueError(f"Invalid betas: {options['betas']}, expected {len(betas.default)} numbers")


def _check_range(key: str, value: Any) -> None:
    name = _NAMES.get(key, key)
    if key == "momentum":
        if not 0 <= value < 1:
            raise ValueError(f"Invalid {name} value: {value}, expected a number in [0, 1)")
    elif key == "betas":
        for index, beta in enumerate(value):
            if not is_remote(beta) and not 0 <= beta < 1:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    elif key in ("lr", "eps", "weight_decay", "clip_exponent") and value is not None and not value >= 0:
        raise ValueError(f"Invalid {name}{'' if key == 'lr' else ' value'}: {value}")


def signature_of(cls: type, extras: dict[str, Any]) -> inspect.Signature:
    """What a class can be called with: its own arguments, those it hands on, and the extras."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for p in parameters:
            if p.kind not in (*_VARIADIC, p.POSITIONAL_ONLY):
                found.setdefault(p.name, p)
        handed_on = any(p.kind in _VARIADIC for p in parameters)
        if not handed_on and (base is Options or _is_torch(base)):
            keyword = inspect.Parameter.KEYWORD_ONLY
            for name, default in extras.items():
                found.setdefault(name, inspect.Parameter(name, keyword, default=default))
        if not handed_on:
            break
    return inspect.Signature(sorted(found.values(), key=lambda p: p.kind))
