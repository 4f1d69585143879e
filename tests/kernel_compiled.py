"""What the package compiles for the parameters of the tests: see bench/predict/compiled.py."""

import functools
import re
from dataclasses import replace

import torch
from kernel_kinds import Config

import fusedcalib
from fusedcalib.bench.models.traffic import traffic as moved_by
from fusedcalib.bench.predict import compiled as on_paper
from fusedcalib.bench.predict.compiled import TARGETS, Compiled, compiled_for, sass, tool_output, usage
from fusedcalib.executors.triton import run as gpu
from fusedcalib.executors.triton.executor import EXECUTOR
from fusedcalib.kernels import launch
from fusedcalib.layout.buckets import Slot
from fusedcalib.layout.recipe import needs_of, recipe_of
from fusedcalib.layout.scalars import Scalars, scalars_of, shape_of, tape_of
from fusedcalib.layout.shards import Place
from fusedcalib.layout.split_rows import RowTotals
from fusedcalib.layout.tables import build_buckets

KERNELS = launch.KERNELS


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
    needs = needs_of([group], None, None)
    recipe = recipe_of(optimizer.rule, group, needs)
    recipe = replace(recipe, flags=recipe.flags._replace(skips=needs.tentative))
    states = tuple(state.float() if name == "ema" else state for name in recipe.states)
    scalars = Scalars()
    scalars.set([scalars_of(recipe, group, 1.0)])
    place = Place(0, 8 * p.shape[-1], mesh="eight", across=(0,)) if config.slicing == "ranks" else None
    factors = torch.ones(p.shape[0]) if config.slicing == "factors" else None
    slot = Slot(param, states, 0, recipe, EXECUTOR, place=place, factors=factors)
    (bucket,) = build_buckets([slot], scalars, totals=RowTotals([slot]).parts)
    return gpu.spec_of(bucket)


def traffic(config: Config) -> tuple[int, int]:
    """Bytes for each element that the step kernel has to read and to write, also those of a second walk."""
    spec = spec_of(config)
    sizes = [dtype.primitive_bitwidth // 8 for dtype in spec.DTYPES]
    return moved_by("step", spec.FLAGS, sizes, spec.REDUCTION == "loop").accessed


def compiled(config: Config, target: str = "sm_90", kernel: str = "step") -> Compiled:
    return compiled_for(spec_of(config), target, kernel)


def decider_of(rule: str, check: bool = True) -> launch.DeciderSpec:
    """What is compiled of a rule's scalars."""
    optimizer = getattr(fusedcalib, rule)([torch.nn.Parameter(torch.zeros(1))])
    tape = tape_of(optimizer.rule, shape_of(optimizer.param_groups[0]))
    return launch.DeciderSpec(tape.code, tape.outputs, len(tape.leaves), check)


def compiled_control(rule: str, target: str = "sm_90", config: Config | None = None) -> Compiled:
    """norm_kernel for a parameter, control_kernel where there is none; with the scalars of a rule."""
    if config is None:
        return on_paper.compiled_control(decider_of(rule), target)
    return on_paper.compiled_norm(spec_of(config), decider_of(rule), target)


def spilled(built: Compiled) -> int:
    """Bytes of stack, where registers are spilled to; on AMD also the number of vector registers."""
    return usage(built).stack


def spilled_in_loops(built: Compiled, which: slice = slice(None)) -> int:
    """Accesses of spilled registers in loops, in their order; on AMD spilled registers anywhere."""
    if "cubin" not in built.asm:
        return usage(built).stack
    text = tool_output("nvdisasm", "-c", cubin=built.asm["cubin"])
    lines = [line for line in text.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/|\.L_x_\d+:", line)]
    labels = {line.strip(":"): i for i, line in enumerate(lines) if line.startswith(".L")}
    ends = [
        (labels[m[1]], i) for i, line in enumerate(lines) if (m := re.search(r"BRA.*\((\.L_x_\d+)\)", line))
    ]
    loops = sorted((range(start, end) for start, end in ends if start < end), key=lambda r: r.start)[which]
    assert loops
    return sum(bool(re.search(r"\b(STL|LDL)", lines[i])) for i in {i for loop in loops for i in loop})


__all__ = [
    "KERNELS",
    "TARGETS",
    "Compiled",
    "compiled",
    "compiled_control",
    "compiled_for",
    "decider_of",
    "sass",
    "spec_of",
    "spilled",
    "spilled_in_loops",
    "traffic",
]
