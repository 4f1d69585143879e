"""A step laid out once: its launches, and what is refreshed of them from step to step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .recipe import Numbers, Recipe, scalars_of
from .tables import Array, Slot, build_buckets
from .watch import Watch


class Plan:
    """Everything of a step that does not change from step to step."""

    def __init__(
        self,
        slots: list[Slot],
        fresh: list[bool],
        asked: list[Recipe],
        recipes: list[Recipe],
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        versions: Versions,
    ) -> None:
        self.buckets = build_buckets(slots)
        self._asked = asked  # of each group
        self._recipes = recipes  # compiled for it
        self._groups = np.array([slot.group for slot in slots], dtype=np.int64)
        self._group_rows = np.unique(self._groups, return_index=True, return_inverse=True)[1:]
        self._written = versions.to_count(slots)
        self._counter = _Counter(slots, fresh, state)
        self._watch = Watch(groups, state)

    def holds(self, asked: list[Recipe], groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> bool:
        """Whether the plan still fits; takes over gradients that moved."""
        before = self._watch.grad_pointers
        if asked != self._asked or not self._watch.holds(groups, state):
            return False
        if self._watch.grad_pointers == before:
            return True
        addresses = np.array(self._watch.grad_pointers, dtype=np.int64)
        return all(bucket.set_gradients(addresses) for bucket in self.buckets)

    def refresh(self, groups: list[dict[str, Any]]) -> None:
        """Recomputes the scalars of the coming step: one row for each (group, step) that occurs."""
        found, rows = self._distinct(self._counter.upcoming())
        values, products = [], []
        for group, step, *product in found:
            recipe, options = self._recipes[int(group)], groups[int(group)]
            if product and recipe.rule.product:
                factor = recipe.rule.product[1](Numbers(options), float(step))
                product = [np.float32(product[0]) * np.float32(factor)]  # rounded as torch.optim's
                products += product
            values.append(scalars_of(recipe, options, float(step), *map(float, product)))
        self._counter.products = np.array(products, dtype=np.float32)[rows] if products else None
        for bucket in self.buckets:
            bucket.set_scalars(values, rows)

    def _distinct(self, history: tuple[Array, ...]) -> tuple[Array, Array]:
        """The distinct (group, step, ...) that occur, a row each, and which of them each slot has."""
        firsts, rows = self._group_rows
        if all(h.size and h.min() == h.max() for h in history):  # the usual case: a group is a row
            return np.stack([self._groups[firsts], *(h[firsts] for h in history)], axis=1), rows
        found, rows = np.unique(np.stack([self._groups, *history], axis=1), axis=0, return_inverse=True)
        return found, rows.reshape(-1)

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

    def new_state(self, param: Tensor, value: float) -> Tensor:
        """A state like the parameter, in memory of its own, filled with a value."""
        if param.device not in self._anchors:
            with torch.inference_mode(False):
                self._anchors[param.device] = torch.empty(0, device=param.device)
        state = self._anchors[param.device].detach()
        fill = complex(value, value) if param.is_complex() else value  # as torch.optim
        state.data = torch.full_like(param, fill, memory_format=torch.preserve_format, requires_grad=False)
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
    """The steps taken by each slot, and the running product of a rule that keeps one.

    Each `state["step"]` is a 0-dim tensor of its own, as torch.optim's, but all are views of one buffer:
    counting a step is one addition whatever the number of parameters.
    """

    def __init__(self, slots: list[Slot], fresh: list[bool], state: dict[Tensor, Any]) -> None:
        rule = slots[0].recipe.rule if slots else None
        entries = [state[slot.param] if slot.recipe.counts else {} for slot in slots]
        # A slot that keeps no count only tells its first step from the later ones.
        taken = [entry.get("step", float(not new)) for entry, new in zip(entries, fresh, strict=True)]
        self._most = torch.tensor([math.inf if entry else 1.0 for entry in entries])
        self._taken = _shared(entries, "step", taken)
        self._product = None
        if rule and rule.product:
            name = rule.product[0]
            self._product = _shared(entries, name, [entry[name] for entry in entries])
        self.products: Array | None = None  # what the coming step makes of it

    def upcoming(self) -> tuple[Array, ...]:
        """The step that each slot takes next, from 1, and its product so far."""
        step = self._taken.numpy() + 1
        return (step,) if self._product is None else (step, self._product.numpy())

    def advance(self) -> None:
        """Counts a step."""
        torch.minimum(self._taken.add_(1), self._most, out=self._taken)
        if self._product is not None and self.products is not None:
            self._product.copy_(torch.from_numpy(self.products))


def _shared(entries: list[dict[str, Any]], name: str, values: list[Any]) -> Tensor:
    """A buffer of values, of which the 0-dim states of that name become views."""
    buffer = torch.tensor([float(value) for value in values], dtype=torch.float32)
    for entry, view in zip(entries, buffer, strict=True):
        if entry:
            entry[name] = view
    return buffer
