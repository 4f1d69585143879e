"""Version counters of what steps write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..executors.triton import pinned
from ..layout.shards import local_of

if TYPE_CHECKING:
    from ..layout.buckets import Slot


class VersionCounters:
    """One version counter for all states that an optimizer makes on a device.

    Autograd must be told of every tensor that a kernel writes; so it is told of all states at once.

    Attributes:
        offload: whether states that are made from now on lie in pinned host memory, wherever parameters do.
    """

    def __init__(self) -> None:
        self.offload = False
        self._anchors: dict[torch.device, Tensor] = {}

    def new_state(self, param: Tensor, value: float, dtype: torch.dtype) -> Tensor:
        """A state like the parameter's local part, in memory of its own, filled with a value."""
        fill = complex(value, value) if param.is_complex() else value  # as torch.optim
        local = local_of(param)
        if self.offload:
            return self.counted(pinned.memory(local, dtype).fill_(fill))
        return self.counted(
            torch.full_like(
                local,
                fill,
                dtype=dtype,
                memory_format=torch.preserve_format,
                requires_grad=False,
            )
        )

    def counted(self, values: Tensor) -> Tensor:
        """A tensor that nobody else has, counted with the others, in the memory where states lie."""
        if self.offload:
            values = pinned.moved(values)
        if values.device not in self._anchors:
            with torch.inference_mode(False):
                self._anchors[values.device] = torch.empty(0, device=values.device)
        state = self._anchors[values.device].detach()
        state.data = values
        return state

    def to_count(self, slots: list[Slot]) -> list[Tensor]:
        """The tensors whose counters a step must count up: one of those that share one."""
        states = [t for slot in slots for t in slot.beside()]
        before = [t._version for t in states]
        anchors = list(self._anchors.values())
        torch.autograd.graph.increment_version(anchors)
        own = [t for t, version in zip(states, before, strict=True) if t._version == version]
        return [*anchors, *own, *(slot.param for slot in slots)]
