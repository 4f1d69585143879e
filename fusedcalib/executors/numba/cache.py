"""Compiled loops kept on disk: another process need not compile them again.

numba numbers functions from 1 in every process: two that were compiled in different ones may have one name,
and a linker takes the first that it knows. So a loop is kept with one name to the outside, which is its own.
What cannot be kept, found or trusted is compiled.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llvmlite
import numba
import torch
from llvmlite import binding
from numba.core import config
from numba.core.registry import cpu_target
from numba.core.runtime.nrt import rtsys

from ...kernels import stages
from ...layout.buckets import GEOMETRY
from ...layout.recipe import Recipe
from ..source import Function, source_of
from .runs import NAMES

MOST = 1024  # loops, of some 30 KB; those go that were not used for longest
_HERE = Path(__file__).resolve().parent
_FILES = [*_HERE.glob("*.py"), _HERE.parent / "source.py", *Path(stages.__file__).parent.glob("*.py")]
# As they are imported: read later they may have been changed.
_SOURCES = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(_FILES)]


def on_disk(compiled: Function) -> Function:
    """`compiled(*kind)`, a `numba.cfunc` of one int64, or what a process has kept of it.

    FUSEDCALIB_CACHE=0 in the environment keeps and finds nothing.
    """

    @wraps(compiled)
    def found_or_compiled(*kind: Any) -> Any:
        file = None
        with suppress(Exception):  # whatever is wrong with a file, or with what numba has inside
            if os.environ.get("FUSEDCALIB_CACHE") != "0":
                file = folder() / f"{key_of(compiled.__qualname__, kind)}.loop"
                return SimpleNamespace(ctypes=ctypes.CFUNCTYPE(None, ctypes.c_int64)(_read(file)))
        loop = compiled(*kind)
        with suppress(Exception):
            if file:
                _write(file, loop)
        return loop

    return found_or_compiled


def folder() -> Path:
    """Where loops are kept."""
    base = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fusedcalib" / "loops"


# -- what tells loops apart ---------------------------------------------------------------------


def key_of(name: str, kind: tuple[Any, ...]) -> str:
    """The same in every process that would compile the same; TypeError where that cannot be known."""
    return hashlib.sha256("\n".join([_compiler(), name, *_texts(kind)]).encode()).hexdigest()


@cache
def _compiler() -> str:
    """What all loops depend on: the package's source, the compiler and its settings, the CPU."""
    settings = {name: value for name, value in vars(config).items() if name.isupper()}
    own = {name: value for name, value in settings.items() if "THREADS" not in name and "CACHE" not in name}
    versions = (sys.version, numba.__version__, llvmlite.__version__, binding.llvm_version_info)
    return repr((_SOURCES, GEOMETRY, versions, _target(), sorted(own.items())))


def _target() -> tuple[str, str, str]:
    """Triple, name and features of the CPU that numba compiles for."""
    target: tuple[str, str, str] = cpu_target.target_context.codegen().magic_tuple()
    return target


def _texts(value: Any) -> Iterator[str]:
    """What a part of a kind is told by: never an address."""
    if isinstance(value, Recipe):
        yield from _texts((value.flags, value.storage))
        trust = value.rule.trust
        for function in (value.rule.update, *((trust.squares, trust.factor) if trust else ())):
            yield from _sources(function)
    elif isinstance(value, tuple):
        yield f"{type(value).__name__} of {len(value)}"
        for item in value:
            yield from _texts(item)
    elif value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        yield repr(value)
    else:
        raise TypeError(f"{value!r} may be another elsewhere")


def _sources(function: Any) -> Iterator[str]:
    """What a device function is told by: its source, what it was compiled to, what its names stand for."""
    fn = source_of(function)
    if fn.__closure__:
        raise TypeError(f"{fn.__name__} depends on where it was made")
    code, names = fn.__code__, fn.__globals__
    yield from (inspect.getsource(fn), code.co_code.hex())
    yield from _texts((code.co_consts, fn.__defaults__))
    for name in sorted({*code.co_names} & names.keys() - NAMES.keys()):
        value = source_of(names[name])
        yield name
        yield from _sources(value) if hasattr(value, "__code__") else _texts(value)


# -- files: a digest of the rest, the names that a loop calls, its object code -------------------


def _read(file: Path) -> int:
    """The address of a loop; an exception if there is none, or one that somebody else may have written."""
    with file.open("rb") as opened:
        found = [file.parent.stat(), os.fstat(opened.fileno())]
        if os.name == "posix" and any(s.st_uid != os.geteuid() or s.st_mode & 0o022 for s in found):
            raise PermissionError(f"others can write {file}")
        digest, rest = opened.read().split(b"\n", 1)
    if _digest(file, rest) != digest:
        raise ValueError(f"{file} is damaged")
    engine = _engine()
    called, code = rest.split(b"\n", 1)
    if not all(map(binding.address_of_symbol, called.decode().split())):
        raise LookupError("the linker ends a process that lacks a name")
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    with suppress(OSError):
        os.utime(file)
    address: int = engine.get_function_address(_name(file))
    return address


def _write(file: Path, loop: Any) -> None:
    """Keeps a loop, whole or not at all."""
    module = binding.parse_assembly(loop.inspect_llvm())
    values = [*module.functions, *module.global_variables]
    for value in values:
        if value.name == loop.native_name:
            value.name = _name(file)
        elif not value.is_declaration:
            value.linkage = "internal"
    called = [v.name for v in values if v.is_declaration and not v.name.startswith("llvm.")]
    rest = " ".join(called).encode() + b"\n" + _machine().emit_object(module)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(_digest(file, rest) + b"\n" + rest)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
    _make_room(file.parent)


def _make_room(at: Path) -> None:
    """Where there are too many a quarter goes, what was used least recently, so that this is seldom."""
    files = list(at.iterdir())  # also what was left by a process that died
    if len(files) > MOST:
        for file in sorted(files, key=lambda file: file.stat().st_mtime)[: len(files) - MOST * 3 // 4]:
            file.unlink(missing_ok=True)


def _digest(file: Path, rest: bytes) -> bytes:
    return hashlib.sha256(file.name.encode() + rest).hexdigest().encode()


def _name(file: Path) -> str:
    """Of a loop, to the linker."""
    return f"fusedcalib_{file.stem}"


@cache
def _machine() -> Any:
    """As numba's own: what it compiles to is what it would have run."""
    triple, cpu, features = _target()
    relocation = "static" if triple.startswith(("x86", "i386")) else "default"
    options = {"cpu": cpu, "features": features, "reloc": relocation, "codemodel": "jitdefault", "jit": True}
    return binding.Target.from_triple(triple).create_target_machine(opt=int(vars(config)["OPT"]), **options)


@cache
def _engine() -> Any:
    """A linker that knows nothing of numba's own."""
    rtsys.initialize(cpu_target.target_context)  # defines names of its own
    return binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
