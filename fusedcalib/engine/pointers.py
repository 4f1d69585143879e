"""Where many tensors lie, and how, read in a few NumPy operations instead of asked of each.

`t.data_ptr()` follows pointers: from Python's object to the tensor, from that to its storage, from that to
the data; shapes, strides, dtype, device and dispatch keys stand in the tensor. Here all of it is read for all
tensors at once and compared with what it was. Where it stands in the objects is found by looking for values
that Python tells (`_cdata`, `data_ptr()`, `stride()`), once in a process; and what is read of each tensor is
compared with what Python says of it before it is relied on. Nothing is read that may be gone: a pointer is
followed only while it is the one that an object holds which is known to live. Where anything is not as
expected (another Python, another layout of torch's objects) there is no such shortcut, and each tensor is
asked.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
_WORDS = 1 << 45  # of eight bytes: all addresses of a process
INLINE = 5  # dimensions that a tensor holds in itself
_DTYPE_AND_DEVICE = 0xFFFFFFFF  # of the word that begins with them


class Offsets(NamedTuple):
    """Bytes from the beginning of an object to something in it."""

    tensor: int  # in Python's object: the tensor
    storage: int  # in the tensor
    meta: int  # in the tensor: what autograd keeps of it
    first: int  # in the tensor: its storage offset, in elements
    data: int  # in the storage
    grad: int  # in what autograd keeps

    # In a tensor, before its storage offset: how many dimensions, five sizes, five strides; after it: the
    # number of elements, dtype and device, dispatch keys.
    @property
    def sizes(self) -> int:
        return self.first - 8 * 2 * INLINE

    @property
    def strides(self) -> int:
        return self.first - 8 * INLINE

    @property
    def dtype(self) -> int:
        return self.first + 16

    @property
    def keys(self) -> int:
        return self.first + 24


@cache
def _memory() -> Array:
    """All of the process's memory as words; word i lies at 8 + 8 i."""
    return np.ctypeslib.as_array((ctypes.c_int64 * _WORDS).from_address(8))


def _read(addresses: Array) -> Array:
    words: Array = _memory()[(addresses - 8) >> 3]
    return words


@cache
def offsets() -> Offsets | None:
    """Where things stand in the objects of this process; None where they are not found."""
    with_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_void_p) != 8 or not with_gil:
        return None
    try:
        with torch.device("cpu"), torch.inference_mode(False):
            return _found()
    except (AttributeError, IndexError, LookupError, RuntimeError, TypeError, ValueError):
        return None


def _found() -> Offsets:
    shape, stride, first = (3, 5, 7), (1000, 70, 2), 98_765
    base = torch.empty(200_000, dtype=torch.uint8)
    t = base.as_strided(shape, stride, first)
    storage: Any = t.untyped_storage()
    plain, grown = torch.zeros(3), torch.nn.Parameter(torch.zeros(3))
    grown.grad = torch.zeros(3)
    at = _place(_cdata(t), storage._cdata, range(8, 64, 8))
    kept = at + 8  # the pointer behind the storage's: null until autograd has something to keep
    here, there = (_word(_cdata(x) + kept) for x in (plain, grown))
    found = Offsets(
        tensor=_place(id(t), _cdata(t), range(16, 48, 8)),
        storage=at,
        meta=kept,
        first=_place(_cdata(t), first, range(96, 168, 8)),
        data=_place(storage._cdata, storage.data_ptr(), range(8, 40, 8)),
        grad=_place(there, _cdata(grown.grad), range(8, 64, 8)) if there else 0,
    )
    half, lazy = base.view(torch.bfloat16), torch._neg_view(plain)
    dtypes = [_word(_cdata(x) + found.dtype) & _DTYPE_AND_DEVICE for x in (t, base, half)]
    keys = [_word(_cdata(x) + found.keys) for x in (t, base, lazy)]
    numbers = [_word(_cdata(t) + found.sizes - 8 + 8 * i) for i in range(2 * INLINE + 1)]
    said = [t.ndim, *shape, *numbers[4 : 1 + INLINE], *stride, *numbers[4 + INLINE :]]
    if here != 0 or numbers != said or dtypes[0] != dtypes[1] or dtypes[0] == dtypes[2]:
        raise LookupError
    if keys[0] != keys[1] or keys[0] == keys[2] or _word(_cdata(t) + found.first + 8) != t.numel():
        raise LookupError
    return found


_cdata: Any = attrgetter("_cdata")


def _word(address: int) -> int:
    return int(_read(np.array([address]))[0])


def _place(base: int, wanted: int, places: range) -> int:
    """The first of these places behind an address that has a value."""
    found = _read(np.array([base + place for place in places]))
    return places[[int(x) for x in found].index(wanted)]


class Kinds:
    """Words of tensors that tell how they are laid out: class, sizes, strides, dtype, device, keys."""

    def __init__(self, ndims: Sequence[int], at: Offsets) -> None:
        self._at = at
        of_each = [_words_of(n, at) for n in ndims]
        self._counts = np.array(list(map(len, of_each)), dtype=np.int64)
        self._offsets = np.concatenate(of_each)
        # Those that Python tells, which come first of each.
        told = np.arange(len(self._offsets)) - np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
        self._told = told < np.repeat(self._counts - 2, self._counts)

    def words(self, impls: Array) -> tuple[Array, Array]:
        """Where they lie, and where those of dtype and device do, of which a part counts."""
        return (np.repeat(impls, self._counts) + self._offsets) >> 3, (impls + self._at.dtype - 8) >> 3

    @staticmethod
    def read(words: tuple[Array, Array]) -> tuple[Array, Array]:
        memory = _memory()
        return memory[words[0]], memory[words[1]] & _DTYPE_AND_DEVICE

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
        impls = self._impls = _memory()[self._objects]
        if impls.tolist() != list(map(_cdata, tensors)):
            raise LookupError("not the tensors of these objects")
        self._params = impls[: len(params)]
        self._sizes = _sizes_of(tensors)
        self._kinds, self._kinds_of_grads = Kinds(ndims[0], at), Kinds(ndims[2], at)
        self._of_params = self._kinds.words(self._params)
        self._param_kinds = Kinds.read(self._of_params)
        self._storages = (impls + at.storage - 8) >> 3
        self._found_storages = _memory()[self._storages]
        if not self._found_storages.all():
            raise LookupError("a tensor without storage")
        self._data = (self._found_storages + at.data - 8) >> 3
        self._first = (impls + at.first - 8) >> 3
        self._found_data, self._found_first = _memory()[self._data], _memory()[self._first]
        lie = self._found_data + self._sizes * self._found_first
        if not _agree(lie, addresses) or not self._kinds.agree(self._params, params):
            raise LookupError("not where and how these tensors lie")
        self._metas = (self._params + at.meta - 8) >> 3
        self._found_metas = _memory()[self._metas]
        if not self._found_metas.all():
            raise LookupError("a parameter of which autograd keeps nothing")
        self._grads = (self._found_metas + at.grad - 8) >> 3
        impls = _memory()[self._grads]
        if impls.tolist() != list(map(_cdata, grads)):
            raise LookupError("not the gradients of these parameters")
        self._grad_sizes = _sizes_of(grads)
        self._seen, self._words = impls, self._kinds_of_grads.words(impls)
        self._grad_kinds = Kinds.read(self._words)
        found = self.gradients()
        if found is None or not _agree(found, of_grads) or not self._kinds_of_grads.agree(impls, grads):
            raise LookupError("not where and how these gradients lie")

    def holds(self) -> bool:
        """Whether parameters and others lie where and as they did."""
        memory = _memory()
        return (
            bool((memory[self._objects] == self._impls).all())
            and _equal(Kinds.read(self._of_params), self._param_kinds)
            and bool((memory[self._storages] == self._found_storages).all())
            and bool((memory[self._data] == self._found_data).all())
            and bool((memory[self._first] == self._found_first).all())
        )

    def gradients(self) -> Array | None:
        """The addresses of the gradients, if each parameter has one of the kind that is remembered.

        Only to be asked while `holds`: parameters are followed.
        """
        memory = _memory()
        if not (memory[self._metas] == self._found_metas).all():
            return None
        impls = memory[self._grads]  # of a parameter without gradient an empty one, of another kind
        if not np.array_equal(impls, self._seen):
            self._seen, self._words = impls, self._kinds_of_grads.words(impls)
        if not _equal(Kinds.read(self._words), self._grad_kinds):
            return None
        storages = memory[(impls + self._at.storage - 8) >> 3]
        if not storages.all():
            return None
        data = memory[(storages + self._at.data - 8) >> 3]
        pointers: Array = data + self._grad_sizes * memory[(impls + self._at.first - 8) >> 3]
        return pointers


class DictVersions:
    """The versions of dicts, which Python counts up with every change of one (PEP 509, up to Python 3.12).

    The caller keeps the dicts alive.
    """

    def __init__(self, dicts: Sequence[dict[Any, Any]], offset: int) -> None:
        self._words = (np.array(list(map(id, dicts)), dtype=np.int64) + offset - 8) >> 3
        self._found = _memory()[self._words]

    def hold(self) -> bool:
        """Whether no dict has been changed."""
        return bool((_memory()[self._words] == self._found).all())


@cache
def version_offset() -> int | None:
    """Bytes from the beginning of a dict to its version; None where there is none."""
    if offsets() is None:
        return None

    def empty_and_fill(d: dict[str, int]) -> None:
        d.clear()
        d.update(x=1, y=2)

    changes: list[Any] = [
        lambda d: d.update(x=5),
        lambda d: d.__setitem__("y", 6),
        lambda d: d.__setitem__("z", 7),
        lambda d: d.pop("z"),
        lambda d: d.setdefault("w", 8),
        lambda d: d.popitem(),
        lambda d: d.__delitem__("y"),
        lambda d: d.__ior__({"x": 9}),
        empty_and_fill,
    ]
    d, places = {"x": 1, "y": 2}, np.array(range(16, 32, 8))
    seen = [_read(id(d) + places)]
    for change in changes:
        change(d)
        seen.append(_read(id(d) + places))
        if not np.array_equal(seen[-1], _read(id(d) + places)):
            return None
    counts = np.all(np.diff(np.stack(seen), axis=0) > 0, axis=0)
    return int(places[np.flatnonzero(counts)[0]]) if counts.any() else None


def _sizes_of(tensors: list[Tensor]) -> Array:
    return np.array(list(map(Tensor.element_size, tensors)), dtype=np.int64)


def _equal(x: tuple[Array, Array], y: tuple[Array, Array]) -> bool:
    return bool((x[0] == y[0]).all() and (x[1] == y[1]).all())


def _agree(found: Array, told: Array) -> bool:
    """Whether tensors lie there. Empty ones say that they lie nowhere."""
    return bool(((found == told) | (told == 0)).all())


def _geometry(t: Tensor) -> tuple[int, ...]:
    return (t.ndim, *t.shape, *t.stride())
