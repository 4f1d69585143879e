"""Whether a plan still describes what it was made from. Asked at every step, so written for Python's C loops.

A plan holds addresses. Between two steps a gradient may be reallocated, `.data` replaced, a state loaded
or edited, a parameter exchanged. Each is seen here: nothing is ever stepped through a stale address.
Not seen: one gradient object, kept over two steps at one address, that is given another shape or strides
in place (`p.grad.t_()`), or whose parameter is (`p.data = p.data.t()`); asking every tensor for those at
every step would double the cost of the watch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from .distributed import is_spread, local_of

_params_of = itemgetter("params")
_grad_of = attrgetter("grad")
_shape_of = attrgetter("shape")
_is_sparse_of = attrgetter("is_sparse")
_dtype_of = attrgetter("dtype")
_END = (object(),)  # so that a list that grew or shrank is not taken for its beginning


class Watch:
    """Remembers the parameters, gradients and state that a plan was made from.

    Gradients are remembered weakly: `zero_grad` must be able to free them.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]) -> None:
        params = list(chain.from_iterable(map(_params_of, groups)))
        self._idle = [p for p in params if p.grad is None]
        self._live = [p for p in params if p.grad is not None]
        self._params = [*params, *_END]
        self._entries = list(state.values())
        self._values = [entry.values() for entry in self._entries]  # views: they show what changes
        self._states = [*chain.from_iterable(self._values), *_END]
        moments = (t for e in self._entries for k, t in e.items() if k != "step")
        self._tensors = [*self._live, *(t for t in moments if isinstance(t, Tensor))]
        self._entries += _END
        self._spread = any(map(is_spread, self._tensors))  # then looking takes longer
        self._pointers = self._look(self._tensors)
        grads = self._local([p.grad for p in self._live])
        self._grads = _weak(grads)
        self._geometry = _geometry(self._local(self._live), grads)
        self.grad_pointers = list(map(Tensor.data_ptr, grads))
        conjugates = (Tensor.is_conj,) if any(map(Tensor.is_complex, grads)) else ()
        self._lazy = (_is_sparse_of, Tensor.is_neg, *conjugates)

    def holds(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]) -> bool:
        """Whether the plan may be used; if so `grad_pointers` is up to date afterwards."""
        return (
            _same(chain.from_iterable(map(_params_of, groups)), self._params)
            and all(p.grad is None for p in self._idle)
            and _same(state.values(), self._entries)
            and _same(chain.from_iterable(self._values), self._states)
            and self._look(self._tensors) == self._pointers
            and self._take_over(list(map(_grad_of, self._live)))
        )

    def _local(self, tensors: list[Any]) -> list[Any]:
        """What of them lies here."""
        return list(map(local_of, tensors)) if self._spread else tensors

    def _look(self, tensors: list[Tensor]) -> list[int]:
        """Their addresses; that of a DTensor itself would be 0."""
        return list(map(Tensor.data_ptr, self._local(tensors)))

    def _take_over(self, grads: list[Tensor]) -> bool:
        """Whether these gradients can take the place of those in the plan."""
        if any(map(is_, grads, repeat(None))):
            return False
        grads = self._local(grads)
        same = _same([grad() for grad in self._grads], [*grads, *_END])
        if not same and not _are_plain(grads, self._lazy):
            return False
        pointers = list(map(Tensor.data_ptr, grads))
        if not same or pointers != self.grad_pointers:
            if _geometry(self._local(self._live), grads) != self._geometry:
                return False
            self._grads = _weak(grads)
            self.grad_pointers = pointers
        return True


def _weak(grads: list[Tensor]) -> list[Any]:
    """Weak references, or none where torch exchanges tensors in place, which it refuses for such."""
    return [] if torch.__future__.get_swap_module_params_on_conversion() else list(map(ref, grads))


def _same(now: Iterable[Any], then: list[Any]) -> bool:
    return all(map(is_, chain(now, _END), then))


def _geometry(params: list[Tensor], grads: list[Tensor]) -> list[Any]:
    """Shapes, strides and dtypes, asked where gradients are new: torch gives none of another shape or dtype
    than its parameter, of which that leaves the strides."""
    strides = map(Tensor.stride, params + grads)
    return [*map(_shape_of, grads), *strides, *map(_dtype_of, grads)]


def _are_plain(grads: list[Tensor], lazy: Sequence[Any]) -> bool:
    """Whether memory holds the very values: a lazy negation or conjugate would have to be undone."""
    return {*map(type, grads)} == {Tensor} and not any(any(map(is_lazy, grads)) for is_lazy in lazy)
