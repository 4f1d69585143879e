"""The state tensors of parameters: made in the dtypes that are asked for, laid out as the parameter is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.storage import CODED
from ..layout.recipe import Recipe
from ..layout.shards import like, local_of, of_rows
from ..layout.storage import MASTER, REMAINDER, names_of, remainder_view
from ..storage import FORMS, STATE_DTYPES, state_format
from .kept import Form, is_storage, is_there, keep_state, keep_weights, make_bytes, master_of, weights_of
from .offload import loaded_state, move_states

if TYPE_CHECKING:
    from .versions import VersionCounters

# Of a parameter's average; else fp32.
AVERAGE_DTYPES = {d: d for d in (torch.float64, torch.complex64, torch.complex128)}


def make_state(
    state: Mapping[Tensor, Any],
    versions: VersionCounters,
    param: Tensor,
    recipe: Recipe,
    group: Mapping[str, Any],
) -> bool:
    """Makes the state of a parameter that is missing; returns whether all of it was.

    What is kept otherwise than the group asks is converted; what is offloaded moves, a state at a time.
    """
    rule, storage, leading = recipe.rule, recipe.storage_of(param), recipe.leading(param)
    nothing = not recipe.states and not recipe.counts and storage.master == "none"
    if nothing and param not in state:
        return True
    entry = state[param]
    missing = [name for name in recipe.own_states if not is_there(entry, name)]
    fresh = len(missing) == len(recipe.own_states)
    if recipe.counts and "step" not in entry:
        # Noise that is switched on late begins to count where a rule that does not would stand.
        entry["step"] = torch.tensor(0.0 if fresh or rule.counts else 1.0, dtype=torch.float32)
    if rule.product and rule.product[0] not in entry:
        entry[rule.product[0]] = torch.ones((), dtype=torch.float32)
    kinds = storage.states or ("cast",) * len(recipe.own_states)
    for name, kind in zip(recipe.own_states, kinds, strict=True):
        dtype = state_dtype(group, name, param)
        if name not in missing:
            form = Form(kind, dtype, name in rule.nonnegative, leading)
            keep_state(entry, versions, param, name, form)
        elif kind in CODED:
            make_bytes(entry, versions, param, name, leading)
        else:
            value = float(group[rule.starts[name]]) if name in rule.starts else 0.0
            entry[name] = like(param, versions.new_state(param, value, dtype or param.dtype))
    if rule.row_state and rule.row_state not in entry:
        entry[rule.row_state] = make_row_state(versions, param, recipe.laid_by(param))
    keep_weights(entry, versions, param, storage.master)
    if recipe.flags.ema and entry.get("ema") is None:
        dtype = AVERAGE_DTYPES.get(param.dtype, torch.float32)
        average = versions.new_state(param, 0.0, dtype)
        entry["ema"] = like(param, average.copy_(weights_of(param, entry)))
    if versions.offload:
        move_states(entry, versions, ("step", *(rule.product or ())[:1]))
    return fresh


def make_row_state(versions: VersionCounters, param: Tensor, leading: int) -> Tensor:
    """Makes a number for each row here of a parameter, in the type of the arithmetic: zero."""
    local = local_of(param)
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    shape = local.shape[:leading] or (1,)
    return of_rows(param, versions.counted(torch.zeros(shape, dtype=dtype, device=local.device)), leading)


def state_dtype(group: Mapping[str, Any], name: str, param: Tensor) -> torch.dtype | None:
    """The dtype that a group asks for, for a state that is not kept in bytes; None where it does not."""
    if name == "ema" or param.is_complex():
        return None
    form = state_format(group["state_dtype"], name)
    if form in FORMS:  # small parameters have fp32 states where others have bytes
        return torch.bfloat16 if form == "bfloat16_stochastic" else torch.float32
    return STATE_DTYPES[form]


def load_state(
    entry: dict[str, Any],
    saved: Mapping[str, Any],
    param: Tensor,
    group: Mapping[str, Any],
    versions: VersionCounters,
) -> None:
    """Takes over saved states in the dtype that is asked for, else in the wider one of saved and loaded.

    Args:
        entry: the state of the parameter as torch.optim has loaded it: in the parameter's dtype; of states
            that are offloaded only their dtypes, see `empty_states`.
        saved: the state in the checkpoint.
        param, group: the parameter and its options.
        versions: the optimizer's.
    """
    for name, value in saved.items():
        if name == "step" or not isinstance(value, Tensor):
            continue
        loaded = entry[name].dtype
        if is_storage(name) or value.shape != param.shape:  # bytes, and numbers of rows
            dtype = value.dtype
        else:
            dtype = state_dtype(group, name, param) or torch.promote_types(loaded, value.dtype)
        if versions.offload and value.ndim:
            entry[name] = loaded_state(value, dtype, versions)
        elif dtype != loaded:
            entry[name] = value.to(param.device, dtype)


def states_of(state: Mapping[Tensor, Any], param: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
    """What of a parameter's states lies here, in the order the device functions take them.

    What the parameter has beside it comes last.
    """
    entry, storage = state.get(param, {}), recipe.storage_of(param)
    names = ["ema"] if recipe.flags.ema else []
    kinds = storage.states or ("cast",) * len(recipe.own_states)
    names += [names_of(name, kind)[0] for name, kind in zip(recipe.own_states, kinds, strict=True)]
    found = [local_of(entry[name]) for name in names]
    if storage.master == "float32":
        found.append(local_of(entry[MASTER]))
    elif storage.master != "none":
        found.append(remainder_view(local_of(entry[REMAINDER]), storage.master))
    return tuple(found)


def scales_of(state: Mapping[Tensor, Any], param: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
    """The scales here [rows, blocks] of a parameter's states that are kept in bytes."""
    kinds = recipe.storage_of(param).states
    named = zip(recipe.own_states, kinds, strict=False)
    found = (local_of(state[param][names_of(name, kind)[1]]) for name, kind in named if kind in CODED)
    return tuple(scales.flatten(0, -2) for scales in found)


class StateBefore:
    """The states of some parameters as they were before a step made what was missing, or converted it."""

    def __init__(self, state: MutableMapping[Tensor, Any]) -> None:
        self._state = state
        self._entries: dict[Tensor, dict[str, Any] | None] = {}
        self._values: dict[Tensor, Tensor] = {}

    def remember(self, params: Iterable[Tensor]) -> None:
        """Notes the states of parameters for which some may be made."""
        for param in params:
            if param not in self._entries:
                self._entries[param] = dict(self._state[param]) if param in self._state else None

    def remember_values(self, param: Tensor, master: str) -> None:
        """Notes a parameter that is rounded anew where something else is to lie beside it."""
        now = master_of(param, self._state.get(param, {}))
        if "none" not in (now, master) and now != master:
            self._values[param] = local_of(param).detach().clone()

    def restore(self) -> None:
        """Drops what was made since."""
        for param, values in self._values.items():
            local_of(param).detach().copy_(values)
        for param, entry in self._entries.items():
            if entry is None:
                self._state.pop(param, None)
            else:
                self._state[param].clear()
                self._state[param].update(entry)
