"""What the author of an optimizer writes: a `Rule`, in terms of the maths of its paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .hostmath import Group, is_on


def decay_of(group: Group) -> str:
    """Decay of the gradient, or of the parameter where that is asked for."""
    return "decoupled" if group["decoupled_weight_decay"] else "coupled"


@dataclass(frozen=True, eq=False)
class Trust:
    """A factor on a step by Euclidean norms of whole tensors, as the trust ratio of LAMB.

    Attributes:
        squares: device function `(p, g, direction, state, h, VARIANT) -> values`: a tuple, whose squares are
            added up over the whole tensor. `g` is centred, `state` new.
        factor: device function `(sums, count, h, VARIANT) -> factor`, of these sums of squares in fp64 and
            the number of elements of the tensor.
        sums: how many there are.
        reads: what of a slot has to be read for it: "param", "grad", names of states.
        scales: what is multiplied: "step", the step size, or "gradient", before the rule sees it.
        adapts: whether a param group wants it.
    """

    squares: Any
    factor: Any
    sums: int
    reads: tuple[str, ...]
    scales: str = "step"
    adapts: Callable[[Group], bool] = lambda group: True


def decays_or_always(group: Group) -> bool:
    """Whether a group has weight decay, or wants a factor without it: for `Trust.adapts`."""
    return is_on(group["weight_decay"]) or bool(group["always_adapt"])


@dataclass(frozen=True, eq=False)
class Rule:
    """An update rule: its device maths and the host numbers it needs.

    Attributes:
        update: device function `(p, g, state, h, VARIANT) -> (direction, new state)` on loaded values.
            It never sees the learning rate, decay, centring or how values are stored.
        scalars: `(group, step) -> (step size, *h)`, in double; `step` counts from 1. The new parameter is
            `p - step_size * direction`. A step size of zero is no step: then nothing decays either. One
            formula for all variants, without `if`: see hostmath.py.
        states: the state tensors of each variant, by torch.optim's names.
        variant: the variant that a param group asks for.
        counts: whether `step` is kept per parameter in the state. Where it is not, `step` is 1 for a
            parameter whose state is new and 2 afterwards.
        nonnegative: the states that cannot be negative: in bytes they have a code of their own.
        wide: states that bytes are too coarse for. A variant that has one keeps none of its states in bytes.
        row_state: a state that has a number for each row (one for vectors): the average of the mean of the
            squares of the gradient over it. `update` is handed its new value as the last of its states, and
            does not return it; the first of `h` are the weights of the old and the new one. It is in fp32
            (fp64).
        starts: group keys that hold the initial value of a state; others start at zero.
        product: a 0-dim state that starts at 1, and the factor `(group, step)` by which a step multiplies
            it; `scalars` gets its new value as a third argument.
        decay: how `weight_decay` acts in a param group: "coupled", "decoupled", "proximal", or "trusted":
            added to what `trust` multiplies, to a gradient after its norm is taken, to a direction before.
        extras: options of a param group, with defaults, that torch.optim's class of the name has not.
        check: raises ValueError where one of those is out of range.
        trust: a factor by norms of the whole tensor.
        steps: whether it steps the parameters of a group; others are left to the optimizer.
        still: variants that only bring their states up to date: they keep no count, and leave the parameter
            to a second step by another rule.
    """

    update: Any
    scalars: Callable[..., tuple[float, ...]]
    states: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"plain": ()})
    variant: Callable[[Group], str] = lambda group: "plain"
    counts: bool = True
    nonnegative: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()
    row_state: str | None = None
    starts: Mapping[str, str] = field(default_factory=dict)
    product: tuple[str, Callable[[Group, float], float]] | None = None
    decay: Callable[[Group], str] = lambda group: "coupled"
    extras: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Group], None] = lambda group: None
    trust: Trust | None = None
    steps: Callable[[Group], bool] = lambda group: True
    still: frozenset[str] = frozenset()
