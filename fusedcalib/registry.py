"""Every optimizer by its name: for configuration files, command lines and other frameworks."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from . import rules
from .optimizer import FusedOptimizer, ParamsT

__all__ = ["create", "optimizers", "register_timm"]


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
        name: the class, in upper or lower case: one of `optimizers()`; "8bit" after it, as in "adamw8bit",
            has `state_dtype="8bit"` for its default.
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
    wanted = name.lower()
    if wanted not in lower and wanted.removesuffix("8bit") in lower:
        wanted = wanted.removesuffix("8bit")
        options = {"state_dtype": "8bit", **options}
    if wanted not in lower:
        known = ", ".join(classes)
        raise ValueError(f"no optimizer {name!r}{_nearest(wanted, lower)}; there are {known}")
    cls = classes[lower[wanted]]
    taken = options_of(cls)
    for option in options:
        if option not in taken:
            nearest = _nearest(option, {known: known for known in taken})
            raise TypeError(f"{cls.__name__} has no option {option!r}{nearest}; it has {', '.join(taken)}")
    return cls(params, **options)


def _nearest(wrong: str, known: dict[str, str]) -> str:
    found = get_close_matches(wrong, known, n=1)
    return f" (did you mean {known[found[0]]!r}?)" if found else ""


def register_timm(prefix: str = "fused-") -> list[str]:
    """Registers every optimizer with timm, for its `create_optimizer_v2` and the `--opt` of its scripts.

    A name is the prefix and the class in lower case. What timm changes in the defaults of its own optimizer
    of that name (for "sgd": Nesterov momentum) it changes here too, so that "fused-sgd" trains as "sgd" does.
    Calling it again changes nothing.

    Args:
        prefix: what the names begin with; without "_", as timm takes for the name of an optimizer what
            follows the last "_": "fused_adamw" would be timm's own "adamw". Default "fused-".

    Returns:
        The names, as "fused-adamw".

    Raises:
        ImportError: timm is missing or older than 1.0.12.
        ValueError: the prefix has an underscore, or makes a name that timm has for something else.

    >>> import fusedcalib
    >>> fusedcalib.register_timm()[:2]  # doctest: +SKIP
    ['fused-adopt', 'fused-ademamix']
    """
    if "_" in prefix:
        raise ValueError(
            f"prefix {prefix!r}: timm takes what follows the last '_' for the name of an optimizer, so "
            f"'{prefix}adamw' would silently be its own 'adamw'; use {prefix.replace('_', '-')!r}"
        )
    try:
        from timm.optim._optim_factory import OptimInfo, default_registry
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("timm"):  # timm is there, what it needs is not
            raise
        raise ImportError("register_timm needs timm 1.0.12 or newer: pip install 'timm>=1.0.12'") from error
    known = {name: default_registry.get_optimizer_info(name) for name in default_registry.list_optimizers()}
    infos = []
    for name, cls in optimizers().items():
        own = known.get(name.lower())
        info = OptimInfo((prefix + name).lower(), cls, **_described(cls, own and own.defaults))
        if known.get(info.name, info).opt_class is not cls:
            raise ValueError(f"prefix {prefix!r}: timm has another {info.name!r}; use another prefix")
        infos.append(info)
    for info in infos:
        if info.name not in known:
            default_registry.register(info)
    return [info.name for info in infos]


def _described(cls: type[FusedOptimizer], changed: dict[str, Any] | None) -> dict[str, Any]:
    """What timm wants to know of an optimizer: which of the options that it may be given to hand on."""
    options = options_of(cls)
    return {
        "description": f"fusedcalib.{cls.__name__}: the whole step in one pass over memory",
        "has_eps": "eps" in options,
        "has_momentum": "momentum" in options,
        "has_betas": "betas" in options,
        "num_betas": len(options.get("betas", (0, 0))),
        "defaults": {key: value for key, value in (changed or {}).items() if key in options},
    }
