"""The plans that an optimizer keeps: of a few live sets and options, and what they have in common."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ..layout.buckets import Array
from ..layout.recipe import Asked, Recipe, merged
from .plan import Plan
from .slots import Shelf

PARTS = 256  # plans of steps of some parameters only: as many buckets of a backward pass
KEPT = 8  # plans, of as many live sets or options: mixtures of experts, layers that are not always used


class Plans:
    """Those of one optimizer, since something made all of them invalid.

    Attributes:
        shelf: slots that are laid out.
    """

    def __init__(self) -> None:
        self.shelf = Shelf()
        self._kept: list[Plan] = []  # the latest first
        self._parts: dict[tuple[int, ...], Plan] = {}  # the latest last
        self._live_sets: list[Array] = []
        self._compiled: list[Recipe] = []
        self._params: list[int] = []

    def fitting(self, asked: Asked, state: Mapping[Tensor, Any], known: Plan | None) -> Plan | None:
        """The plan for the parameters that have gradients now, and what is asked for, if one is kept.

        Args:
            asked, state: of the coming step.
            known: a plan that does not fit.
        """
        for plan in self._kept:
            if plan is not known and plan.fits(asked, state):
                self._kept.remove(plan)
                self._kept.insert(0, plan)
                return plan
        return None

    def of_part(self, key: tuple[int, ...]) -> Plan | None:
        """The plan of a step of some parameters only, if one is kept; it may not fit any more."""
        plan = self._parts.pop(key, None)
        if plan is not None:
            self._parts[key] = plan
        return plan

    @property
    def stale(self) -> bool:
        """Whether one describes what is no more, and would keep it alive."""
        return any(plan.stale for plan in (*self._kept, *self._parts.values()))

    def keep(self, plan: Plan, part: tuple[int, ...] | None = None) -> None:
        """Takes one more in, of all parameters or of a part; the one that was used longest ago goes."""
        if part is None:
            self._kept = [plan, *self._kept[: KEPT - 1]]
            return
        self._parts[part] = plan
        if len(self._parts) > PARTS:
            del self._parts[next(iter(self._parts))]

    def compiled(
        self, recipes: list[Recipe], groups: Sequence[Mapping[str, Any]], skips: bool
    ) -> list[Recipe]:
        """What is compiled for each group; the same objects where it is the same as before."""
        made = [replace(r, flags=r.flags._replace(skips=skips)) for r in merged(recipes)]
        params = [id(p) for group in groups for p in group["params"]]
        if made != self._compiled or params != self._params:  # noise goes by place and name
            self._compiled, self._params, self.shelf = made, params, Shelf()
        return self._compiled

    def kin(
        self,
        live: Iterable[Tensor],
        groups: Sequence[Mapping[str, Any]],
        captured: Iterable[object],
        name: str,
    ) -> Array:
        """Of each live parameter a number, shared by those that every live set so far has all of, or none.

        Args:
            live: the parameters, in the order of the groups.
            groups: the param groups.
            captured: plans that CUDA graphs replay, of which a new live set may part what they count as one.
            name: of the optimizer, for the warning that says so.
        """
        here = set(live)
        mask = np.array([p in here for group in groups for p in group["params"]], dtype=bool)
        known = [m for m in self._live_sets if len(m) == len(mask)]
        if not any(np.array_equal(m, mask) for m in known):
            known = [mask, *known[: 2 * KEPT - 1]]
            # A plan that counts parameters together which this one parts would go on with wrong numbers.
            self._kept = [plan for plan in self._kept if not plan.parted_by(here)]
            if any(isinstance(plan, Plan) and plan.parted_by(here) for plan in captured):
                warnings.warn(
                    f"{name}: a CUDA graph has captured a step of parameters of which this one leaves some "
                    "out: the graph counts them as one, and replays would go on with wrong numbers; capture "
                    "it again, after a step of each set of parameters",
                    stacklevel=2,
                )
        self._live_sets = known
        kinds = np.unique(np.stack(known), axis=1, return_inverse=True)[1].reshape(-1)
        of_live: Array = kinds[mask]
        return of_live
