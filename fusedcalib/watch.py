"""Whether a plan still describes what it was made from. Asked at every step, so written for Python's C loops.

A plan holds addresses. Between two steps a gradient may be reallocated, `.data` replaced, a state loaded
or edited, a parameter exchanged. Each is seen here: nothing is ever stepped through a stale address.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any
from weakref import ref

from torch import Tensor

_params_of = itemgetter("params")
_grad_of = attrgetter("grad")
_dtype_of = attrgetter("dtype")


class Watch:
    """Remembers the parameters, gradients and state that a plan was made from.

    Gradients are remembered weakly: `zero_grad` must be able to free them.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]) -> None:
        self._params = list(chain.from_iterable(map(_params_of, groups)))
        self._idle = [p for p in self._params if p.grad is None]
        self._live = [p for p in self._params if p.grad is not None]
        grads = [p.grad for p in self._live]
        self._grads = list(map(ref, grads))
        self._strides = list(map(Tensor.stride, grads))
        self._dtypes = list(map(_dtype_of, grads))
        self._owners = list(state)
        self._entries = list(state.values())
        self._states = self._flat_states()
        self._param_pointers = list(map(Tensor.data_ptr, self._live))
        self._state_pointers = self._pointers_of_states()
        self.grad_pointers = list(map(Tensor.data_ptr, grads))

    def holds(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]) -> bool:
        """Whether the plan may be used; if so `grad_pointers` is up to date afterwards."""
        if not _same(list(chain.from_iterable(map(_params_of, groups))), self._params):
            return False
        if any(p.grad is not None for p in self._idle):
            return False
        if not (_same(list(state.values()), self._entries) and _same(list(state), self._owners)):
            return False
        if not _same(self._flat_states(), self._states):
            return False
        if list(map(Tensor.data_ptr, self._live)) != self._param_pointers:
            return False
        if self._pointers_of_states() != self._state_pointers:
            return False
        grads = list(map(_grad_of, self._live))
        if not all(map(is_, [grad() for grad in self._grads], grads)):
            if not self._alike(grads):
                return False
            self._grads = list(map(ref, grads))
        self.grad_pointers = list(map(Tensor.data_ptr, grads))
        return True

    def _alike(self, grads: list[Tensor | None]) -> bool:
        """Whether new gradient tensors can take the place of the old ones in the plan."""
        return (
            all(map(_is_plain, grads))
            and list(map(Tensor.stride, grads)) == self._strides  # type: ignore[arg-type]
            and list(map(_dtype_of, grads)) == self._dtypes
        )

    def _flat_states(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._entries)))

    def _pointers_of_states(self) -> list[int]:
        return [t.data_ptr() for t in self._states if type(t) is Tensor]


def _same(now: list[Any], then: list[Any]) -> bool:
    return len(now) == len(then) and all(map(is_, now, then))


def _is_plain(grad: Tensor | None) -> bool:
    return type(grad) is Tensor and not grad.is_sparse
