"""What the param groups of an optimizer ask for, looked at again only where one of their values is another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from .numbers import is_remote
from .recipe import Demand, Recipe, Rule, demand_of, recipe_of


class Asked:
    """The recipes and the demand of a step.

    Args:
        rule: the optimizer's.
        check: raises where a group cannot be stepped with its options.

    Attributes:
        groups: the param groups.
        recipes: what each asks for; the same list until one asks for another.
        demand: what the step is asked for besides.
        versions: of each group, which changes with its values.
    """

    def __init__(self, rule: Rule, check: Callable[[dict[str, Any]], None]) -> None:
        self._rule, self._check = rule, check
        self._seen: list[_Seen | None] = []
        self._scaling: tuple[bool, bool] | None = None
        self.groups: Sequence[dict[str, Any]] = []
        self.recipes: list[Recipe] = []
        self.demand = Demand()
        self.versions: list[int] = []

    def look(
        self, groups: Sequence[dict[str, Any]], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Asked:
        """Brings it up to date. An option that cannot be raises, and is asked for again at the next step."""
        seen = self._seen if len(self._seen) == len(groups) else [None] * len(groups)
        changed = [
            i for i, (group, s) in enumerate(zip(groups, seen, strict=True)) if s is None or not s.holds(group)
        ]
        scaling = (grad_scale is None, found_inf is None)
        if not changed and scaling == self._scaling:
            return self
        self._scaling = None  # until all of it is known
        for i in changed:
            self._check(groups[i])
        demand = demand_of(groups, grad_scale, found_inf)
        again = changed if seen is self._seen and demand == self.demand else range(len(groups))
        recipes = self.recipes if seen is self._seen else [None] * len(groups)
        recipes = [*recipes]
        for i in again:
            recipes[i] = recipe_of(self._rule, groups[i], demand)
        if recipes != self.recipes:
            self.recipes = recipes
        if seen is not self._seen:
            self._seen, self.versions = seen, [0] * len(groups)
        for i in changed:
            self._seen[i] = _Seen(groups[i])
            self.versions[i] += 1
        self.groups, self.demand, self._scaling = groups, demand, scaling
        return self


class _Seen:
    """The values of a group as they were."""

    def __init__(self, group: dict[str, Any]) -> None:
        self._keys, self._values = [*group], [*group.values()]
        noise = group.get("noise")
        self._noise = {**noise} if isinstance(noise, dict) else noise
        self._lists = [
            (value, tuple(value))
            for key, value in group.items()
            if isinstance(value, list) and key not in ("params", "param_names")
        ]
        numbers = [*self._values, *(x for v in self._values if isinstance(v, (tuple, list)) and v is not group["params"] for x in v)]
        # A tensor on the host may change where it lies.
        self._steady = not any(isinstance(x, Tensor) and not is_remote(x) for x in numbers)

    def holds(self, group: dict[str, Any]) -> bool:
        """Whether they are the same. One that is changed in place is looked for where users do so."""
        return (
            self._steady
            and [*group] == self._keys
            and all(map(is_, group.values(), self._values))
            and group.get("noise") == self._noise
            and all(len(now) == len(then) and all(map(is_, now, then)) for now, then in self._lists)
        )
