"""What an optimizer is made of: a `Rule` is written, a `Recipe` is compiled, scalars are passed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

Group = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Rule:
    """An update rule: its device maths and the host numbers it needs.

    Attributes:
        update: device function `(p, g, state, h, VARIANT) -> (direction, new state)` on loaded values.
            It never sees the learning rate, decay, centring or how values are stored.
        states: the state tensors of each variant, by torch.optim's names; zeros when new.
        variant: the variant that a param group asks for.
        scalars: `(group, step) -> (step size, *h)`, in double; `step` counts from 1. The new parameter is
            `p - step_size * direction`.
        counts: whether `step` is kept per parameter in the state. Where it is not, `step` is 1 for a
            parameter whose state is new and 2 afterwards.
    """

    update: Any
    states: Mapping[str, tuple[str, ...]]
    variant: Callable[[Group], str]
    scalars: Callable[[Group, float], tuple[float, ...]]
    counts: bool = True


@dataclass(frozen=True)
class Recipe:
    """What is compiled for a param group: a specialisation each. Holds no hyperparameter."""

    rule: Rule
    variant: str
    maximize: bool
    decay: str  # "none" | "coupled" | "decoupled"
    centralize: str  # "none" | "gradient" | "update"
    min_ndim: int  # fewest dimensions of a tensor that is centred

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state tensors, in the order the rule's device function takes them."""
        return self.rule.states[self.variant]

    def for_tensor(self, ndim: int, columns: int) -> Recipe:
        """What is compiled for one tensor: vectors, scalars and rows of one element are never centred."""
        centred = ndim >= max(2, self.min_ndim) and columns >= 2
        return replace(self, centralize=self.centralize if centred else "none", min_ndim=2)


def recipe_of(rule: Rule, group: Group) -> Recipe:
    """The recipe that a param group asks for."""
    kind = "decoupled" if group.get("decoupled_weight_decay") else "coupled"
    centralize = group["centralize"]
    return Recipe(
        rule=rule,
        variant=rule.variant(group),
        maximize=bool(group["maximize"]),
        decay=kind if group["weight_decay"] != 0 else "none",
        centralize="gradient" if centralize is True else centralize or "none",
        min_ndim=group["centralize_min_ndim"],
    )


def merged(recipes: list[Recipe]) -> list[Recipe]:
    """One recipe for groups that differ only in having a decay: no decay is exact, a launch is not free."""
    decaying = {replace(r, decay="none"): r for r in recipes if r.decay != "none"}
    return [decaying.get(r, r) for r in recipes]


def scalars_of(recipe: Recipe, group: Group, step: float) -> tuple[float, ...]:
    """The row of scalars of a group at a step, in double: decay, step size, then the rule's own."""
    numbers = _Numbers(group)
    decay = numbers["weight_decay"]
    if recipe.decay == "decoupled":
        decay = 1 - numbers["lr"] * decay
    return (decay, *recipe.rule.scalars(numbers, step))


class _Numbers(Mapping[str, Any]):
    """A param group whose hyperparameters read as Python numbers: lr and betas may be 0-dim tensors."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def __getitem__(self, key: str) -> Any:
        value = self._group[key]
        if isinstance(value, (tuple, list)):
            return tuple(map(_number, value))
        return _number(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(self._group)


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
