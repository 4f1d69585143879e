"""A step laid out once: its launches, and what is refreshed of them from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..layout.buckets import Array, Slot
from ..layout.inputs import PlanInputs
from ..layout.recipe import Asked, Recipe
from ..layout.scalars import Scalars
from ..layout.split_rows import RowTotals, TensorTotals
from ..layout.tables import Laid, build_buckets
from .decide import HostDecider, MakeDecider
from .guards import Guards
from .versions import VersionCounters


class Plan:
    """Everything of a step that does not change from step to step.

    Args:
        work: what to step.
        recipes: the recipe that each group asks for; those of the slots may be merged.
        decider: makes what decides the step on its device; None where the host decides.
        versions: the optimizer's, over all its plans.
        lay: lays a slot out.

    Attributes:
        taken: whether the last step was, as far as the host knows.
        begun: whether anything of it has been launched.
        on_device: whether a CUDA graph might capture it.
    """

    def __init__(
        self,
        work: PlanInputs,
        recipes: list[Recipe],
        decider: MakeDecider | None,
        versions: VersionCounters,
        lay: Callable[[Slot, Tensor | None], Laid],
    ) -> None:
        self.needs = work.needs
        self.taken = self.begun = False
        self._recipes, self._slots = recipes, work.slots
        scalars = Scalars()
        self._totals, self._norms = RowTotals(work.slots), TensorTotals(work.slots)
        capturable = decider is not None and work.needs.remote
        parts = self._totals.parts, lay, self._norms.parts
        self.buckets = build_buckets(work.slots, scalars, capturable, *parts)
        make = decider if decider is not None and self.buckets else HostDecider
        self.decider = make(work, scalars, self.buckets)
        self.on_device = any(
            bucket.key.device.type != "cpu" or bucket.key.executor.decider for bucket in self.buckets
        )
        self._written = versions.to_count(work.slots)
        self._guards = Guards(work.stepped, work.watched)
        self._addresses = self._guards.grad_pointers  # as the buckets have them
        # Of the gradients of slots all of whose other tensors are aligned: whether they are, too.
        self._alignable = np.zeros(len(work.slots), dtype=bool)
        for bucket in self.buckets:
            self._alignable[bucket.indices] = bucket.alignable
        self._aligned = self._alignment(self._addresses)

    def fits(self, asked: Asked, state: Mapping[Tensor, Any]) -> bool:
        """Whether the plan still fits; takes over gradients that moved.

        Args:
            asked: of the coming step.
            state: of the parameters that are watched.
        """
        if asked.recipes is not self._recipes:
            if asked.recipes != self._recipes:
                return False
            self._recipes = asked.recipes
        if asked.needs != self.needs or not self._guards.hold(asked.stepped, state):
            return False
        if self._guards.grad_pointers is self._addresses:
            return True
        addresses = self._guards.grad_pointers
        if not np.array_equal(self._alignment(addresses), self._aligned):
            return False  # better or worse aligned: other kernels
        for bucket in self.buckets:
            bucket.set_gradients(addresses)
        self._addresses = addresses
        return True

    @property
    def stale(self) -> bool:
        """Whether it describes parameters or states that are no more: it cannot hold again."""
        return self._guards.stale

    def parted_by(self, live: Set[Tensor]) -> bool:
        """Whether a step of these parameters parts some that are counted as one here."""
        return self.decider.parted_by([slot.param in live for slot in self._slots])

    def _alignment(self, addresses: Array) -> Array:
        aligned: Array = addresses[self._alignable] % 16 == 0
        return aligned

    def resume(self) -> None:
        """Takes up after steps of other plans."""
        self.decider.resume()

    def refresh(self, asked: Asked) -> None:
        """Takes over the options of the groups for the coming step."""
        self.begun = False
        self.decider.refresh(asked)

    def step(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> int:
        """Steps everything, or nothing; returns the number of kernel launches.

        Whatever can fail (memory, compiling, loading) comes before the first launch. If one is interrupted
        all the same, as by Ctrl-C, the plan must not be used again.

        Args:
            grad_scale: by which the gradients are too large.
            found_inf: not 0 if one of them is not finite: then the step is left out.
        """
        self.taken = self.decider.ready(grad_scale, found_inf)
        launches = 0
        if self.taken:
            self.begun = True
            launches = self.decider.decide()
            launches += self._launch()
            self.decider.advance()
            # Kernels write through addresses: tell autograd, as an in-place operation would.
            torch.autograd.graph.increment_version(self._written)
        return launches

    def _launch(self) -> int:
        """Every launch of it; collectives where rows, or tensors with norms, lie on several ranks."""
        split = [bucket for bucket in self.buckets if bucket.key.split]
        launches = 0
        if self._totals.centred:
            launches += sum(bucket.key.executor.step_bucket(bucket, "sums") for bucket in split)
            self._totals.add_up()
        if self._norms.parts:
            normed = [bucket for bucket in self.buckets if bucket.norms]
            launches += sum(bucket.key.executor.step_bucket(bucket, "squares") for bucket in normed)
            self._norms.add_up()
        launches += sum(bucket.key.executor.step_bucket(bucket) for bucket in self.buckets)
        if self._totals.projected:
            self._totals.add_up()
            launches += sum(bucket.key.executor.step_bucket(bucket, "finish") for bucket in split)
        return launches
