"""Triton where it is installed, and just enough of its names where it is not.

Device functions are written once. Triton compiles them for a GPU; the package rebinds the names of
`ops.py` to run the very same sources elsewhere, which must also work where Triton cannot be installed.
"""

from types import SimpleNamespace

try:
    import triton.language as tl
    from triton import cdiv, constexpr_function, jit

    AVAILABLE = True
except ImportError:  # macOS, Windows: the sources stay readable, nothing can be launched
    AVAILABLE = False
    tl = SimpleNamespace(constexpr=lambda value=None: value)

    def jit(fn):
        return SimpleNamespace(fn=fn, __name__=fn.__name__)

    def constexpr_function(fn):
        return fn

    def cdiv(x, y):
        return -(-x // y)


__all__ = ["AVAILABLE", "cdiv", "constexpr_function", "jit", "tl"]
