"""What the param groups of an optimizer ask for, looked at again only where a value is another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from ..hostmath import is_remote
from ..rule import Rule
from .recipe import Needs, Recipe, needs_of, recipe_of


class Asked:
    """The recipes and the needs of a step.

    Args:
        rule: the optimizer's.

    Attributes:
        groups: the param groups.
        recipes: what each asks for; the same list until one asks for another.
        needs: what the step is asked for besides.
        versions: of each group, which changes with its values.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._seen: list[_Seen] = []
        self._scaling: tuple[bool, bool] | None = None
        self.groups: Sequence[dict[str, Any]] = []
        self.recipes: list[Recipe] = []
        self.needs = Needs()
        self.versions: list[int] = []

    def look(
        self,
        groups: Sequence[dict[str, Any]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        check: Callable[[dict[str, Any]], None],
    ) -> Asked:
        """Brings it up to date.

        Args:
            groups: the param groups.
            grad_scale, found_inf: what a GradScaler hands over.
            check: raises where a group cannot be stepped with its options; then asked again the next time.
        """
        known = len(self._seen) == len(groups)
        changed = [i for i, group in enumerate(groups) if not (known and self._seen[i].holds(group))]
        self.groups, scaling = groups, (grad_scale is None, found_inf is None)
        if not changed and scaling == self._scaling:
            return self
        self._scaling = None  # until all of it is known
        for i in changed:
            check(groups[i])
        needs = needs_of(groups, grad_scale, found_inf)
        kept = {} if not known or needs != self.needs else dict(enumerate(self.recipes))
        for i in changed:
            kept.pop(i, None)
        recipes = [kept.get(i) or recipe_of(self._rule, group, needs) for i, group in enumerate(groups)]
        if recipes != self.recipes:
            self.recipes = recipes
        self._seen = [_Seen(group) if i in changed else self._seen[i] for i, group in enumerate(groups)]
        versions = self.versions if known else [max(self.versions, default=0)] * len(groups)
        self.versions = [version + (i in changed) for i, version in enumerate(versions)]
        self.needs, self._scaling = needs, scaling
        return self


NAMES = ("params", "param_names")  # keys of a group whose lists are not options


class _Seen:
    """The values of a group as they were."""

    def __init__(self, group: dict[str, Any]) -> None:
        self._keys, self._values = [*group], [*group.values()]
        noise = group.get("noise")
        self._noise = {**noise} if isinstance(noise, dict) else None
        self._lists = [
            (value, tuple(value))
            for key, value in group.items()
            if isinstance(value, list) and key not in NAMES
        ]
        tuples = [
            value for key, value in group.items() if isinstance(value, (tuple, list)) and key not in NAMES
        ]
        numbers = [*self._values, *(x for value in tuples for x in value), *(self._noise or {}).values()]
        # A tensor on the host may change where it lies.
        self._steady = not any(isinstance(x, Tensor) and not is_remote(x) for x in numbers)

    def holds(self, group: dict[str, Any]) -> bool:
        """Whether they are the same. One that is changed in place is looked for where users do so."""
        return (
            self._steady
            and [*group] == self._keys
            and all(map(is_, group.values(), self._values))
            and (self._noise is None or group["noise"] == self._noise)
            and all(len(now) == len(then) and all(map(is_, now, then)) for now, then in self._lists)
        )
