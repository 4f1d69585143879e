"""The state tensors of parameters: made in the dtypes that are asked for, laid out as the parameter is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layout.recipe import Recipe
from ..layout.shards import like, local_of
from ..options import STATE_DTYPES

if TYPE_CHECKING:
    from ..layout.buckets import Slot

# Of a parameter's average; else fp32.
AVERAGE_DTYPES = {d: d for d in (torch.float64, torch.complex64, torch.complex128)}


class VersionCounters:
    """One version counter for all states that an optimizer makes on a device.

    Autograd must be told of every tensor that a kernel writes; so it is told of all states at once.
    """

    def __init__(self) -> None:
        self._anchors: dict[torch.device, Tensor] = {}

    def new_state(self, param: Tensor, value: float, dtype: torch.dtype) -> Tensor:
        """A state like the parameter's local part, in memory of its own, filled with a value."""
        local = local_of(param)
        if param.device not in self._anchors:
            with torch.inference_mode(False):
                self._anchors[param.device] = torch.empty(0, device=param.device)
        state = self._anchors[param.device].detach()
        fill = complex(value, value) if param.is_complex() else value  # as torch.optim
        state.data = torch.full_like(
            local, fill, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
        )
        return state

    def to_count(self, slots: list[Slot]) -> list[Tensor]:
        """The tensors whose counters a step must count up: one of those that share one."""
        states = [t for slot in slots for t in slot.states]
        before = [t._version for t in states]
        anchors = list(self._anchors.values())
        torch.autograd.graph.increment_version(anchors)
        own = [t for t, version in zip(states, before, strict=True) if t._version == version]
        return [*anchors, *own, *(slot.param for slot in slots)]


def make_state(
    state: Mapping[Tensor, Any],
    versions: VersionCounters,
    param: Tensor,
    recipe: Recipe,
    group: Mapping[str, Any],
) -> bool:
    """Makes the state of a parameter that is missing; returns whether all of it was."""
    rule = recipe.rule
    if not recipe.states and not recipe.counts:
        return True
    entry = state[param]
    missing = [name for name in recipe.own_states if entry.get(name) is None]
    fresh = len(missing) == len(recipe.own_states)
    if recipe.counts and "step" not in entry:
        # Noise that is switched on late begins to count where a rule that does not would stand.
        entry["step"] = torch.tensor(0.0 if fresh or rule.counts else 1.0, dtype=torch.float32)
    if rule.product and rule.product[0] not in entry:
        entry[rule.product[0]] = torch.ones((), dtype=torch.float32)
    for name in missing:
        value = float(group[rule.starts[name]]) if name in rule.starts else 0.0
        dtype = state_dtype(group, name, param) or param.dtype
        entry[name] = like(param, versions.new_state(param, value, dtype))
    if recipe.flags.ema and entry.get("ema") is None:
        dtype = AVERAGE_DTYPES.get(param.dtype, torch.float32)
        average = versions.new_state(param, 0.0, dtype)
        entry["ema"] = like(param, average.copy_(local_of(param)))
    return fresh


def state_dtype(group: Mapping[str, Any], name: str, param: Tensor) -> torch.dtype | None:
    """The dtype that a group asks for, for a state; None where it does not."""
    if name == "ema" or param.is_complex():
        return None
    return STATE_DTYPES[group["state_dtype"]]


def load_state(
    entry: dict[str, Any], saved: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]
) -> None:
    """Takes over saved states in the dtype that is asked for, else in the wider one of saved and loaded.

    Args:
        entry: the state of the parameter as torch.optim has loaded it: in the parameter's dtype.
        saved: the state in the checkpoint.
        param, group: the parameter and its options.
    """
    for name, value in saved.items():
        if name == "step" or not isinstance(value, Tensor):
            continue
        loaded = entry[name].dtype
        dtype = state_dtype(group, name, param) or torch.promote_types(loaded, value.dtype)
        if dtype != loaded:
            entry[name] = value.to(param.device, dtype)


def states_of(state: Mapping[Tensor, Any], param: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
    """What of a parameter's states lies here, in the order the device functions take them."""
    return tuple(local_of(state[param][name]) for name in recipe.states)


class StateBefore:
    """The states of some parameters as they were before a step made what was missing."""

    def __init__(self, state: MutableMapping[Tensor, Any]) -> None:
        self._state = state
        self._entries: dict[Tensor, dict[str, Any] | None] = {}

    def remember(self, params: Iterable[Tensor]) -> None:
        """Notes the states of parameters for which some may be made."""
        for param in params:
            if param not in self._entries:
                self._entries[param] = dict(self._state[param]) if param in self._state else None

    def restore(self) -> None:
        """Drops what was made since."""
        for param, entry in self._entries.items():
            if entry is None:
                self._state.pop(param, None)
            else:
                self._state[param].clear()
                self._state[param].update(entry)
