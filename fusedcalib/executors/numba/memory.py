"""Reading and writing tensors by address in numba loops: the boundary where storage is decoded."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ...kernels.stages import SHARED, Numbers
from ...kernels.storage import CODED
from ...layout.buckets import GEOMETRY
from .storage import storage_of
from .values import F32, F64, I16, I32, I64, SIGNED, STORED, decode, encode, place_of, wide


@intrinsic
def tile_at(typing, tiles, t):
    """(slot, row block, column block) of tile t."""
    return _reader(types.int64, 3, I32, lambda b, v: b.sext(v, I64), indexed=True)


@intrinsic
def words_at(typing, address):
    """The eight words of a job."""
    return _reader(types.int64, 8, I64)


@intrinsic
def fetch_add(typing, address, value):
    """Adds to the integer at an address, one thread at a time; returns what it was."""

    def codegen(context, builder, signature, args):
        integer = place_of(builder, I64, args[0], I64(0))
        return builder.atomic_rmw("add", integer, args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def set_double(typing, address, i, x):
    """Sets the i-th double from an address."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], place_of(builder, F64, args[0], args[1]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float64), codegen


@intrinsic
def set_number(typing, address, i, x):
    """Sets the i-th number of the type of x from an address."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], place_of(builder, args[2].type, args[0], args[1]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, x), codegen


@intrinsic
def double_at(typing, address):
    """(The double at an address,)."""
    return _reader(types.float64, 1, F64)


@intrinsic
def geometry_at(typing, address):
    """What kernels/table.py lists from rows and columns on."""
    return _reader(types.int64, GEOMETRY, I64)


def _reader(
    real: Any, count: int, stored: Any, decode: Any = None, indexed: bool = False, named: Any = None
) -> Any:
    """An intrinsic's signature and code: `count` neighbours from an address, or entry i of a list of such.

    `named`: a tuple's type instead, whose last field takes what is more than its fields.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide(builder)
        first = builder.mul(args[1], I64(count)) if indexed else I64(0)
        values = []
        for k in range(count):
            value = builder.load(place_of(builder, stored, args[0], builder.add(first, I64(k))))
            values.append(decode(builder, value) if decode else value)
        if named:
            values[SHARED:] = [context.make_tuple(builder, named.types[SHARED], values[SHARED:])]
        return context.make_tuple(builder, signature.return_type, values)

    arguments = (types.int64, types.int64) if indexed else (types.int64,)
    return (named or types.UniTuple(real, count))(*arguments), codegen


class Memory:
    """How the loops of one kernel read and write: K tensors of given dtypes, arithmetic in one type.

    Element i of tensor k is at `addresses[k] + i * strides[k]` elements; where there are no inner
    dimensions the stride is 1 and known when compiled. Where states in bytes meet inner dimensions, `strides`
    is a row of the table and i a column, whose place it says: blocks reach over the ends of runs. The
    gradient (tensor 1) is never written.
    """

    def __init__(
        self,
        dtypes: tuple[torch.dtype, ...],
        compute: torch.dtype,
        count: int,
        inner: int,
        kept: tuple[str, ...] = (),
    ) -> None:
        stored = [STORED[dtype] for dtype in dtypes]
        sizes = [dtype.itemsize for dtype in dtypes]
        tensors = len(dtypes)
        real = types.float64 if compute == torch.float64 else types.float32
        llvm_real = F64 if compute == torch.float64 else F32
        self.real, self.inner = real, inner
        self.geometry = 8 * tensors  # bytes into a row of the table
        self.strides = 8 * (tensors + GEOMETRY + inner)
        self.coded = any(kind in CODED for kind in kept)
        self.indexed = self.coded and inner > 0
        # Numbers that are kept in parts, or in bytes, are integers until they are put together.
        whole = {k: dtype in SIGNED for k, dtype in enumerate(dtypes) if not dtype.is_floating_point}
        if kept and kept[0] in ("split16", "split8"):
            whole[0] = False
        place = _by_column(tensors, inner) if self.indexed else _by_stride(inner)
        load, store = _elements(stored, whole, real, llvm_real, place)
        self.as_stored, self.stochastic = _roundings(stored[0], real, llvm_real)
        of_states = _roundings(I16, real, llvm_real)[1]
        self.storage = storage_of(kept, tensors, load, store, of_states)
        self.shift, self.spread = _moves(sizes)
        self.integers, self.factor_at, self.scalars_at = _readings(tensors, real, llvm_real, count)


memory_of = cache(Memory)  # what two loops share is then compiled once


def _by_stride(inner: int) -> Any:
    """Where element i of tensor k lies, in elements from its address."""

    def place(builder: Any, strides: Any, i: Any, k: int) -> Any:
        return i if inner == 0 else builder.mul(i, builder.extract_value(strides, k))

    return place


def _by_column(tensors: int, inner: int) -> Any:
    """The same of column i, where `row` is the slot's row of the table."""

    def place(builder: Any, row: Any, i: Any, k: int) -> Any:
        def entry(n: int) -> Any:
            return builder.load(place_of(builder, I64, row, I64(n)))

        sizes = tensors + GEOMETRY
        rest, offset = i, I64(0)
        for d in range(inner - 1, -1, -1):
            size = entry(sizes + d)
            along = entry(sizes + inner + (d + 1) * tensors + k)
            offset = builder.add(offset, builder.mul(builder.srem(rest, size), along))
            rest = builder.sdiv(rest, size)
        return offset

    return place


def _elements(
    stored: list[Any], whole: dict[int, bool], real: Any, llvm_real: Any, place: Any
) -> tuple[Any, Any]:
    """`load(addresses, strides, i)` and `store(..., values)` of element i of all tensors.

    Values are of the type of the arithmetic, integers (signed or not) of those in `whole`. What is None is
    not written.
    """
    tensors = len(stored)

    def pointer(builder: Any, args: Any, k: int) -> Any:
        addresses, strides, i = args[:3]
        return place_of(
            builder, stored[k], builder.extract_value(addresses, k), place(builder, strides, i, k)
        )

    def loaded(builder: Any, args: Any, k: int) -> Any:
        value = builder.load(pointer(builder, args, k))
        if k not in whole:
            return decode(builder, value, llvm_real)
        return (builder.sext if whole[k] else builder.zext)(value, I32)

    @intrinsic
    def load(typing, addresses, strides, i):
        def codegen(context, builder, signature, args):
            wide(builder)
            values = [loaded(builder, args, k) for k in range(tensors)]
            return context.make_tuple(builder, signature.return_type, values)

        kinds = [types.int32 if k in whole else real for k in range(tensors)]
        return types.BaseTuple.from_types(kinds)(addresses, strides, types.int64), codegen

    @intrinsic
    def store(typing, addresses, strides, i, values):
        def codegen(context, builder, signature, args):
            for k, (kind, value) in enumerate(
                zip(values, cgutils.unpack_tuple(builder, args[3]), strict=True)
            ):
                if isinstance(kind, types.NoneType):
                    continue
                kept = builder.trunc(value, stored[k]) if k in whole else encode(builder, value, stored[k])
                builder.store(kept, pointer(builder, args, k))
            return context.get_dummy_value()

        return types.void(addresses, strides, types.int64, values), codegen

    return load, store


def _roundings(kept: Any, real: Any, llvm_real: Any) -> tuple[Any, Any]:
    """What kernels/storage.py calls `stored` and `stochastic`, of parameters that are kept in such a type."""

    @intrinsic
    def as_stored(typing, x):
        """x as the parameter's memory holds it."""

        def codegen(context, builder, signature, args):
            return decode(builder, encode(builder, args[0], kept), llvm_real)

        return real(real), codegen

    @intrinsic
    def stochastic(typing, x, bits):
        """x as one of the two numbers around it."""

        def codegen(context, builder, signature, args):
            if kept != I16:
                return args[0]
            moved = builder.add(builder.bitcast(args[0], I32), builder.trunc(args[1], I32))
            cut = builder.bitcast(builder.and_(moved, I32(0xFFFF0000)), F32)
            return builder.select(builder.fcmp_unordered("uno", args[0], args[0]), args[0], cut)

        return real(real, types.int64), codegen

    return as_stored, stochastic


def _moves(sizes: list[int]) -> tuple[Any, Any]:
    """`shift` of the addresses of tensors whose elements have these sizes; `spread` of one stride to all."""
    tensors = len(sizes)

    @intrinsic
    def shift(typing, addresses, strides, n):
        """Addresses moved on by n strides each."""

        def codegen(context, builder, signature, args):
            moved = []
            for k, size in enumerate(sizes):
                elements = builder.mul(builder.extract_value(args[1], k), args[2])
                offset = builder.mul(elements, I64(size))
                moved.append(builder.add(builder.extract_value(args[0], k), offset))
            return context.make_tuple(builder, signature.return_type, moved)

        return addresses(addresses, strides, types.int64), codegen

    @intrinsic
    def spread(typing, value):
        """The same stride for every tensor."""

        def codegen(context, builder, signature, args):
            return context.make_tuple(builder, signature.return_type, [args[0]] * tensors)

        return types.UniTuple(types.int64, tensors)(types.int64), codegen

    return shift, spread


def _readings(tensors: int, real: Any, llvm_real: Any, count: int) -> tuple[Any, Any, Any]:
    """Of the tables: K integers, the factor of a row, the Numbers of a slot."""

    @intrinsic
    def integers(typing, address):
        """K integers of the table: addresses, or strides along one dimension."""
        return _reader(types.int64, tensors, I64)

    @intrinsic
    def factor_at(typing, factors, row):
        """(The factor of a row,)."""
        return _reader(real, 1, llvm_real, indexed=True)

    @intrinsic
    def scalars_at(typing, scalars, row):
        """The Numbers of a slot."""
        own = types.BaseTuple.from_types((real,) * (count - SHARED))
        numbers = types.NamedTuple((real,) * SHARED + (own,), Numbers)
        return _reader(real, count, llvm_real, indexed=True, named=numbers)

    return integers, factor_at, scalars_at
