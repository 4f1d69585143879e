"""Flat shards, vectors that FSDP1 and DeepSpeed ZeRO make of parameters, and what they cannot do."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..layout.storage import HALF
from ..storage import MASTERS, state_formats

GATHERING = ("torch.distributed.fsdp.fully_sharded_data_parallel", "torch.distributed.checkpoint.state_dict")


def warn_of_flat(name: str, params: Sequence[Tensor]) -> bool:
    """Of parameters whose rows are to be centred or shortened: says if they have none; whether it did."""
    flat = [p for p in params if _is_flat(p) or hasattr(p, "ds_id")]
    if not flat and (not params or any(p.ndim >= 2 for p in params)):
        return False
    elements = sum(p.numel() for p in flat or params)
    warnings.warn(
        f"{name}: centralize and max_row_norm do nothing here: {len(flat or params)} parameters of "
        f"{elements} elements are vectors without rows, as FSDP1 and DeepSpeed ZeRO make of all parameters; "
        "use FSDP2 (torch.distributed.fsdp.fully_shard), which keeps rows",
        stacklevel=2,
    )
    return True


def _is_flat(param: Tensor) -> bool:
    """Whether FSDP1 has made this of many parameters."""
    return getattr(param, "_is_flat_param", False)


def _is_part(param: Any) -> bool:
    """Whether FSDP1 has made this of many parameters, or (use_orig_params=True) a part of one."""
    return getattr(param, "_fsdp_flattened", False)


def is_flat(param: Any) -> bool:
    """Whether FSDP1 or DeepSpeed ZeRO has made this of many parameters, or it is a part of such a one."""
    return _is_flat(param) or _is_part(param) or hasattr(param, "ds_id")


def check_gathered(name: str, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises where FSDP1 is to gather states that it cannot: codes with scales, and remainders.

    It takes every state for one of floating point and of the parameter's shape. On its own each rank may save
    what it has: this raises for callers within torch.distributed alone.

    Args:
        name: of the optimizer.
        groups: its param groups, of which every rank has the same.
    """
    for number, group in enumerate(groups):
        said = _not_gathered(group)
        if said and _is_gathering():
            raise RuntimeError(
                f"{name}: FSDP1 cannot gather the state of group {number}, which has {said}; give "
                "FSDP.optim_state_dict the fp32 states of optimizer.expanded_state_dict() as its third "
                "argument, or save optimizer.state_dict() on each rank, or use FSDP2 "
                "(torch.distributed.fsdp.fully_shard)"
            )


def _not_gathered(group: Mapping[str, Any]) -> str:
    """The option that gives flat shards of a group what FSDP1 cannot gather; "" where none does."""
    parts = [p for p in group["params"] if _is_part(p)]
    if parts and "8bit" in state_formats(group.get("state_dtype")):
        return f"state_dtype={group['state_dtype']!r}"
    split = MASTERS[group.get("master_weights")] in ("split16", "split8")
    if split and any(p.dtype in HALF for p in parts):
        return f"master_weights={group['master_weights']!r}"
    return ""


def _is_gathering() -> bool:
    """Whether one of the callers is torch.distributed: nothing else tells what a state dict is wanted for."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") not in GATHERING:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def check_whole(name: str, params: Iterable[Any]) -> None:
    """Raises where parameters of a model are parts of flat ones, whose fp32 weights have no names."""
    if any(map(_is_part, params)):
        raise RuntimeError(
            f"{name}: FSDP1 has made flat parts of the model's parameters, which hand out no fp32 weights by "
            "their names; use FSDP2 (torch.distributed.fsdp.fully_shard)"
        )
