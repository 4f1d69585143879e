"""States and master weights of a parameter in the form that is asked for: made, converted, told apart."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..executors import torch_storage
from ..kernels.storage import CODED
from ..layout.shards import beside, like, local_of
from ..layout.storage import (
    MASTER,
    REMAINDER,
    leading_of,
    names_of,
    remainder_bytes,
    remainder_shape,
    remainder_view,
    scales_shape,
)
from .versions import VersionCounters

Entry = MutableMapping[str, Any]
BYTES = names_of("", "signed")  # what the names of such tensors end with


def is_storage(name: str) -> bool:
    """Whether a key of the state is of ours, and keeps its dtype whatever the parameter's is."""
    return name.endswith(BYTES) or name in (MASTER, REMAINDER)


def is_there(entry: Entry, name: str) -> bool:
    """Whether there is a state of a name, in whatever form."""
    return entry.get(name) is not None or any(key in entry for key in names_of(name, "signed"))


# -- states -----------------------------------------------------------------------------------


def make_bytes(entry: Entry, versions: VersionCounters, param: Tensor, name: str, leading: int) -> None:
    """Makes a state that is zero, in bytes. `leading`: dimensions that a row is an index of."""
    local = local_of(param)
    codes = torch.zeros(local.shape, dtype=torch.uint8, device=local.device)
    scales = torch.zeros(scales_shape(local.shape, leading), dtype=torch.float32, device=local.device)
    _set_bytes(entry, versions, param, name, (codes, scales))


def _set_bytes(
    entry: Entry, versions: VersionCounters, param: Tensor, name: str, kept: tuple[Tensor, ...]
) -> None:
    shapes = tuple(param.shape), scales_shape(param.shape, leading_of(kept[1]))
    for key, part, shape in zip(names_of(name, "signed"), kept, shapes, strict=True):
        entry[key] = like(param, versions.counted(part.contiguous()), shape)


def state_values(param: Tensor, entry: Entry, name: str, nonnegative: bool) -> Tensor:
    """What is here of a parameter's state, beside it, in fp32 where it is kept in bytes."""
    codes, scales = names_of(name, "signed")
    if codes not in entry:
        return beside(param, entry[name])
    kind = "nonnegative" if nonnegative else "signed"
    return torch_storage.decoded(beside(param, entry[codes]), beside(param, entry[scales]), kind)


class Form(NamedTuple):
    """How a state is to be kept.

    Attributes:
        kind: of kernels/storage.py.
        dtype: where that is not bytes; None: its own, the parameter's where it has bytes.
        nonnegative: whether it cannot be negative.
        leading: dimensions that a row is an index of.
    """

    kind: str
    dtype: torch.dtype | None
    nonnegative: bool
    leading: int = 1


def keep_state(entry: Entry, versions: VersionCounters, param: Tensor, name: str, form: Form) -> None:
    """Has a state that is there kept in a form."""
    codes, scales = names_of(name, "signed")
    in_bytes = codes in entry
    if form.kind in CODED:
        if not in_bytes or leading_of(entry[scales]) != form.leading:  # rows are others: other blocks
            values = state_values(param, entry, name, form.nonnegative).to(torch.float32)
            entry.pop(name, None)
            _set_bytes(entry, versions, param, name, torch_storage.coded(values, form.kind, form.leading))
        return
    dtype = form.dtype or (param if in_bytes else entry[name]).dtype
    if in_bytes or entry[name].dtype != dtype:
        kept = versions.new_state(param, 0.0, dtype)
        entry[name] = like(param, kept.copy_(state_values(param, entry, name, form.nonnegative)))
    for key in (codes, scales):
        entry.pop(key, None)


# -- parameters -------------------------------------------------------------------------------


def master_of(param: Tensor, entry: Entry) -> str:
    """What a parameter has beside it."""
    if MASTER in entry:
        return "float32"
    if REMAINDER not in entry:
        return "none"
    return "split16" if entry[REMAINDER].ndim > param.ndim else "split8"


def weights_of(param: Tensor, entry: Entry) -> Tensor:
    """What is here of a parameter with what it has beside it: fp32; the parameter where it has none.

    Of one that is no longer bf16, as where a checkpoint of that was loaded, the remainder says nothing.
    """
    local, master = local_of(param).detach(), master_of(param, entry)
    if master == "float32":
        return beside(param, entry[MASTER])
    if master == "none" or param.dtype != torch.bfloat16:
        return local
    return torch_storage.joined(local, remainder_view(beside(param, entry[REMAINDER]), master), master)


def keep_weights(entry: Entry, versions: VersionCounters, param: Tensor, master: str) -> None:
    """Has a parameter kept with what is asked for beside it; where that is nothing it stays as it is."""
    if master_of(param, entry) == master:
        return
    if master != "none":
        set_weights(entry, versions, param, master, weights_of(param, entry))
        return
    for key in (MASTER, REMAINDER):
        entry.pop(key, None)


def set_weights(entry: Entry, versions: VersionCounters, param: Tensor, master: str, values: Tensor) -> None:
    """Sets a parameter and what it has beside it.

    Args:
        values: fp32, or like the parameter, of what is here of it.
    """
    local = local_of(param).detach()
    for key in (MASTER, REMAINDER):
        entry.pop(key, None)
    if master == "none":
        local.copy_(values)
    elif master == "float32":
        kept = versions.new_state(param, 0.0, torch.float32)
        entry[MASTER] = like(param, kept.copy_(values))
        local.copy_(values)
    else:
        values = values.to(torch.float32)
        if master == "split8":
            values = torch_storage.trimmed(values)
        high, low = torch_storage.split(values, master)
        local.copy_(high)
        kept = versions.new_state(param, 0.0, low.dtype).copy_(low)
        kept.data = remainder_bytes(kept.data, master)
        entry[REMAINDER] = like(param, kept, remainder_shape(param.shape, master))
