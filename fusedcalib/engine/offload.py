"""States that are offloaded: who can have them, how they get to pinned host memory. It is pinned.py's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..executors.choose import may_launch
from ..executors.triton import pinned
from ..layout.buckets import Executor
from ..layout.shards import local_of, with_local
from .versions import VersionCounters


def check_construction(name: str, backend: str) -> None:
    """Raises ValueError where no parameter's states could be offloaded: by the executor, or without a GPU."""
    if not may_launch(backend):
        raise ValueError(
            f"{name}: offload='states' needs kernels that reach the host's memory from a GPU, which "
            f"backend={backend!r} has not; use backend='auto', or leave offload out"
        )
    if not pinned.available():
        raise ValueError(
            f"{name}: offload='states' needs a GPU, and torch sees none here; leave offload out (on a CPU "
            "states lie in the host's memory anyway)"
        )


def reaching_host(name: str, executor: Executor, device: torch.device) -> Executor:
    """An executor, if it reaches the host's memory from a device; else raises RuntimeError."""
    if not executor.launches:
        raise RuntimeError(
            f"{name}: offload='states' is for parameters that Triton steps on a GPU, but one on {device} is "
            f"stepped by {executor.name}; move the model to a GPU before the first step (install Triton, "
            "resolve_neg() or resolve_conj() lazy gradients), or leave offload out"
        )
    if reason := pinned.why_not(device):
        raise RuntimeError(f"{name}: offload='states' {reason}; leave offload out")
    return executor


def move_states(entry: MutableMapping[str, Any], versions: VersionCounters, counts: Collection[str]) -> None:
    """Moves the states of a parameter that lie elsewhere, one at a time; all but those that count."""
    for name, value in entry.items():
        if name not in counts and isinstance(value, Tensor) and not pinned.is_pinned(local_of(value)):
            entry[name] = with_local(value, versions.counted(local_of(value)))


def loaded_state(value: Tensor, dtype: torch.dtype, versions: VersionCounters) -> Tensor:
    """A state of a checkpoint as it is kept: itself where it lies there in that dtype."""
    return with_local(value, versions.counted(pinned.moved(local_of(value), dtype)))


def empty_states(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint with empty tensors in the places of states, for torch.optim to load.

    It would bring all states to the parameters' device at once; they go straight to the host instead.
    """

    def emptied(value: Any) -> Any:
        return torch.empty(0, dtype=value.dtype) if isinstance(value, Tensor) and value.ndim else value

    state = {
        key: {name: emptied(value) for name, value in entry.items()} if isinstance(entry, dict) else entry
        for key, entry in saved["state"].items()
    }
    return {**saved, "state": state}
