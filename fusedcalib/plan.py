"""A step laid out once: its launches, and what is refreshed of them from step to step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .control import HostControl, Work
from .recipe import Demand, Recipe
from .row_totals import RowTotals
from .states import Versions
from .tables import Scalars, build_buckets
from .watch import Watch


class Plan:
    """Everything of a step that does not change from step to step.

    Args:
        work: what to step.
        asked: the recipe that each group asks for; those of the slots may be merged.
        on_device: whether the step is decided there; else on the host.
        versions: the optimizer's, over all its plans.
    """

    def __init__(self, work: Work, asked: list[Recipe], on_device: bool, versions: Versions) -> None:
        self.demand = work.demand
        self.taken = False  # the last step, as far as the host knows
        self._asked = asked
        scalars = Scalars()
        self._totals = RowTotals(work.slots)
        capturable = on_device and work.demand.remote
        self.buckets = build_buckets(work.slots, scalars, capturable, self._totals.parts)
        self.control: Any
        if on_device and self.buckets:
            from .gpu_control import DeviceControl

            self.control = DeviceControl(work, scalars, self.buckets)
        else:
            self.control = HostControl(work, scalars, self.buckets)
        self._written = versions.to_count(work.slots)
        self._watch = Watch(work.groups, work.state)

    def holds(
        self, asked: list[Recipe], demand: Demand, groups: list[dict[str, Any]], state: dict[Tensor, Any]
    ) -> bool:
        """Whether the plan still fits; takes over gradients that moved."""
        before = self._watch.grad_pointers
        if asked != self._asked or demand != self.demand or not self._watch.holds(groups, state):
            return False
        if self._watch.grad_pointers == before:
            return True
        addresses = np.array(self._watch.grad_pointers, dtype=np.int64)
        return all(bucket.set_gradients(addresses) for bucket in self.buckets)

    def refresh(self, groups: list[dict[str, Any]]) -> None:
        """Takes over the options of the groups for the coming step."""
        self.control.refresh(groups)

    def run(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> int:
        """Steps everything, or nothing; returns the number of kernel launches.

        Args:
            grad_scale: by which the gradients are too large.
            found_inf: not 0 if one of them is not finite: then the step is left out.
        """
        launches: int
        self.taken, launches = self.control.decide(grad_scale, found_inf)
        if self.taken:
            launches += self._step()
            self.control.advance()
            # Kernels write through addresses: tell autograd, as an in-place operation would.
            torch.autograd.graph.increment_version(self._written)
        return launches

    def _step(self) -> int:
        """Every launch of it; collectives where rows lie on several ranks."""
        split = [bucket for bucket in self.buckets if bucket.key.split]
        launches = 0
        if self._totals.centred:
            launches += sum(bucket.key.executor.run(bucket, "sums") for bucket in split)
            self._totals.add_up()
        launches += sum(bucket.key.executor.run(bucket) for bucket in self.buckets)
        if self._totals.projected:
            self._totals.add_up()
            launches += sum(bucket.key.executor.run(bucket, "finish") for bucket in split)
        return launches
