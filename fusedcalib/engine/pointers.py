"""Where many tensors lie, and how, read in a few NumPy operations instead of asked of each.

`t.data_ptr()` follows pointers: from Python's object to the tensor, from that to its storage, from that to
the data; shapes, strides, dtype, device and dispatch keys stand in the tensor. Here all of it is read for all
tensors at once and compared with what it was. What is read of each tensor is compared with what Python says
of it before it is relied on. Nothing is read that may be gone: a pointer is followed only while it is the one
that an object holds which is known to live.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor

from .offsets import DTYPE_AND_DEVICE, INLINE, Offsets, cdata, memory

Array = np.ndarray[Any, np.dtype[Any]]


def _read(addresses: Array) -> Array:
    words: Array = memory()[(addresses - 8) >> 3]
    return words


class Kinds:
    """Words of tensors that tell how they are laid out: class, sizes, strides, dtype, device, keys."""

    def __init__(self, ndims: Sequence[int], at: Offsets) -> None:
        self._dtype = at.dtype - 8
        of_each = [_words_of(n, at) for n in ndims]
        self._counts = np.array(list(map(len, of_each)), dtype=np.int64)
        self._offsets = np.concatenate(of_each)
        # Those that Python tells, which come first of each.
        told = np.arange(len(self._offsets)) - np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
        self._told = told < np.repeat(self._counts - 2, self._counts)

    def words(self, impls: Array) -> tuple[Array, Array]:
        """Where they lie, and where those of dtype and device do, of which a part counts."""
        return (np.repeat(impls, self._counts) + self._offsets) >> 3, (impls + self._dtype) >> 3

    @staticmethod
    def read(words: tuple[Array, Array]) -> tuple[Array, Array]:
        found = memory()
        return found[words[0]], found[words[1]] & DTYPE_AND_DEVICE

    def agree(self, impls: Array, tensors: list[Tensor]) -> bool:
        """Whether sizes and strides stand there as Python tells them."""
        told = np.array(list(chain.from_iterable(map(_geometry, tensors))), dtype=np.int64)
        return np.array_equal(self.read(self.words(impls))[0][self._told], told)


@cache
def _words_of(ndim: int, at: Offsets) -> Array:
    """Bytes from a tensor to what it says: how many dimensions, sizes, strides, class, keys; each less 8."""
    sizes, strides = (range(first, first + 8 * ndim, 8) for first in (at.sizes, at.strides))
    return np.array([at.sizes - 8, *sizes, *strides, 0, at.keys], dtype=np.int64) - 8


class Reading:
    """Parameters, other tensors and gradients, read from memory.

    Args:
        params: tensors that have gradients.
        others: more of which it matters where they lie.
        grads: of the parameters.
        addresses, of_grads: of their data, as Python tells them.
        at: of `offsets`.

    The caller keeps parameters and others alive. Gradients are found through the parameters.

    Raises:
        LookupError: what is read is not what Python says.
    """

    def __init__(
        self,
        params: list[Tensor],
        others: list[Tensor],
        grads: list[Tensor],
        addresses: Array,
        of_grads: Array,
        at: Offsets,
    ) -> None:
        tensors, ndims = [*params, *others], [list(map(Tensor.dim, ts)) for ts in (params, others, grads)]
        if max(max(ns, default=0) for ns in ndims) > INLINE:
            raise LookupError("sizes of so many dimensions lie elsewhere")
        self._at = at
        self._objects = (np.array(list(map(id, tensors)), dtype=np.int64) + at.tensor - 8) >> 3
        impls = self._impls = memory()[self._objects]
        if impls.tolist() != list(map(cdata, tensors)):
            raise LookupError("not the tensors of these objects")
        self._params = impls[: len(params)]
        self._sizes = _sizes_of(tensors)
        self._kinds, self._kinds_of_grads = Kinds(ndims[0], at), Kinds(ndims[2], at)
        self._of_params = self._kinds.words(self._params)
        self._param_kinds = Kinds.read(self._of_params)
        self._storages = (impls + at.storage - 8) >> 3
        self._found_storages = memory()[self._storages]
        if not self._found_storages.all():
            raise LookupError("a tensor without storage")
        self._data = (self._found_storages + at.data - 8) >> 3
        self._first = (impls + at.first - 8) >> 3
        self._found_data, self._found_first = memory()[self._data], memory()[self._first]
        lie = self._found_data + self._sizes * self._found_first
        if not _agree(lie, addresses) or not self._kinds.agree(self._params, params):
            raise LookupError("not where and how these tensors lie")
        self._metas = (self._params + at.meta - 8) >> 3
        self._found_metas = memory()[self._metas]
        if not self._found_metas.all():
            raise LookupError("a parameter of which autograd keeps nothing")
        self._grads = (self._found_metas + at.grad - 8) >> 3
        impls = memory()[self._grads]
        if impls.tolist() != list(map(cdata, grads)):
            raise LookupError("not the gradients of these parameters")
        self._grad_sizes = _sizes_of(grads)
        self._seen, self._words = impls, self._kinds_of_grads.words(impls)
        self._grad_kinds = Kinds.read(self._words)
        found = self.gradients()
        if found is None or not _agree(found, of_grads) or not self._kinds_of_grads.agree(impls, grads):
            raise LookupError("not where and how these gradients lie")

    def hold(self) -> bool:
        """Whether parameters and others lie where and as they did."""
        words = memory()
        return (
            bool((words[self._objects] == self._impls).all())
            and _equal(Kinds.read(self._of_params), self._param_kinds)
            and bool((words[self._storages] == self._found_storages).all())
            and bool((words[self._data] == self._found_data).all())
            and bool((words[self._first] == self._found_first).all())
        )

    def gradients(self) -> Array | None:
        """The addresses of the gradients, if each parameter has one of the kind that is remembered.

        Only to be asked while `hold`: parameters are followed.
        """
        words = memory()
        if not (words[self._metas] == self._found_metas).all():
            return None
        impls = words[self._grads]  # of a parameter without gradient an empty one, of another kind
        if not np.array_equal(impls, self._seen):
            self._seen, self._words = impls, self._kinds_of_grads.words(impls)
        if not _equal(Kinds.read(self._words), self._grad_kinds):
            return None
        storages = words[(impls + self._at.storage - 8) >> 3]
        if not storages.all():
            return None
        data = words[(storages + self._at.data - 8) >> 3]
        pointers: Array = data + self._grad_sizes * words[(impls + self._at.first - 8) >> 3]
        return pointers


class DictVersions:
    """The versions of dicts, which Python counts up with every change of one (PEP 509, up to Python 3.12).

    The caller keeps the dicts alive.
    """

    def __init__(self, dicts: Sequence[dict[Any, Any]], offset: int) -> None:
        self._words = (np.array(list(map(id, dicts)), dtype=np.int64) + offset - 8) >> 3
        self._found = memory()[self._words]

    def hold(self) -> bool:
        """Whether no dict has been changed."""
        return bool((memory()[self._words] == self._found).all())


def _sizes_of(tensors: list[Tensor]) -> Array:
    return np.array(list(map(Tensor.element_size, tensors)), dtype=np.int64)


def _equal(x: tuple[Array, Array], y: tuple[Array, Array]) -> bool:
    return bool((x[0] == y[0]).all() and (x[1] == y[1]).all())


def _agree(found: Array, told: Array) -> bool:
    """Whether tensors lie there. Empty ones say that they lie nowhere."""
    return bool(((found == told) | (told == 0)).all())


def _geometry(t: Tensor) -> tuple[int, ...]:
    return (t.ndim, *t.shape, *t.stride())
