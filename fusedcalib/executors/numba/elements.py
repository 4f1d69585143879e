"""The functions of elements of kernels/storage.py, compiled for single numbers in integers of 32 bits."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ...kernels import storage as device
from ...kernels.storage import BLOCK
from ..source import Function, folded

INLINE: dict[str, Any] = {
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "forceinline": True,
}
_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
MOST_CODED = 4  # states of a rule


@intrinsic
def float_of(typing, bits):
    """The float of these bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(_narrow(builder, args[0]), _F32)

    return types.float32(bits), codegen


@intrinsic
def bits_of(typing, x):
    """The bits of a float."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], _I32)

    return types.int32(types.float32), codegen


def _operation(of_whole: str, of_floats: str = "") -> Any:
    """An operation of integers of 32 bits, which stay so, or of floats."""

    @intrinsic
    def operation(typing, x, y):
        whole = isinstance(x, types.Integer) and isinstance(y, types.Integer)

        def codegen(context, builder, signature, args):
            if not whole:
                return getattr(builder, of_floats)(*args)
            return getattr(builder, of_whole)(*(_narrow(builder, value) for value in args))

        return types.int32(x, y) if whole else types.float32(types.float32, types.float32), codegen

    return operation


def _narrow(builder: Any, value: Any) -> Any:
    return builder.trunc(value, _I32) if value.type.width > 32 else value


# numba makes 64 bits of every integer, which halves what a vector holds.
OPERATIONS: dict[type, tuple[str, Any]] = {
    ast.Add: ("add_", _operation("add", "fadd")),
    ast.Sub: ("sub_", _operation("sub", "fsub")),
    ast.Mult: ("mul_", _operation("mul", "fmul")),
    ast.BitAnd: ("and_", _operation("and_")),
    ast.BitOr: ("or_", _operation("or_")),
    ast.BitXor: ("xor_", _operation("xor")),
    ast.LShift: ("shl_", _operation("shl")),
    ast.RShift: ("shr_", _operation("ashr")),
}


class _Narrow(ast.NodeTransformer):
    """Has integers keep 32 bits, as they have on a GPU."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        name = ast.Name(OPERATIONS[type(node.op)][0], ast.Load())
        return ast.Call(name, [self.visit(node.left), self.visit(node.right)], [])

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Call(ast.Name("int32", ast.Load()), [node], []) if type(node.value) is int else node


@intrinsic
def whole_at(typing, address, i):
    """The i-th int64 from an address."""

    def codegen(context, builder, signature, args):
        return builder.load(_place(builder, _I64, *args))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def single_at(typing, address, i):
    """The i-th float from an address."""

    def codegen(context, builder, signature, args):
        return builder.load(_place(builder, _F32, *args))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def set_single(typing, address, i, x):
    """Sets the i-th float from an address."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _place(builder, _F32, *args[:2]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def set_byte(typing, address, i, x):
    """Sets the i-th byte from an address."""

    def codegen(context, builder, signature, args):
        builder.store(builder.trunc(args[2], _I8), _place(builder, _I8, *args[:2]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int32), codegen


def _place(builder: Any, stored: Any, address: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(address, stored.as_pointer()), [index])


@intrinsic
def scratch(typing):
    """The address of room for the blocks of all states of an element on the stack."""

    def codegen(context, builder, signature, args):
        room = cgutils.alloca_once(builder, _F32, size=MOST_CODED * BLOCK)
        return builder.ptrtoint(room, _I64)

    return types.int64(), codegen


@njit(**INLINE)
def _where(condition, x, y):
    return x if condition else y


@njit(**INLINE)
def _at_most(x, top):
    return x if x < top else top


@njit(**INLINE)
def _at_least(x, bottom):
    return x if x > bottom else bottom


NAMES: dict[str, Any] = {
    "bits_of": bits_of,
    "float_of": float_of,
    "at_most": _at_most,
    "at_least": _at_least,
    "where": _where,
    "int32": np.int32,
    **dict(OPERATIONS.values()),
    **{name: np.float32(value) for name, value in device.SINGLES.items()},
}


def element(name: str) -> Function:
    """A function of elements of kernels/storage.py, compiled."""
    compiled: Function = njit(**INLINE)(folded(getattr(device, name), NAMES, {}, _Narrow()))
    return compiled


magnitude = NAMES["magnitude"] = element("magnitude")
trimmed, split, joined, scale_of = map(element, ("trimmed", "split", "joined", "scale_of"))
signed_code, signed_level = element("signed_code"), element("signed_level")
nonnegative_code, nonnegative_level = element("nonnegative_code"), element("nonnegative_level")
CODE = {"signed": signed_code, "nonnegative": nonnegative_code}
TOP = {"signed": np.float32(256), "nonnegative": np.float32(1)}
