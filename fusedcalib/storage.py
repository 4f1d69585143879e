"""How parameters and states may be kept, as options name it; see kernels/storage.py for the forms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATE_DTYPES: dict[torch.dtype | str | None, torch.dtype | None] = {
    None: None,
    "parameter": None,
    **{dtype: dtype for dtype in _DTYPES},
    **{str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES},
}
# Other forms of states, see kernels/storage.py.
FORMS = ("8bit", "bfloat16_stochastic")
VERSION_KEY, VERSION = "storage_version", 1  # of what bytes in a checkpoint mean: codes, scales, remainders
MASTERS: dict[Any, str] = {
    None: "none",
    "none": "none",
    False: "none",
    True: "split16",
    32: "split16",
    24: "split8",
    **{name: name for name in ("split16", "split8", "float32")},
}
FORMATS = (
    ", ".join(map(str, (*_DTYPES, *map(repr, FORMS)))) + ", None or a dict of those by the states' names"
)


def format_name(dtype: Any) -> Any:
    """A form as param groups have it: its name, or a dict of such."""
    if isinstance(dtype, dict):
        return {name: "parameter" if form is None else format_name(form) for name, form in dtype.items()}
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def state_format(asked: Any, name: str) -> str:
    """How a state of a name is kept where a group asks so: a dtype's name, "parameter" or one of FORMS."""
    if isinstance(asked, Mapping):
        asked = asked.get(name)
    found: str = format_name("parameter" if asked is None else asked)
    return found


def state_formats(asked: Any) -> tuple[Any, ...]:
    """All forms that a group asks for, as it says them."""
    return tuple(asked.values()) if isinstance(asked, Mapping) else (asked,)


def is_format(value: Any) -> bool:
    """Whether states can be kept so."""
    if isinstance(value, Mapping):
        return all(map(is_format, value.values()))
    return value in FORMS or (not isinstance(value, bool) and value in STATE_DTYPES)


def is_master(value: Any) -> bool:
    """Whether parameters can be kept so."""
    return (
        isinstance(value, (bool, int, str))
        and value in MASTERS
        and (value not in (0, 1) or type(value) is bool)
    )


def check_storage(cls: type[Any], group: Mapping[str, Any]) -> None:
    """Raises ValueError where parameters and states cannot be kept so."""
    asked, rule, name = group["state_dtype"], cls.rule, cls.__name__
    known = list(dict.fromkeys(state for states in rule.states.values() for state in states))
    unknown = [state for state in asked if state not in known] if isinstance(asked, Mapping) else []
    if unknown:
        raise ValueError(
            f"Invalid state_dtype: {name} has no state {unknown[0]!r}, but {', '.join(known) or 'none'}"
        )
    states = rule.states[rule.variant(group)]
    if rule.wide.intersection(states) and any(state_format(asked, state) == "8bit" for state in states):
        at_random = ' or "bfloat16_stochastic"' if rule.wide <= rule.nonnegative else ""
        raise ValueError(
            f"Invalid state_dtype: {name} cannot keep {', '.join(states)} in bytes, which are too coarse for "
            f"them; use state_dtype=torch.float32{at_random}"
        )
    if MASTERS[group["master_weights"]] in ("split16", "float32") and group["stochastic_rounding"]:
        raise ValueError(
            f"Invalid stochastic_rounding: {name} rounds nothing with master_weights="
            f'{group["master_weights"]!r}; set it to False, or use master_weights="split8"'
        )


def keeps_bytes(group: Mapping[str, Any]) -> bool:
    """Whether a param group has states or master weights kept in another form than a dtype."""
    forms = state_formats(group.get("state_dtype"))
    return MASTERS[group.get("master_weights")] != "none" or any(form in FORMS for form in forms)


def check_version(name: str, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises ValueError where a checkpoint's groups keep bytes in a form that is not known here."""
    found = {group.get(VERSION_KEY, VERSION) for group in groups} - {VERSION}
    if found:
        raise ValueError(
            f"{name}: the checkpoint has {VERSION_KEY}={next(iter(found))!r}, of which this fusedcalib "
            f"knows {VERSION} only; load it with the version that has saved it, or a later one"
        )
