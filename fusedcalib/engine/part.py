"""A step of some parameters only: which they are, and why it may be that they need the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..executors.triton.resident import capturing
from ..hostmath import is_on
from ..layout.recipe import NOTHING, Asked, Recipe
from ..layout.shards import is_spread, place_of
from ..rule import Rule
from .checks import describe
from .slots import Live, everyone

Groups = Sequence[Mapping[str, Any]]


class Part:
    """Parameters that all have gradients, to be stepped without the others.

    Args:
        live: their places in the param groups, and themselves.

    Attributes:
        key: tells parts of an optimizer apart.
    """

    def __init__(self, live: list[Live]) -> None:
        self.live = live
        self._params = [each.param for each in live]
        self.key = tuple(map(id, self._params))

    def of(self, asked: Asked) -> Asked:
        """What the groups ask for, of these parameters."""
        return asked._replace(stepped=[{"params": self._params}])

    def watched(self, state: Mapping[Tensor, Any]) -> dict[Tensor, Any]:
        """The state of these parameters."""
        return {param: state[param] for param in self._params if param in state}


class Places:
    """Where parameters stand in the param groups: looked for again only where one stands there no more.

    Args:
        name: of the optimizer, for errors.
        rule: its update rule.
    """

    def __init__(self, name: str, rule: Rule) -> None:
        self._name, self._rule = name, rule
        self._known: dict[int, Live] = {}

    def part(self, groups: Groups, params: Iterable[Tensor]) -> tuple[Part, bool]:
        """Of some parameters, and whether all places are as they were.

        Raises:
            RuntimeError: one of them is in no param group that is stepped.
        """
        known, wanted = self._known, list(params)
        live = [known[id(param)] for param in wanted if id(param) in known]
        same = len(live) == len(wanted) and all(_stands(each, groups) for each in live)
        if not same:
            known = {id(each.param): each for each in everyone(groups, self._rule)}
            if any(id(param) not in known for param in wanted):
                raise RuntimeError(
                    f"{self._name}: a parameter whose gradient is released is in no param group any more; "
                    "remove() the gradient release and enable it again"
                )
            self._known, live = known, [known[id(param)] for param in wanted]
        return Part(live), same


def _stands(live: Live, groups: Groups) -> bool:
    """Whether a parameter still stands there."""
    group, place, param = live
    if group >= len(groups):
        return False
    params = groups[group]["params"]
    return place < len(params) and params[place] is param


def check_options(name: str, groups: Groups, asked: Asked) -> None:
    """Raises where an option needs all gradients, or a number that only a device knows.

    Raises:
        RuntimeError: names the option, its group and what to do instead.
    """
    if capturing():
        raise RuntimeError(
            f"{name}: gradient release cannot be captured in a CUDA graph: its numbers come from the "
            "host; remove() it before the capture"
        )
    if asked.needs == NOTHING:
        return
    if asked.needs.statistics:
        raise RuntimeError(
            f"{name}: gradient release steps parameters before it has all gradients, but track() measures "
            "whole steps; call track() without names"
        )
    for number, group in enumerate(groups):
        where = f"{name}: group {number}: gradient release steps parameters before it has all gradients, but"
        if is_on(group["max_grad_norm"]):
            raise RuntimeError(
                f"{where} max_grad_norm needs the norm of all; set max_grad_norm=None, and limit rows "
                "(max_row_norm) where weights must stay small"
            )
        if group["skip_nonfinite"]:
            raise RuntimeError(f"{where} skip_nonfinite looks at all; set skip_nonfinite=False")
        if group.get("capturable"):
            raise RuntimeError(f"{where} capturable=True counts all on the GPU; set capturable=False")
    raise RuntimeError(
        f"{name}: gradient release needs hyperparameters that the host knows, and one is a tensor on a "
        "device; make it a Python number or a tensor on the CPU"
    )


def check_rows(name: str, groups: Groups, live: Iterable[Live], recipes: Sequence[Recipe]) -> None:
    """Raises where a step of rows needs sums over ranks, which would be made amid a backward pass.

    Raises:
        RuntimeError: names the parameter and what to do instead.
    """
    for group, index, param in live:
        by_rows = recipes[group].flags.by_rows and recipes[group].for_tensor(param).flags.by_rows
        if by_rows and is_spread(param) and place_of(param, recipes[group].laid_by(param)).across:
            owner = describe(name, groups, group, index)
            raise RuntimeError(
                f"{owner}: its rows lie on several ranks, and gradient release "
                "cannot add them up within a backward pass; set centralize=False and max_row_norm=None, or "
                "divide it by rows (dimension 0); step what is one row by a rule that keeps no state of rows"
            )
