"""A device function's source, run elsewhere: the names of `kernels/ops.py` rebound to another executor's.

One source per rule, several executors. In plain torch a rule runs as the Python function it is. For numba
its compile-time arguments (those in capitals) are folded away first, so that it sees no strings and no
branch that is never taken.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Callable, Mapping
from typing import Any

Function = Callable[..., Any]


def source_of(device_function: Any) -> types.FunctionType:
    """The Python function under `@triton.jit`."""
    return getattr(device_function, "fn", device_function)  # type: ignore[no-any-return]


def rebound(device_function: Any, names: Mapping[str, Any]) -> Function:
    """The device function as a plain Python function over other `names`."""
    fn = source_of(device_function)
    return types.FunctionType(fn.__code__, {**fn.__globals__, **names}, fn.__name__)


def folded(
    device_function: Any,
    names: Mapping[str, Any],
    constants: Mapping[str, Any],
    changes: ast.NodeTransformer | None = None,
) -> Function:
    """The device function over other `names`, its compile-time arguments replaced by `constants`.

    changes: what else is done to its source.
    """
    fn = source_of(device_function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    ast.increment_lineno(tree, fn.__code__.co_firstlineno - 1)
    tree = _Fold(constants).visit(tree)
    tree = ast.fix_missing_locations(changes.visit(tree) if changes else tree)
    namespace = {**fn.__globals__, **names}
    exec(compile(tree, fn.__code__.co_filename, "exec"), namespace)
    return namespace[fn.__name__]  # type: ignore[no-any-return]


def _is_constant(node: ast.expr) -> bool:
    """Whether an argument is a compile-time one."""
    return isinstance(node, ast.Name) and node.id.isupper()


class _Fold(ast.NodeTransformer):
    """Drops names in capitals from definitions, calls and assignments, and the branches they rule out."""

    def __init__(self, constants: Mapping[str, Any]) -> None:
        self._constants = dict(constants)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = []
        node.args.args = [a for a in node.args.args if not a.arg.isupper()]
        for argument in node.args.args:
            argument.annotation = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        return None if _is_constant(node.target) else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.args = [a for a in node.args if not _is_constant(a)]
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        used = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
        if not used <= self._constants.keys():
            return self.generic_visit(node)
        test = compile(ast.Expression(node.test), "<constant>", "eval")
        taken = node.body if eval(test, {}, self._constants) else node.orelse
        kept: list[ast.stmt] = []
        for statement in taken:
            visited = self.visit(statement)
            kept += visited if isinstance(visited, list) else [visited]
        return kept or [ast.Pass()]
