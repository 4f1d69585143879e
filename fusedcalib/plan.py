"""A step laid out once: its launches, and what is refreshed of them from step to step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .recipe import Recipe, scalars_of
from .tables import Array, Slot, build_buckets
from .watch import Watch


class Plan:
    """Everything of a step that does not change from step to step."""

    def __init__(
        self,
        slots: list[Slot],
        fresh: list[bool],
        recipes: list[Recipe],
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        versions: Versions,
    ) -> None:
        self.buckets = build_buckets(slots)
        self._recipes = recipes
        self._groups = np.array([slot.group for slot in slots], dtype=np.int64)
        self._group_rows = np.unique(self._groups, return_inverse=True)
        self._written = versions.to_count(slots)
        self._counter = _Counter(slots, fresh, state)
        self._watch = Watch(groups, state)

    def holds(self, recipes: list[Recipe], groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> bool:
        """Whether the plan still fits; takes over gradients that moved."""
        before = self._watch.grad_pointers
        if recipes != self._recipes or not self._watch.holds(groups, state):
            return False
        if self._watch.grad_pointers == before:
            return True
        addresses = np.array(self._watch.grad_pointers, dtype=np.int64)
        return all(bucket.set_gradients(addresses) for bucket in self.buckets)

    def refresh(self, groups: list[dict[str, Any]]) -> None:
        """Recomputes the scalars of the coming step: one row for each (group, step) that occurs."""
        pairs, rows = self._pairs(self._counter.upcoming())
        values = [scalars_of(self._recipes[g], groups[g], step) for g, step in pairs]
        for bucket in self.buckets:
            bucket.set_scalars(values, rows)

    def _pairs(self, steps: Array) -> tuple[list[tuple[int, float]], Array]:
        """The distinct (group, step) pairs, and which of them each slot has."""
        if steps.size and steps.min() == steps.max():  # the usual case: a group is a row
            step = float(steps[0])
            return [(int(g), step) for g in self._group_rows[0]], self._group_rows[1]
        both = np.stack([self._groups, steps], axis=1)
        pairs, rows = np.unique(both, axis=0, return_inverse=True)
        return [(int(g), float(s)) for g, s in pairs], rows.reshape(-1)

    def run(self) -> int:
        """Steps everything; returns the number of kernel launches."""
        launches = sum(bucket.key.executor.run(bucket) for bucket in self.buckets)
        self._counter.advance()
        # Kernels write through addresses: tell autograd, as an in-place operation would.
        torch.autograd.graph.increment_version(self._written)
        return launches


class Versions:
    """One version counter for all states that an optimizer makes on a device.

    Autograd must be told of every tensor that a kernel writes; so it is told of all states at once.
    """

    def __init__(self) -> None:
        self._anchors: dict[torch.device, Tensor] = {}

    def new_state(self, param: Tensor) -> Tensor:
        """A state of zeros like the parameter, in memory of its own."""
        if param.device not in self._anchors:
            with torch.inference_mode(False):
                self._anchors[param.device] = torch.empty(0, device=param.device)
        state = self._anchors[param.device].detach()
        state.data = torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)
        return state

    def to_count(self, slots: list[Slot]) -> list[Tensor]:
        """The tensors whose counters a step must count up: one of those that share one."""
        states = [t for slot in slots for t in slot.states]
        before = [t._version for t in states]
        anchors = list(self._anchors.values())
        torch.autograd.graph.increment_version(anchors)
        own = [t for t, version in zip(states, before, strict=True) if t._version == version]
        return [*anchors, *own, *(slot.param for slot in slots)]


class _Counter:
    """The steps taken by each slot.

    Each `state["step"]` is a 0-dim tensor of its own, as torch.optim's, but all are views of one buffer:
    counting a step is one addition whatever the number of parameters.
    """

    def __init__(self, slots: list[Slot], fresh: list[bool], state: dict[Tensor, Any]) -> None:
        self._counts = bool(slots) and slots[0].recipe.rule.counts
        taken = [float(not new) for new in fresh]
        if self._counts:
            taken = [float(state[slot.param]["step"]) for slot in slots]
        self._buffer = torch.tensor(taken, dtype=torch.float32)
        self._taken: Array = self._buffer.numpy()
        if self._counts:
            for slot, step in zip(slots, self._buffer, strict=True):
                state[slot.param]["step"] = step

    def upcoming(self) -> Array:
        """The step that each slot takes next, from 1."""
        return self._taken + 1

    def advance(self) -> None:
        """Counts a step; rules that keep no count only know the first from the later ones."""
        if self._counts:
            self._buffer += 1
        else:
            self._buffer.fill_(1)
