"""The scalars of a step, in double: written once over numbers (hostmath.py), also recorded for a device.

A rule's `scalars` and `row_of` here are plain Python. Of numbers they make the row of scalars of a param
group. Of recorded ones they make a `Tape`: the same operations, which the last program of kernels/decide.py
takes on the device, where step, gradient norm and loss scale are known without waiting.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ..hostmath import Group, Number, Recorded, fp32, is_remote, number_of, where
from ..kernels.stages import Numbers
from ..kernels.tape import CODES
from ..noise import parsed
from ..options import NONE_IS
from ..rule import Rule
from .recipe import Recipe

Array = np.ndarray[Any, np.dtype[Any]]
DECAYS = {"none": 0.0, "coupled": 0.0, "trusted": 0.0, "decoupled": 1.0, "proximal": 2.0}


class StepFacts(NamedTuple):
    """What a row of scalars depends on besides the param group."""

    step: Number  # from 1
    product: Number = 1.0  # of the rule, before this step
    norm: Number = 0.0  # of all gradients
    scale: Number = 1.0  # of the loss, by which gradients are divided
    skip: Number = 0.0  # whether the step is left out


def row_of(rule: Rule, numbers: Group, now: StepFacts) -> tuple[tuple[Number, ...], Number]:
    """The row of scalars as kernels/stages.py reads it, and the rule's new product."""
    product = now.product
    if rule.product:
        product = fp32(product * fp32(rule.product[1](numbers, now.step)))  # rounded as torch.optim's
        step_size, *own = rule.scalars(numbers, now.step, product)
    else:
        step_size, *own = rule.scalars(numbers, now.step)
    moves = step_size != 0
    decay, kind = numbers["weight_decay"], numbers["decay"]
    rate = where(moves, numbers["lr"], 0.0) * decay
    kept = where(kind == DECAYS["decoupled"], 1 - rate, where(kind == 0, decay, 1 / (1 + rate)))
    longest = where(moves, numbers["max_row_norm"], math.inf)
    scale, step_power, lr_power, always = numbers["noise"]
    sigma = scale * now.step**step_power * numbers["lr"] ** lr_power
    sigma = where(always + moves > 0, sigma, 0.0)
    limit = numbers["max_grad_norm"]
    clip = limit / (now.norm + 1e-6)
    factor = where(limit > 0, where(clip > 1, 1.0, clip), 1.0) / now.scale
    *shared, own = Numbers(
        decay=kept,
        step_size=step_size,
        l1=numbers["l1"],
        longest=longest,
        sigma=sigma,
        step=now.step,
        factor=factor,
        share=1 - numbers["ema_decay"],
        skip=now.skip,
        own=tuple(own),
    )
    return (*shared, *own), product


def entries_of(recipe: Recipe, group: Group) -> dict[str, Any]:
    """A param group, and what its recipe says of it, with what is meant for what is None."""
    entries = {**group, "decay": DECAYS[recipe.flags.decay], "noise": parsed(group["noise"]).schedule}
    for key, meaning in NONE_IS.items():
        if entries.get(key, 0) is None:
            entries[key] = meaning
    return entries


def numbers_of(recipe: Recipe, group: Group) -> dict[str, Any]:
    """The entries as Python numbers: hyperparameters may be 0-dim tensors, which are waited for."""
    entries = entries_of(recipe, group)
    if Tensor in map(type, entries.values()) or Tensor in map(type, entries.get("betas", ())):
        return {k: tuple(map(number_of, v)) if type(v) is tuple else number_of(v) for k, v in entries.items()}
    return entries


def scalars_of(recipe: Recipe, group: Group, step: float, product: float = 1.0) -> tuple[float, ...]:
    """The row of scalars of a group at a step that is neither clipped nor skipped."""
    return row_of(recipe.rule, numbers_of(recipe, group), StepFacts(step, product))[0]


# -- recorded ---------------------------------------------------------------------------------


class Tape(NamedTuple):
    """A row of scalars as straight-line code over a list of numbers, which grows by one an operation.

    The list begins with a `StepFacts`, then the leaves.
    """

    leaves: tuple[Any, ...]  # (key of a group, index in its value), or a constant
    code: tuple[int, ...]  # of each operation: its code, the places of three operands
    outputs: tuple[int, ...]  # places of the row of scalars and, last, of the product


@cache
def tape_of(rule: Rule, shape: tuple[tuple[str, int], ...]) -> Tape:
    """The tape of a rule, for groups whose values have these lengths (0: a number)."""
    return _linear(rule, dict(shape))


def shape_of(group: Group) -> tuple[tuple[str, int], ...]:
    """What of a group its tape depends on: the lengths of its tuples."""
    return tuple(
        (key, len(v)) for key, v in group.items() if isinstance(v, (tuple, list)) and key != "params"
    )


def _linear(rule: Rule, lengths: Mapping[str, int]) -> Tape:
    situation = StepFacts(*(Recorded("situation", (i,)) for i in range(len(StepFacts._fields))))
    row, product = row_of(rule, _Leaves(lengths), situation)
    leaves: dict[Any, int] = {}
    order: dict[Recorded, None] = {}

    def visit(x: Any) -> None:
        if not isinstance(x, Recorded):
            leaves.setdefault(float(x), len(leaves))
        elif x.name == "leaf":
            leaves.setdefault(x.operands, len(leaves))
        elif x.name != "situation" and x not in order:
            for operand in x.operands:
                visit(operand)
            order[x] = None

    wanted = (*row, product)
    for x in wanted:
        visit(x)
    places: dict[Recorded, int] = {}

    def place(x: Any) -> int:
        if not isinstance(x, Recorded):
            return len(situation) + leaves[float(x)]
        if x.name == "leaf":
            return len(situation) + leaves[x.operands]
        return cast(int, x.operands[0]) if x.name == "situation" else places[x]

    code: list[int] = []
    for x in order:
        operands = [place(operand) for operand in x.operands]
        code += [CODES[x.name], *operands, *[0] * (3 - len(operands))]
        places[x] = len(situation) + len(leaves) + len(places)
    return Tape(tuple(leaves), tuple(code), tuple(map(place, wanted)))


class _Leaves(Group):
    """A group all of whose numbers are leaves."""

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self._lengths = {**lengths, "noise": 4}

    def __getitem__(self, key: str) -> Any:
        if key in self._lengths:
            return tuple(Recorded("leaf", (key, i)) for i in range(self._lengths[key]))
        return Recorded("leaf", (key, 0))

    def __iter__(self) -> Iterator[str]:
        return iter(self._lengths)

    def __len__(self) -> int:
        return len(self._lengths)


def leaves_of(tape: Tape, recipe: Recipe, group: Group) -> list[float | Tensor]:
    """The leaves of a group: numbers, and 0-dim tensors where they lie on a device."""
    entries = entries_of(recipe, group)
    found: list[float | Tensor] = []
    for leaf in tape.leaves:
        if not isinstance(leaf, tuple):
            found.append(leaf)
            continue
        value = entries[leaf[0]]
        value = value[leaf[1]] if isinstance(value, (tuple, list)) else value
        if not is_remote(value):
            value = float(number_of(value))
        elif value.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{leaf[0]} on a device must be fp32 or fp64, not {value.dtype}")
        found.append(value)
    return found


# -- of a step ---------------------------------------------------------------------------------

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class Scalars:
    """The rows of scalars of a step in double, and as buckets read them: in their type."""

    def __init__(self) -> None:
        self.rows: Sequence[Sequence[float]] = [()]
        self.resident: dict[torch.dtype, Tensor] = {}  # made on the device, where the step is decided there
        self._casts: dict[torch.dtype, Array] = {}

    def set(self, values: Sequence[Sequence[float]]) -> None:
        """Takes over the scalars of a step, a row each."""
        self.rows = values
        self._casts.clear()

    @property
    def count(self) -> int:
        """Scalars in a row."""
        return len(self.rows[0])

    def of(self, compute: torch.dtype) -> Array:
        """Rows in the type of the arithmetic."""
        if compute not in self._casts:
            self._casts[compute] = np.array(self.rows, dtype=_NUMPY[compute])
        return self._casts[compute]
