"""Kernels compiled for GPUs that need not be there, and what can be read off them."""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kernel_kinds import Config

import fusedcalib
from fusedcalib import gpu
from fusedcalib.distributed import Place
from fusedcalib.kernels import launch
from fusedcalib.kernels.control import control_kernel, norm_kernel
from fusedcalib.recipe import demand_of, recipe_of
from fusedcalib.row_totals import RowTotals
from fusedcalib.scalars import scalars_of, shape_of, tape_of
from fusedcalib.tables import Scalars, Slot, build_buckets

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


def _tensor(config: Config, dtype: torch.dtype, of_param: bool) -> torch.Tensor:
    shape = config.shape
    if not of_param or config.slicing in ("", "ranks", "factors"):
        return torch.zeros(shape, dtype=dtype)
    if config.slicing == "unaligned":
        return torch.zeros(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)
    order = {"transposed": range(len(shape))[::-1], "permuted": (0, 3, 1, 2)}[config.slicing]
    inverse = [list(order).index(d) for d in range(len(shape))]
    return torch.zeros([shape[d] for d in order], dtype=dtype).permute(inverse)


@functools.cache
def spec_of(config: Config) -> launch.Spec:
    """What the package compiles for a parameter on a GPU, found out without one."""
    p, g, state = (_tensor(config, d, i == 0) for i, d in enumerate(config.dtypes))
    param = torch.nn.Parameter(p)
    param.grad_dtype = config.dtypes[1]
    param.grad = g
    optimizer = getattr(fusedcalib, config.rule)([param], **dict(config.options))
    (group,) = optimizer.param_groups
    demand = demand_of([group], None, None)
    recipe = recipe_of(optimizer.rule, group, demand)
    recipe = replace(recipe, flags=recipe.flags._replace(skips=demand.tentative))
    states = tuple(state.float() if name == "ema" else state for name in recipe.states)
    scalars = Scalars()
    scalars.set([scalars_of(recipe, group, 1.0)])
    place = Place(0, 8 * p.shape[-1], mesh="eight", across=(0,)) if config.slicing == "ranks" else None
    factors = torch.ones(p.shape[0]) if config.slicing == "factors" else None
    slot = Slot(param, states, 0, recipe, gpu.EXECUTOR, place=place, factors=factors)
    (bucket,) = build_buckets([slot], scalars, totals=RowTotals([slot]).parts)
    return gpu.spec_of(bucket)


class Compiled(NamedTuple):
    """One kernel for one target."""

    spec: launch.Spec
    target: str
    asm: dict[str, Any]

    @property
    def threads(self) -> int:
        return self.spec.built.warps * TARGETS[self.target][2]

    @property
    def elements(self) -> int:
        """Elements of a tile for each thread."""
        return self.spec.built.rows * self.spec.built.columns // self.threads

    @property
    def ptx(self) -> "Counter[str]":
        """How often each instruction stands in the PTX, modifiers included."""
        return Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)", self.asm["ptx"], re.M))

    def bytes_moved(self, kind: str) -> float:
        """Bytes for each element that 128-bit accesses move ("ld" or "st")."""
        accesses = (n for name, n in self.ptx.items() if re.fullmatch(rf"{kind}\.global\S*\.v4\.\w32", name))
        return 16 * sum(accesses) / self.elements

    @property
    def inexact(self) -> list[str]:
        """Instructions that fuse two operations, approximate one or cut a result off."""
        return [name for name in self.ptx if re.search(r"fma|approx|div\.full|\.ftz|\.rz\.bf16", name)]

    def narrow(self, kind: str) -> int:
        """Accesses of the global memory that are not of 128 bits."""
        found = {n: c for n, c in self.ptx.items() if n.startswith(f"{kind}.global")}
        return sum(c for n, c in found.items() if not re.search(r"\.v4\.\w32$", n))


def traffic(config: Config) -> tuple[int, int]:
    """Bytes for each element that the step kernel has to read and to write.

    Where a program walks its row again, the mean takes what it is of and projection the new parameter.
    """
    spec = spec_of(config)
    p, g, *states = (dtype.primitive_bitwidth // 8 for dtype in spec.dtypes)
    read, written = p + g + sum(states), p + sum(states)
    if spec.built.reduction == "loop":
        of_penalties = spec.flags.decay == "coupled" or spec.flags.l1
        read += g + of_penalties * p if spec.flags.centralize == "gradient" else 0
        again = spec.flags.project * (p + spec.flags.ema * 4)
        read, written = read + again, written + again
    return read, written


def compiled(config: Config, target: str = "sm_90", kernel: str = "step") -> Compiled:
    return compiled_for(spec_of(config), target, kernel)


@functools.cache
def compiled_for(spec: launch.Spec, target: str = "sm_90", kernel: str = "step") -> Compiled:
    from triton import compile as compile_for
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = spec.constants()
    scalar = "*fp64" if spec.compute == launch.dtype_of("float64") else "*fp32"
    tables = {"table": "*i64", "tiles": "*i32", "scalars": scalar, "sums": scalar}
    source = ASTSource(
        fn=launch.KERNELS[kernel],
        signature={**tables, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
    )
    options = {"num_warps": spec.built.warps, **launch.OPTIONS}
    built = compile_for(source, target=GPUTarget(*TARGETS[target]), options=options)
    return Compiled(spec, target, dict(built.asm))


# What `decide` of kernels/control.py takes, with everything there can be.
CONTROL = ("*i32", "*fp64", "*i64", "*i32", "*i32", "*fp32", "*fp32", "*fp32", "*fp32", "*fp32", "*fp64")
CONTROL += ("*fp32", "*fp64")


def decision_of(rule: str, check: bool = True) -> launch.Decision:
    """What is compiled of a rule's scalars."""
    optimizer = getattr(fusedcalib, rule)([torch.nn.Parameter(torch.zeros(1))])
    tape = tape_of(optimizer.rule, shape_of(optimizer.param_groups[0]))
    return launch.Decision(tape.code, tape.outputs, len(tape.leaves), check)


@functools.cache
def compiled_control(rule: str, target: str = "sm_90", config: Config | None = None) -> Compiled:
    """norm_kernel for a parameter, control_kernel where there is none; with the scalars of a rule."""
    from triton import compile as compile_for
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec = spec_of(config or Config(rule, (4096,)))
    constants = {"num_warps": 4, **decision_of(rule).constants()}
    tables: dict[str, Any] = {"squares": "*fp64"}
    if config:
        constants |= launch.norm_constants(spec)
        constants["DECIDE"] = True
        tables = {"table": "*i64", "tiles": "*i32", "share": "*i32", "partials": "*fp64", "done": "*i32"}
    fn = norm_kernel if config else control_kernel
    options = {"num_warps": constants.pop("num_warps"), **launch.OPTIONS}
    signature = {**tables, "control": CONTROL, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=fn, signature=signature, constexprs=constants)
    built = compile_for(source, target=GPUTarget(*TARGETS[target]), options=options)
    return Compiled(spec, target, dict(built.asm))


def _tool(name: str, *arguments: str, cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [getattr(knobs.nvidia, name).path, *arguments, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def spilled(built: Compiled) -> int:
    """Bytes of stack, where registers are spilled to; on AMD also the number of vector registers.

    Scalar ones go to lanes of those: where that is not enough, to the stack.
    """
    if "cubin" not in built.asm:
        found = re.findall(r"(?:vgpr_spill_count|private_segment_fixed_size): *(\d+)", built.asm["amdgcn"])
        assert len(found) >= 2
        return sum(map(int, found))
    usage = _tool("cuobjdump", "-res-usage", cubin=built.asm["cubin"])
    return sum(map(int, re.search(r"REG:\d+ STACK:(\d+) .*LOCAL:(\d+)", usage).groups()))


def sass(built: Compiled) -> list[str]:
    """Instructions of the machine code, in order."""
    text = _tool("nvdisasm", "-c", cubin=built.asm["cubin"])
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text, re.M)


def spilled_in_loops(built: Compiled) -> int:
    """Accesses of spilled registers in the loops of the machine code; on AMD spilled registers anywhere."""
    if "cubin" not in built.asm:
        return spilled(built)
    text = _tool("nvdisasm", "-c", cubin=built.asm["cubin"])
    lines = [line for line in text.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/|\.L_x_\d+:", line)]
    labels = {line.strip(":"): i for i, line in enumerate(lines) if line.startswith(".L")}
    ends = [
        (labels[m[1]], i) for i, line in enumerate(lines) if (m := re.search(r"BRA.*\((\.L_x_\d+)\)", line))
    ]
    loops = [range(start, end) for start, end in ends if start < end]
    assert loops
    return sum(bool(re.search(r"\b(STL|LDL)", lines[i])) for i in {i for loop in loops for i in loop})
