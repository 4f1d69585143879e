"""What an optimizer is made of: a `Rule` is written, a `Recipe` is compiled, scalars are passed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .kernels.stages import Flags
from .noise import deviation, stage_of

Group = Mapping[str, Any]


def decay_of(group: Group) -> str:
    """Decay of the gradient, or of the parameter where that is asked for."""
    return "decoupled" if group["decoupled_weight_decay"] else "coupled"


def epsilons(group: Group) -> tuple[float, float]:
    """What is added under the root, and what to it: `eps` is one of them, the other exactly nothing."""
    return (group["eps"], 0.0) if group["eps_inside_sqrt"] else (0.0, group["eps"])


@dataclass(frozen=True, eq=False)
class Rule:
    """An update rule: its device maths and the host numbers it needs.

    Attributes:
        update: device function `(p, g, state, h, VARIANT) -> (direction, new state)` on loaded values.
            It never sees the learning rate, decay, centring or how values are stored.
        scalars: `(group, step) -> (step size, *h)`, in double; `step` counts from 1. The new parameter is
            `p - step_size * direction`. A step size of zero is no step: then nothing decays either.
        states: the state tensors of each variant, by torch.optim's names.
        variant: the variant that a param group asks for.
        counts: whether `step` is kept per parameter in the state. Where it is not, `step` is 1 for a
            parameter whose state is new and 2 afterwards.
        starts: group keys that hold the initial value of a state; others start at zero.
        product: a 0-dim state that starts at 1, and the factor `(group, step)` by which a step multiplies
            it; `scalars` gets its new value as a third argument.
        decay: how `weight_decay` acts in a param group: "coupled", "decoupled" or "proximal".
        extras: options of a param group, with defaults, that torch.optim's class of the name has not.
    """

    update: Any
    scalars: Callable[..., tuple[float, ...]]
    states: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"plain": ()})
    variant: Callable[[Group], str] = lambda group: "plain"
    counts: bool = True
    starts: Mapping[str, str] = field(default_factory=dict)
    product: tuple[str, Callable[[Group, float], float]] | None = None
    decay: Callable[[Group], str] = lambda group: "coupled"
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What is compiled for a param group: a specialisation each. Holds no hyperparameter."""

    rule: Rule
    flags: Flags
    min_ndim: int = 2  # fewest dimensions of a tensor that is centred
    seed: int = 0  # of the noise; not compiled, but a plan is made for one

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state tensors, in the order the rule's device function takes them."""
        return self.rule.states[self.flags.variant]

    @property
    def counts(self) -> bool:
        """Whether a parameter's state has its steps: the rule wants them, or the noise."""
        return self.rule.counts or self.flags.noise != "none"

    def for_tensor(self, ndim: int, columns: int) -> Recipe:
        """What is compiled for one tensor: vectors and scalars have no rows, rows of one element no mean."""
        centred = ndim >= max(2, self.min_ndim) and columns >= 2
        centralize = self.flags.centralize if centred else "none"
        flags = self.flags._replace(centralize=centralize, project=self.flags.project and ndim >= 2)
        return Recipe(self.rule, flags)


def recipe_of(rule: Rule, group: Group) -> Recipe:
    """The recipe that a param group asks for."""
    centralize = group["centralize"]
    flags = Flags(
        variant=rule.variant(group),
        maximize=bool(group["maximize"]),
        decay=rule.decay(group) if group["weight_decay"] != 0 else "none",
        l1=group["l1"] != 0,
        centralize="gradient" if centralize is True else centralize or "none",
        project=group["max_row_norm"] not in (None, math.inf),
        noise=stage_of(group["noise"]),
    )
    return Recipe(rule, flags, group["centralize_min_ndim"], group["seed"])


def merged(recipes: list[Recipe]) -> list[Recipe]:
    """One recipe for groups that differ in what a number can switch off: that is exact, a launch not free."""
    alike: dict[Recipe, list[Flags]] = {}
    for r in recipes:
        alike.setdefault(_bare(r), []).append(r.flags)
    return [replace(r, flags=_joined(r.flags, alike[_bare(r)])) for r in recipes]


def _bare(recipe: Recipe) -> Recipe:
    return replace(recipe, flags=recipe.flags._replace(decay="none", l1=False, project=False))


def _joined(own: Flags, others: list[Flags]) -> Flags:
    """A group's flags with all that the others have switched on."""
    decays = [flags.decay for flags in (own, *others) if flags.decay != "none"]
    return own._replace(
        decay=decays[0] if decays else "none",
        l1=any(flags.l1 for flags in others),
        project=any(flags.project for flags in others),
    )


def scalars_of(recipe: Recipe, group: Group, step: float, *product: float) -> tuple[float, ...]:
    """The row of scalars of a group at a step, in double, as kernels/stages.py reads it."""
    numbers = Numbers(group)
    step_size, *own = recipe.rule.scalars(numbers, step, *product)
    decay, norm = numbers["weight_decay"], numbers["max_row_norm"]
    if recipe.flags.decay in ("decoupled", "proximal"):
        decay *= numbers["lr"] if step_size else 0.0
        decay = 1 - decay if recipe.flags.decay == "decoupled" else 1 / (1 + decay)
    unlimited = norm is None or not step_size
    norm = math.inf if unlimited else norm
    sigma = deviation(group["noise"], numbers["lr"], step, step_size != 0)
    return (decay, step_size, numbers["l1"], norm, sigma, step, *own)


class Numbers(Mapping[str, Any]):
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
