"""The optimizers in the registries of other frameworks."""

from __future__ import annotations

from typing import Any

from .factory import optimizers, options_of
from .optimizer import FusedOptimizer

__all__ = ["register_timm"]


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
    ['fused-adopt', 'fused-adadelta']
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
