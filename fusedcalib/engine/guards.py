"""Whether a plan still describes what it was made from.

Asked at every step, so read in bulk (pointers.py), or by Python's C loops. A plan holds addresses. Between
two steps a gradient may be reallocated, `.data` replaced, a state loaded or edited, a parameter exchanged.
Each is seen here: nothing is ever stepped through a stale address. Not seen where tensors cannot be read in
bulk: one gradient object, kept over two steps at one address, that is given another shape or strides in
place (`p.grad.t_()`), or whose parameter is (`p.data = p.data.t()`); asking every tensor for those at every
step would double the cost of the watch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from ..hostmath import is_remote
from ..layout.recipe import Asked, Recipe, needs_of, recipe_of
from ..layout.shards import is_spread, local_of
from ..rule import Rule
from .offsets import offsets, version_offset
from .pointers import Array, DictVersions, Reading

_params_of = itemgetter("params")
_grad_of = attrgetter("grad")
_shape_of = attrgetter("shape")
_is_sparse_of = attrgetter("is_sparse")
_dtype_of = attrgetter("dtype")
_END = (object(),)  # so that a list that grew or shrank is not taken for its beginning


class Guards:
    """Remembers the parameters, gradients and state that a plan was made from.

    Gradients are not kept alive: `zero_grad` must be able to free them.

    Attributes:
        grad_pointers: the addresses of the gradients; another array where one has moved.
        stale: whether a parameter or state was another when it was last asked.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]) -> None:
        params = list(chain.from_iterable(map(_params_of, groups)))
        self._idle = [p for p in params if p.grad is None]
        self._live = [p for p in params if p.grad is not None]
        self._params = [*params, *_END]
        self._everyone = list(state.values())  # in whose order those of later parameters come last
        entries = [state[p] for p in self._live if p in state]
        self._entries = entries
        self._values = [entry.values() for entry in entries]  # views: they show what changes
        self._states = [*chain.from_iterable(self._values), *_END]
        self._versions: DictVersions | None = None
        moments = [t for e in entries for k, t in e.items() if k != "step" and isinstance(t, Tensor)]
        self._tensors = [*self._live, *moments]
        self._spread = any(map(is_spread, self._live))  # and states; then looking takes longer
        self._pointers = self._look(self._tensors)
        grads = self._local(list(map(_grad_of, self._live)))
        self._geometry = _geometry(self._local(self._live), grads)
        conjugates = (Tensor.is_conj,) if any(map(Tensor.is_complex, grads)) else ()
        self._lazy = (_is_sparse_of, Tensor.is_neg, *conjugates)
        # Of a lazy one the plan has a copy, and steps in a way that others need not put up with.
        self._once = any(map(Tensor.is_neg, grads)) or any(map(Tensor.is_conj, grads))
        self._grads: list[Any] | None = None
        self.grad_pointers = _addresses(grads)
        self._reading: Reading | None = None  # made when they are asked of first: many a plan never is
        self._readable = not self._spread and bool(self._live)
        self._attempts = 4  # to read kinds of gradients that come in turns
        self.stale = False

    def _read(self, grads: list[Tensor]) -> Reading | None:
        """What reads all of them in bulk, if that can be had."""
        moments = self._tensors[len(self._live) :]
        self._attempts -= 1
        self._readable &= self._attempts > 0
        at = offsets() if self._readable else None
        try:
            addresses = np.array(self._pointers, dtype=np.int64)
            return at and Reading(self._live, moments, grads, addresses, self.grad_pointers, at)
        except LookupError:
            self._readable = False
            return None

    def hold(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]) -> bool:
        """Whether the plan may be used; if so `grad_pointers` is up to date afterwards."""
        if self._once or any(p.grad is not None for p in self._idle):
            return False
        read = self._reading is not None and self._reading.hold()
        self.stale = not (
            _same(chain.from_iterable(map(_params_of, groups)), self._params)
            and len(state) >= len(self._everyone)
            and all(map(is_, state.values(), self._everyone))
            and self._hold_states()
            and (read or self._look(self._tensors) == self._pointers)
        )
        if self.stale:
            return False
        pointers = self._reading.gradients() if read and self._reading else None
        return self._take_over(list(map(_grad_of, self._live))) if pointers is None else self._move(pointers)

    def _hold_states(self) -> bool:
        """Whether the entries of the state have the values that they had."""
        if self._versions is not None and self._versions.hold():
            return True
        offset = version_offset()
        if offset is not None:  # before they are looked at
            self._versions = DictVersions(self._entries, offset)
        return _same(chain.from_iterable(self._values), self._states)

    def _local(self, tensors: list[Any]) -> list[Any]:
        """What of them lies here."""
        return list(map(local_of, tensors)) if self._spread else tensors

    def _look(self, tensors: list[Tensor]) -> list[int]:
        """Their addresses; that of a DTensor itself would be 0."""
        return list(map(Tensor.data_ptr, self._local(tensors)))

    def _take_over(self, grads: list[Tensor]) -> bool:
        """Whether these gradients can take the place of those in the plan: each is asked."""
        if any(map(is_, grads, repeat(None))):
            return False
        grads = self._local(grads)
        same = self._grads is not None and _same([grad() for grad in self._grads], [*grads, *_END])
        if not same and not _are_plain(grads, self._lazy):
            return False
        pointers = _addresses(grads)
        if same and np.array_equal(pointers, self.grad_pointers) and not self._readable:
            return True
        if _geometry(self._local(self._live), grads) != self._geometry:
            return False
        self._move(pointers)
        self._grads = _weak(grads)
        self._reading = self._read(grads)
        return True

    def _move(self, pointers: Array) -> bool:
        if not np.array_equal(pointers, self.grad_pointers):
            self.grad_pointers = pointers
        return True


def _addresses(tensors: list[Tensor]) -> Array:
    return np.array(list(map(Tensor.data_ptr, tensors)), dtype=np.int64)


def _weak(grads: list[Tensor]) -> list[Any] | None:
    """Weak references, or none where torch exchanges tensors in place, which it refuses for such."""
    return None if torch.__future__.get_swap_module_params_on_conversion() else list(map(ref, grads))


def _same(now: Iterable[Any], then: list[Any]) -> bool:
    return all(map(is_, chain(now, _END), then))


def _geometry(params: list[Tensor], grads: list[Tensor]) -> list[Any]:
    """Shapes, strides and dtypes, asked where gradients are new: torch gives none of another shape or dtype
    than its parameter, of which that leaves the strides."""
    strides = map(Tensor.stride, params + grads)
    return [*map(_shape_of, grads), *strides, *map(_dtype_of, grads)]


def _are_plain(grads: list[Tensor], lazy: Sequence[Any]) -> bool:
    """Whether memory holds the very values: a lazy negation or conjugate would have to be undone."""
    return {*map(type, grads)} <= {Tensor} and not any(any(map(is_lazy, grads)) for is_lazy in lazy)


class OptionGuards:
    """Remembers the options of param groups; what they ask for is found anew only where a value is another.

    Args:
        rule: the optimizer's.
        check: raises where a group cannot be stepped with its options; then asked again the next time.
    """

    def __init__(self, rule: Rule, check: Callable[[dict[str, Any]], None]) -> None:
        self._rule, self._check = rule, check
        self._seen: list[_Options] = []
        self._scaling: tuple[bool, bool, bool] | None = None
        self.statistics = False  # whether the coming step is measured
        self._asked = Asked()

    def look(
        self, groups: Sequence[dict[str, Any]], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Asked:
        """What is asked for now, with what a GradScaler hands over: the same object if nothing changed."""
        known = len(self._seen) == len(groups)
        changed = [i for i, group in enumerate(groups) if not (known and self._seen[i].hold(group))]
        before, scaling = self._asked, (grad_scale is None, found_inf is None, self.statistics)
        if not changed and scaling == self._scaling and groups is before.groups:
            return before
        self._scaling = None  # until all of it is known
        for i in changed:
            self._check(groups[i])
        needs = needs_of(groups, grad_scale, found_inf)._replace(statistics=self.statistics)
        kept = {} if not known or needs != before.needs else dict(enumerate(before.recipes))
        for i in changed:
            kept.pop(i, None)
        recipes = [kept.get(i) or recipe_of(self._rule, group, needs) for i, group in enumerate(groups)]
        _check_measurable(recipes)
        versions = before.versions if known else [max(before.versions, default=0)] * len(groups)
        self._asked = Asked(
            groups,
            [group for group in groups if self._rule.steps(group)],
            before.recipes if recipes == before.recipes else recipes,
            needs,
            [version + (i in changed) for i, version in enumerate(versions)],
        )
        self._seen = [_Options(group) if i in changed else self._seen[i] for i, group in enumerate(groups)]
        self._scaling = scaling
        return self._asked


def _check_measurable(recipes: list[Recipe]) -> None:
    """Raises where a group's step cannot be measured: weights may be shortened after its pass."""
    for number, recipe in enumerate(recipes):
        if recipe.flags.statistics and recipe.flags.project:
            raise RuntimeError(
                f"group {number}: track() measures a step in its own pass, but max_row_norm may shorten rows "
                "after it; set max_row_norm=None, or call track() without names"
            )
        if recipe.flags.statistics and recipe.flags.still:
            raise RuntimeError(
                f"group {number}: track() measures a step of one pass, but this rule moves its matrices in a "
                "second one; call track() without names"
            )


NAMES = ("params", "param_names")  # keys of a group whose lists are not options


class _Options:
    """The values of a param group as they were."""

    def __init__(self, group: dict[str, Any]) -> None:
        self._keys, self._values = [*group], [*group.values()]
        dicts = [group.get("noise"), group.get("state_dtype")]
        self._dicts = [(value, {**value}) for value in dicts if isinstance(value, dict)]
        self._lists = [
            (value, tuple(value))
            for key, value in group.items()
            if isinstance(value, list) and key not in NAMES
        ]
        tuples = [
            value for key, value in group.items() if isinstance(value, (tuple, list)) and key not in NAMES
        ]
        numbers = [*self._values, *(x for value in tuples for x in value)]
        numbers += [x for _, kept in self._dicts for x in kept.values()]
        # A tensor on the host may change where it lies.
        self._steady = not any(isinstance(x, Tensor) and not is_remote(x) for x in numbers)

    def hold(self, group: dict[str, Any]) -> bool:
        """Whether they are the same. One that is changed in place is looked for where users do so."""
        return (
            self._steady
            and [*group] == self._keys
            and all(map(is_, group.values(), self._values))
            and all(now == then for now, then in self._dicts)
            and all(len(now) == len(then) and all(map(is_, now, then)) for now, then in self._lists)
        )
