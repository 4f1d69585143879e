"""What a plan is made from, and what is known of it on the host and on a device alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .buckets import Array, Bucket, Slot
from .counts import Counters
from .recipe import Needs, Recipe


@dataclass(frozen=True)
class PlanInputs:
    """What a plan is made for.

    Attributes:
        slots: the parameters to step.
        fresh: of each, whether its state is new.
        groups, state: the optimizer's.
        stepped: the groups whose parameters are stepped, or one of some parameters only.
        watched: the state of their parameters: a plan is made anew where it changes.
        recipes: what is compiled for each group.
        needs: what the step is asked for besides.
        report, counters: the optimizer's, over all its plans.
        kin: of each slot, a number that it shares with those that are in every live set with it.
    """

    slots: list[Slot]
    fresh: list[bool]
    groups: Sequence[dict[str, Any]]
    stepped: Sequence[dict[str, Any]]
    watched: Mapping[Tensor, Any]
    state: MutableMapping[Tensor, Any]
    recipes: list[Recipe]
    needs: Needs
    report: StepReport
    counters: Counters
    kin: Array


class StepReport:
    """What the last step found: the norm of the gradients, and how many steps were left out so far."""

    def __init__(self) -> None:
        self._reports: dict[torch.device, Tensor] = {}
        self._norm: tuple[Tensor, torch.dtype] | None = None

    def on(self, device: torch.device, measured: torch.dtype | None) -> Tensor:
        """fp64 [2] on the device, for good: the norm (to be read in that dtype, if any) and the count."""
        if device not in self._reports:
            with torch.inference_mode(False):
                self._reports[device] = torch.zeros(2, dtype=torch.float64, device=device)
        report = self._reports[device]
        self._norm = (report, measured) if measured else None
        return report

    def norm(self) -> Tensor | None:
        """The norm, if the last plan measures it."""
        return self._norm and self._norm[0][0].to(self._norm[1], copy=True)

    def skipped(self) -> Tensor:
        """The count."""
        counts = [report[1] for report in self._reports.values()] or [torch.zeros(())]
        return torch.stack([count.to(counts[-1].device) for count in counts]).sum().to(torch.int64)


def norm_dtype(buckets: Sequence[Bucket]) -> torch.dtype:
    """Of the norm of all gradients: fp32 unless parameters are fp64."""
    return torch.float64 if any(bucket.compute == torch.float64 for bucket in buckets) else torch.float32


def meshes_of(work: PlanInputs) -> list[Any]:
    """The meshes over which parameters are spread, in the order of those: also of parts without elements."""
    return list(dict.fromkeys(slot.place.mesh for slot in work.slots if slot.place))


def entries_of_slots(work: PlanInputs) -> list[dict[str, Any]]:
    """The state of each slot that keeps a count; {} of others."""
    return [work.state[slot.param] if slot.recipe.counts else {} for slot in work.slots]


def begun(work: PlanInputs) -> tuple[Array, Array]:
    """Steps taken by slots that keep no count, of which only the first is told; where counting ends."""
    taken = np.array([float(not new) for new in work.fresh], dtype=np.float32)
    most = np.array([math.inf if slot.recipe.counts else 1.0 for slot in work.slots], dtype=np.float32)
    return taken, most


def product_of(work: PlanInputs) -> str | None:
    """The state that is a running product, if the rule keeps one."""
    product = work.slots[0].recipe.rule.product if work.slots else None
    return product and product[0]
