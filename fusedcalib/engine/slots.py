"""Slots laid out once, for every plan that has them: another set of live parameters costs little then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from ..layout.buckets import Executor, Key, Slot
from ..layout.recipe import Recipe
from ..layout.shards import is_spread, local_of, place_of
from ..layout.tables import Laid, lay_slot
from ..rule import Rule
from .state import scales_of, states_of


class Live(NamedTuple):
    """A parameter to step: its group, its place in that, itself."""

    group: int
    place: int
    param: Tensor


def everyone(groups: Sequence[Mapping[str, Any]], rule: Rule) -> Iterator[Live]:
    """The parameters that a rule steps where they have a gradient, in the order of the groups."""
    for number, group in enumerate(groups):
        if rule.steps(group):
            for index, param in enumerate(group["params"]):
                yield Live(number, index, param)


def live_of(groups: Sequence[Mapping[str, Any]], rule: Rule) -> Iterator[Live]:
    """Those of them that have one."""
    return (each for each in everyone(groups, rule) if each.param.grad is not None)


def slot_of(
    param: Tensor,
    group: int,
    recipe: Recipe,
    executor: Executor,
    state: Mapping[Tensor, Any],
    words: tuple[int, int, int],
    factors: Tensor | None,
) -> Slot:
    """The slot of a parameter whose states are there."""
    states, scales = states_of(state, param, recipe), scales_of(state, param, recipe)
    leading = recipe.laid_by(param)
    place = place_of(param, leading) if is_spread(param) else None
    name = recipe.rule.row_state
    of_rows = local_of(state[param][name]).view(-1) if name else None
    return Slot(param, states, group, recipe, executor, words, place, factors, scales, leading, of_rows)


class Kept(NamedTuple):
    """A slot, and all that it was made from."""

    laid: Laid
    asked: Recipe  # of its group
    entry: dict[str, Any] | None  # of the state
    pointers: tuple[int, ...]  # of parameter and states
    tensors: dict[str, Tensor]  # of the entry
    kinds: tuple[Any, ...]  # how parameter, gradient and states lie


class Shelf:
    """What is laid out of parameters; whoever asks for one gets it only if nothing of it has changed."""

    def __init__(self) -> None:
        self._kept: dict[int, Kept] = {}
        self._keys: dict[Key, Key] = {}

    def find(
        self, param: Tensor, group: int, asked: Recipe, entry: dict[str, Any] | None, factors: Tensor | None
    ) -> Slot | None:
        """The slot of a parameter with a gradient, if it would be made just so again."""
        kept, grad = self._kept.get(id(param)), param.grad
        if kept is None or not _is_plain(grad):
            return None
        slot = kept.laid.slot
        fits = (
            slot.param is param
            and slot.group == group
            and slot.factors is factors
            and kept.asked is asked
            and kept.entry is entry
            and _kinds(param, grad, slot.states) == kept.kinds
            and (param.data_ptr(), *map(Tensor.data_ptr, (*slot.states, *slot.scales))) == kept.pointers
            and (entry is None or all(map(is_, map(entry.get, kept.tensors), kept.tensors.values())))
            and kept.laid.alignable <= (kept.laid.aligned == (grad.data_ptr() % 16 == 0))
        )
        return slot if fits else None

    def lay(self, slot: Slot, asked: Recipe, state: Mapping[Tensor, Any], totals: Tensor | None) -> Laid:
        """Lays a slot out, or says how that was done."""
        kept = self._kept.get(id(slot.param))
        if kept is not None and kept.laid.slot is slot:
            return kept.laid
        laid = lay_slot(slot, totals)
        if laid.key is None:
            return laid
        key = self._keys.setdefault(laid.key, laid.key)
        laid = laid._replace(key=key)
        grad = slot.param.grad
        # Parts of a whole are laid out by what other ranks have, complex ones through views.
        if slot.place is None and _is_plain(grad) and not slot.param.is_complex():
            pointers = (slot.param.data_ptr(), *map(Tensor.data_ptr, (*slot.states, *slot.scales)))
            entry, kinds = state.get(slot.param), _kinds(slot.param, grad, slot.states)
            tensors = {name: entry[name] for name in key.recipe.keys} if entry else {}
            self._kept[id(slot.param)] = Kept(laid, asked, entry, pointers, tensors, kinds)
        return laid


def _is_plain(grad: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a real gradient's memory holds its very values."""
    return type(grad) is Tensor and grad.layout is torch.strided and not grad.is_neg()


def _kinds(param: Tensor, grad: Tensor, states: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Shapes and strides of all; what else can have changed of a gradient."""
    tensors = (param, grad, *states)
    return (*map(_shape_of, tensors), *map(Tensor.stride, tensors), grad.dtype, grad.device)


_shape_of = attrgetter("shape")
