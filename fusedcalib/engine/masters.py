"""Parameters with what they have beside them, out and in; states in torch.optim's form; bytes of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..executors.triton import pinned
from ..layout.shards import is_spread, like, local_of
from ..layout.storage import HALF, MASTER, REMAINDER, names_of
from ..options import EXTRAS
from ..rule import Rule
from ..storage import MASTERS, VERSION_KEY
from .flat import check_whole
from .kept import master_of, set_weights, state_values, weights_of
from .versions import VersionCounters

Groups = Sequence[Mapping[str, Any]]
State = MutableMapping[Tensor, Any]


def expanded(
    state_dict: dict[str, Any], params: Sequence[Tensor], state: State, rule: Rule
) -> dict[str, Any]:
    """A state dict with the keys of torch.optim's class alone, and fp32 states for those in bytes.

    Args:
        state_dict: of the optimizer.
        params: its parameters in the order of their numbers there.
        state: the optimizer's.
        rule: its rule.
    """
    names = list(dict.fromkeys(name for variant in rule.states.values() for name in variant))
    entries: dict[Any, dict[str, Any]] = {}
    for number, saved in state_dict["state"].items():
        param, entry = params[number], dict(saved)
        for name in names:
            codes, scales = names_of(name, "signed")
            if codes in entry:
                values = state_values(param, state[param], name, name in rule.nonnegative)
                entry[name] = like(param, values.to(local_of(entry[codes]).device))
                del entry[codes], entry[scales]
        entry.pop(MASTER, None)
        entry.pop(REMAINDER, None)
        entries[number] = entry
    own = {*EXTRAS, VERSION_KEY}
    groups = [{k: v for k, v in group.items() if k not in own} for group in state_dict["param_groups"]]
    return {**state_dict, "state": entries, "param_groups": groups}


def master_weights(model: nn.Module, state: State) -> dict[str, Any]:
    """The state dict of a model with fp32 parameters: of those that are kept in parts, all of them.

    Raises:
        RuntimeError: FSDP1 has made flat parts of the model's parameters.
    """
    check_whole("master_state_dict", model.parameters())
    found: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, nn.Parameter):
            found[name] = value.detach() if isinstance(value, Tensor) else value
        elif value.dtype in HALF:
            entry = state.get(value, {})
            found[name] = like(value, weights_of(value, entry).to(torch.float32, copy=True))
        else:
            found[name] = value.detach().clone()
    return found


def load_master_weights(
    model: nn.Module,
    weights: Mapping[str, Any],
    groups: Groups,
    state: State,
    versions: VersionCounters,
) -> None:
    """Sets parameters, and what they have beside them, from a state dict; buffers too.

    Raises:
        RuntimeError: names or shapes are not the model's. Nothing is changed then.
    """
    check_whole("load_master_state_dict", model.parameters())
    own = model.state_dict(keep_vars=True)
    lacking, unknown = own.keys() - weights.keys(), weights.keys() - own.keys()
    if lacking or unknown:
        raise RuntimeError(
            f"load_master_state_dict: the model's names are others: missing {sorted(lacking)[:5]}, unknown "
            f"{sorted(unknown)[:5]}; hand over what master_state_dict(model) gave"
        )
    for name, value in own.items():
        if isinstance(value, Tensor) and value.shape != weights[name].shape:
            raise RuntimeError(
                f"load_master_state_dict: {name} is {tuple(weights[name].shape)} there, but "
                f"{tuple(value.shape)} in the model"
            )
    asked = {p: MASTERS[group["master_weights"]] for group in groups for p in group["params"]}
    with torch.no_grad():
        for name, value in own.items():
            if isinstance(value, nn.Parameter) and value in asked and value.dtype in HALF:
                entry = state[value]
                master = (
                    asked[value]
                    if REMAINDER not in entry and MASTER not in entry
                    else master_of(value, entry)
                )
                set_weights(entry, versions, value, master, _part_of(value, weights[name]))
            elif isinstance(value, Tensor):
                local_of(value.detach()).copy_(_part_of(value, weights[name]))


def _part_of(param: Tensor, whole: Tensor) -> Tensor:
    """What of a tensor lies here where a parameter does."""
    spread: Any = param
    given: Any = whole.detach()
    if not is_spread(param):
        here: Tensor = given.full_tensor() if is_spread(given) else given.to(param.device)
        return here
    from torch.distributed.tensor import distribute_tensor

    if is_spread(given):
        whole = given.redistribute(spread.device_mesh, spread.placements)
        return local_of(whole)
    return local_of(distribute_tensor(given.to(param.device), spread.device_mesh, spread.placements))


def refresh(params: Iterable[Tensor], state: State, versions: VersionCounters) -> None:
    """Makes every parameter what it is without what it has beside it."""
    for param in params:
        entry = state.get(param, {})
        master = master_of(param, entry)
        if master != "none":
            with torch.no_grad():
                set_weights(entry, versions, param, master, local_of(param).detach().to(torch.float32))


def resident_bytes(params: Iterable[Tensor], state: State, offload: bool = False) -> dict[str, int]:
    """Bytes here of parameters, gradients and each part of the state, and of all together.

    `offload`: also how many of them are in pinned host memory.
    """
    found: dict[str, int] = {"parameters": 0, "gradients": 0}
    host = 0
    for param in params:
        found["parameters"] += _size(param)
        found["gradients"] += 0 if param.grad is None else _size(param.grad)
        for name, value in state.get(param, {}).items():
            if isinstance(value, Tensor):
                found[name] = found.get(name, 0) + _size(value)
                host += _size(value) if offload and pinned.is_pinned(local_of(value)) else 0
    return {**found, "total": sum(found.values()), **({"host": host} if offload else {})}


def _size(t: Tensor) -> int:
    local = local_of(t)
    return local.numel() * local.element_size()
