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

    Attributes:
        grad_pointers: the addresses of the gradients; another list where one has moved.
        stale: whether a parameter or state was another when it was last asked.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]) -> None:
        params = list(chain.from_iterable(map(_params_of, groups)))
        self._idle = [p for p in params if p.grad is None]
        self._live = [p for p in params if p.grad is not None]
        self._params = [*params, *_END]
        entries = [(p, state[p]) for p in self._live if p in state]
        self._keys, self._entries = [p for p, _ in entries], [entry for _, entry in entries]
        self._everyone = list(state.values())  # in whose order those of later parameters come last
        self._values = [entry.values() for entry in self._entries]  # views: they show what changes
        self._states = [*chain.from_iterable(self._values), *_END]
        moments = (t for e in self._entries for k, t in e.items() if k != "step")
        tensors = [*self._live, *(t for t in moments if isinstance(t, Tensor))]
        self._spread = any(map(is_spread, tensors))  # then looking takes longer
        self._own = Addresses(tensors, self._spread)
        grads = self._local([p.grad for p in self._live])
        self._grads = _weak(grads)
        self._kinds = Kinds(self._local(self._live), grads)
        self.grad_pointers = list(map(Tensor.data_ptr, grads))
        self._everywhere = list(range(len(grads)))
        self.stale = False

    def holds(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]) -> bool:
        """Whether the plan may be used; if so `grad_pointers` is up to date afterwards."""
        if any(p.grad is not None for p in self._idle):
            return False
        grads = list(map(_grad_of, self._live))
        if any(map(is_, grads, repeat(None))):
            return False
        self.stale = not (
            _same(chain.from_iterable(map(_params_of, groups)), self._params)
            and len(state) >= len(self._everyone)
            and all(map(is_, state.values(), self._everyone))
            and _same(chain.from_iterable(self._values), self._states)
            and self._own.hold()
        )
        return not self.stale and self._take_over(grads)

    def _local(self, tensors: list[Any]) -> list[Any]:
        """What of them lies here."""
        return list(map(local_of, tensors)) if self._spread else tensors

    def _take_over(self, grads: list[Tensor]) -> bool:
        """Whether these gradients can take the place of those in the plan."""
        grads = self._local(grads)
        same = len(self._grads) == len(grads) and all(map(is_, [grad() for grad in self._grads], grads))
        if same and _lie_at(grads, self.grad_pointers, self._everywhere):
            return True
        if not self._kinds.hold(self._local(self._live), grads, same):
            return False
        self._grads = _weak(grads)
        pointers = list(map(Tensor.data_ptr, grads))
        if pointers != self.grad_pointers:
            self.grad_pointers = pointers
        return True


class Addresses:
    """Where tensors lie that should not move."""

    def __init__(self, tensors: list[Tensor], spread: bool) -> None:
        self._tensors, self._spread = tensors, spread
        self._everywhere = list(range(len(tensors)))
        self._pointers = list(map(Tensor.data_ptr, self._local()))

    def _local(self) -> list[Tensor]:
        """The address of a DTensor itself would be 0."""
        return list(map(local_of, self._tensors)) if self._spread else self._tensors

    def hold(self) -> bool:
        """Whether none has moved."""
        return _lie_at(self._local(), self._pointers, self._everywhere)


class Kinds:
    """What kernels are compiled for of parameters and gradients: shapes, strides, dtypes, and that they are plain.

    torch's own guards ask all of it of all tensors in one call, and more: where they do not hold, or are not to
    be had, each is asked.
    """

    def __init__(self, params: list[Tensor], grads: list[Tensor]) -> None:
        self._geometry = _geometry(params, grads)
        conjugates = (Tensor.is_conj,) if any(map(Tensor.is_complex, grads)) else ()
        self._lazy = (_is_sparse_of, Tensor.is_neg, *conjugates)
        self._guards: Any = None
        self._attempts = 2 if TensorGuards else 0  # to make guards that hold

    def hold(self, params: list[Tensor], grads: list[Tensor], known: bool) -> bool:
        """Whether they fit. `known`: the gradients have been asked before, and only their addresses are new."""
        if self._guards is not None and self._guards.check(*params, *grads):
            return True
        if not known and not _are_plain(grads, self._lazy):
            return False
        if _geometry(params, grads) != self._geometry:
            return False
        if self._attempts:
            self._attempts -= 1
            self._guards = _guards(params + grads)
        return True


try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment, misc]


def _guards(tensors: list[Tensor]) -> Any:
    """torch's guards of these tensors; None where they cannot be had."""
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    try:
        return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    except (TypeError, RuntimeError):
        return None


_EQUAL = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)  # builds with CUDA have it


def _lie_at(tensors: list[Tensor], pointers: list[int], everywhere: list[int]) -> bool:
    """Whether tensors lie at these addresses."""
    if _EQUAL is not None:
        return bool(_EQUAL(tensors, pointers, everywhere))
    return list(map(Tensor.data_ptr, tensors)) == pointers


def _weak(grads: list[Tensor]) -> list[Any]:
    """Weak references, or none where torch exchanges tensors in place, which it refuses for such."""
    return [] if torch.__future__.get_swap_module_params_on_conversion() else list(map(ref, grads))


def _same(now: Iterable[Any], then: list[Any]) -> bool:
    return all(map(is_, chain(now, _END), then))


def _geometry(params: list[Tensor], grads: list[Tensor]) -> list[Any]:
    """Shapes, strides and dtypes."""
    strides = map(Tensor.stride, params + grads)
    return [*map(_shape_of, grads), *strides, *map(_dtype_of, grads)]


def _are_plain(grads: list[Tensor], lazy: Sequence[Any]) -> bool:
    """Whether memory holds the very values: a lazy negation or conjugate would have to be undone."""
    return {*map(type, grads)} == {Tensor} and not any(any(map(is_lazy, grads)) for is_lazy in lazy)
