"""Kernels compiled for GPUs that need not be there, and what can be read off them."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from ...kernels import launch
from ...kernels.decide import control_kernel, norm_kernel
from ...kernels.launch import Control, DeciderSpec, Spec, Sums, Tile

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# What `decide` of kernels/decide.py takes, with everything there can be.
CONTROL = Control(
    sizes="*i32",
    numbers="*fp64",
    sources="*i64",
    example="*i32",
    used="*i32",
    steps="*i64",
    most="*fp32",
    products="*i64",
    grad_scale="*fp32",
    found_inf="*fp32",
    report="*fp64",
    singles="*fp32",
    doubles="*fp64",
)
SUMS = Sums(share="*i32", partials="*fp64", done="*i32")
# Bytes of an access, by the end of its name in amdgcn.
AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


class Compiled(NamedTuple):
    """One kernel for one target; `tile` is what one of its programs works on at a time."""

    spec: Spec | None
    target: str
    asm: dict[str, Any]
    tile: Tile | None = None
    shared: int = 0  # bytes of shared memory for each program
    at_once: int = 1  # tiles that are read before any is worked on

    @property
    def built(self) -> Tile:
        """The tile; only control_kernel has none."""
        assert self.tile is not None
        return self.tile

    @property
    def threads(self) -> int:
        """Threads of a program."""
        return self.built.warps * TARGETS[self.target][2]

    @property
    def elements(self) -> int:
        """Elements for each thread of the tiles that are read at once."""
        return self.at_once * self.built.rows * self.built.columns // self.threads

    @property
    def ptx(self) -> Counter[str]:
        """How often each instruction stands in the PTX, modifiers included."""
        return Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)", self.asm["ptx"], re.M))

    def accesses(self, kind: str) -> Counter[int]:
        """How many accesses of the global memory there are of each width in bytes ("ld" or "st")."""
        found: Counter[int] = Counter()
        if "ptx" in self.asm:
            for name, count in self.ptx.items():
                if match := re.fullmatch(rf"{kind}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)", name):
                    found[int(match[1] or 1) * int(match[2]) // 8] += count
            return found
        word = {"ld": "load", "st": "store"}[kind]
        for name in re.findall(rf"\b(?:global|buffer|flat)_{word}_(\w+)", self.asm["amdgcn"]):
            found[next(width for part, width in AMD_WIDTHS.items() if part in name)] += 1
        return found

    def bytes_moved(self, kind: str) -> float:
        """Bytes for each element that 128-bit accesses move ("ld" or "st")."""
        return 16 * self.accesses(kind)[16] / self.elements

    def narrow(self, kind: str) -> int:
        """Accesses of the global memory that are not of 128 bits."""
        return sum(count for width, count in self.accesses(kind).items() if width != 16)

    def widths(self, kind: str, moved: int) -> list[int]:
        """Widths of the accesses that move so many bytes of each element, the widest first.

        What is read once a program (scalars, addresses) does not count: an address is 8 bytes on its own,
        which elements in fp64 alone are too.
        """
        found = self.accesses(kind)
        if (
            kind == "ld"
            and "ptx" in self.asm
            and self.spec is not None
            and "64" not in str(self.spec.COMPUTE)
        ):
            found[8] -= sum(
                n for name, n in self.ptx.items() if re.search(r"^ld\.global(?!.*\.v\d).*64$", name)
            )
        left, used = moved * self.elements if moved else 0, []
        for width, count in sorted(found.items(), reverse=True):
            if left > 0 and count > 0:
                left -= width * count
                used.append(width)
        return used

    @property
    def inexact(self) -> list[str]:
        """Instructions that fuse two operations, approximate one or cut a result off."""
        return [name for name in self.ptx if re.search(r"fma|approx|div\.full|\.ftz|\.rz\.bf16", name)]


# -- compiling


def _compiled(
    kernel: Any,
    tables: dict[str, Any],
    spec: Any,
    warps: int,
    target: str,
    options: dict[str, Any] = launch.OPTIONS,
) -> tuple[dict[str, Any], int]:
    """Its code, and the bytes of shared memory that it takes."""
    from triton import compile as compile_for
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=kernel, signature={**tables, "SPEC": "constexpr"}, constexprs={"SPEC": spec})
    built = compile_for(source, GPUTarget(*TARGETS[target]), {"num_warps": warps, **options})
    return dict(built.asm), built.metadata.shared


@functools.cache
def compiled_for(
    spec: Spec, target: str = "sm_90", kernel: str = "step", as_arguments: bool = False
) -> Compiled:
    """One of launch.KERNELS; its scalars in a table, or its one row of them as arguments."""
    scalar = "*fp64" if "64" in str(spec.COMPUTE) else "*fp32"
    scalars: Any = ("fp32",) * spec.COUNT if as_arguments else scalar
    sums: Any = launch.Partials(scalar, "*fp64") if kernel in launch.NORMS else scalar
    lists = {"firsts" if kernel == "totals" else "tiles": "*i32", "scalars": scalars, "sums": sums}
    tables = {"table": "*i64", "grads": "*i64", **lists}
    spec = spec._replace(COUNT=0) if as_arguments else spec
    asm, shared = _compiled(launch.KERNELS[kernel], tables, spec, launch.warps_of(kernel, spec), target)
    return Compiled(spec, target, asm, spec.tile, shared)


@functools.cache
def compiled_norm(spec: Spec, decider: DeciderSpec | None, target: str = "sm_90") -> Compiled:
    """norm_kernel; without a decider only what it does of each element."""
    tables = {"table": "*i64", "grads": "*i64", "tiles": "*i32", "sums": SUMS, "control": CONTROL}
    norm, options = launch.norm_spec(spec, decider), launch.NORM_OPTIONS[TARGETS[target][0]]
    asm, shared = _compiled(norm_kernel, tables, norm, norm.SLOTS.WARPS, target, options)
    return Compiled(spec, target, asm, norm.SLOTS.tile, shared, norm.AT_ONCE)


@functools.cache
def compiled_control(decider: DeciderSpec, target: str = "sm_90") -> Compiled:
    """control_kernel, which is one program and has no tile."""
    tables = {"squares": "*fp64", "control": CONTROL}
    asm, shared = _compiled(control_kernel, tables, decider, launch.WARPS, target)
    return Compiled(None, target, asm, None, shared)


# -- reading


class Usage(NamedTuple):
    """What a thread takes: registers (vector ones on AMD) and bytes of stack."""

    registers: int
    stack: int


def usage(built: Compiled) -> Usage:
    """Registers, and where they are spilled to; on AMD with the number of vector registers that are spilled.

    Scalar ones go to lanes of those: where that is not enough, to the stack.
    """
    if "cubin" not in built.asm:
        text = built.asm["amdgcn"]
        found = re.findall(r"(?:vgpr_spill_count|private_segment_fixed_size): *(\d+)", text)
        assert len(found) >= 2
        registers = re.search(r"\.vgpr_count: *(\d+)", text)
        assert registers is not None
        return Usage(int(registers[1]), sum(map(int, found)))
    text = tool_output("cuobjdump", "-res-usage", cubin=built.asm["cubin"])
    numbers = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert numbers is not None
    registers_, stack, local = map(int, numbers.groups())
    return Usage(registers_, stack + local)


def sass(built: Compiled) -> list[str]:
    """Instructions of NVIDIA's machine code, in order."""
    text = tool_output("nvdisasm", "-c", cubin=built.asm["cubin"])
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text, re.M)


def instructions(built: Compiled) -> list[str]:
    """Instructions of the machine code that a lane takes part in: on AMD the vector ones."""
    if "cubin" in built.asm:
        return [name for name in sass(built) if name != "NOP"]
    return re.findall(r"^\s+(v_\w+|(?:global|buffer|flat|ds)_\w+)\s", built.asm["amdgcn"], re.M)


def tool_output(name: str, *arguments: str, cubin: bytes) -> str:
    """What one of NVIDIA's tools says of a kernel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [getattr(knobs.nvidia, name).path, *arguments, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
