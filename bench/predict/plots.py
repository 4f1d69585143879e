"""The figures of plans and profiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ..measure.baselines import METHODS
from ..report.style import COLOURS, INK, SOFT, figure
from .gpus import Gpu
from .plan_results import Plans
from .profile_gpu import GpuProfile
from .profile_static import StaticKernel, StaticProfile
from .static_costs import issue_rate

ON_PAPER = "On paper: no GPU was measured"
LINES = {"torch_fused": "-", "own_plain": "-", "eager_chain": "--", "own_chain": "--"}  # the same work alike
MARKS = dict(
    zip(("step", "norm", "sums", "finish", "squares", "totals", "statistics"), "os^vD.x", strict=True)
)
STEPS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5FA8", "#8C6D31")
INSIDE: Any = {"xytext": (-6, 0), "ha": "right", "va": "center", "color": "white"}
BESIDE: Any = {"xytext": (6, 0), "ha": "left", "va": "center"}


def plan(results: Plans, path: Path) -> Path:
    """Time of a step over the number of GPUs; the dotted line is what the memory alone would take."""
    titles = (plan_headline(results), f"{results.title}\n{ON_PAPER}")
    with figure(path, 4.6, titles, left=0.09, top=0.93, right=0.97) as (axes,):
        sizes = [found.gpus for found in results.plans]
        for name, style in LINES.items():
            if times := _milliseconds(results, name, "total"):
                colour, label = COLOURS.get(name, INK), METHODS[name].title
                axes.plot(sizes, times, style, color=colour, marker="o", linewidth=2.2, label=label)
        floor = _milliseconds(results, "own_plain", "memory")
        axes.plot(sizes, floor, ":", color=SOFT, linewidth=1.6, label="fusedcalib, memory alone")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _ticks(axes, sizes)
        axes.set(xlabel="GPUs (log scale)", ylabel="time of a step (ms, log scale)")
        axes.legend(frameon=False, fontsize=10, loc="best")
    return path


def _ticks(axes: Axes, values: Sequence[float]) -> None:
    """Just these on the one axis, plain numbers on the other."""
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")


def _milliseconds(results: Plans, name: str, part: str) -> list[float]:
    steps = (found.step(name) for found in results.plans)
    return [1e3 * getattr(step.seconds, part) for step in steps if step]


def plan_headline(results: Plans) -> str:
    """What binds our plain step, and from where on."""
    bounds = {found.gpus: step.bound for found in results.plans if (step := found.step("own_plain"))}
    moves = "link to the host" if results.link else "memory"
    by_bytes = [gpus for gpus, bound in bounds.items() if bound in ("memory", "link")]
    others = [gpus for gpus, bound in bounds.items() if bound not in ("memory", "link")]
    if not others or not by_bytes:
        bound = "host" if others else moves
        return f"A plain step on {results.model} is bound by the {bound} throughout"
    return (
        f"A plain step on {results.model}: {moves} decides up to {max(by_bytes):,} GPUs, the host "
        f"from {min(others):,} on"
    )


def profile(results: StaticProfile, path: Path) -> Path:
    """Executed instructions over bytes of an element; on the line the GPU takes as long for both."""
    points = [
        (case, kernel)
        for case, found in enumerate(results.cases)
        for kernel in found.kernels
        if kernel.elements
    ]
    kernels = [kernel for _, kernel in points]
    with figure(
        path, 5.6, (headline(kernels), f"{results.title}\n{ON_PAPER}"), left=0.09, top=0.93, right=0.7
    ) as (axes,):
        for case, kernel in points:
            colour = STEPS[case] if case < len(STEPS) else SOFT
            padded = kernel.executed * kernel.lanes / kernel.elements
            axes.plot(kernel.bytes, padded, MARKS[kernel.kernel], color=colour, markersize=8, alpha=0.8)
        _ridge(axes, results.gpu, sorted({kernel.bytes for kernel in kernels}))
        _legend(axes, results, {kernel.kernel for kernel in kernels})
    return path


def headline(kernels: list[StaticKernel]) -> str:
    """What binds the kernels."""
    by_issue = sum(kernel.bound == "issue" for kernel in kernels)
    if by_issue:
        return f"Instructions bind {by_issue} of {len(kernels)} kernels, the memory the others"
    nearest = max(kernel.seconds.issue / kernel.seconds.memory for kernel in kernels)
    return f"The memory binds every kernel: instructions take at most {100 * nearest:.0f} % of its time"


def _ridge(axes: Axes, gpu: Gpu, widths: list[float]) -> None:
    """The axes, and the line on which the memory and the processors take as long."""
    ends = [0.8 * widths[0], 1.25 * widths[-1]]
    ridge = issue_rate(gpu) / gpu.bandwidth  # instructions in the time of a byte
    label = f"{ridge:.1f} instructions a byte:\nboth take as long"
    axes.plot(ends, [ridge * width for width in ends], color=INK, linewidth=1.6, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(*ends)
    _ticks(axes, widths)
    axes.set(xlabel="bytes an element (log scale)", ylabel="executed instructions an element (log scale)")
    place: dict[str, Any] = {"transform": axes.transAxes, "color": SOFT}
    axes.text(0.98, 0.03, "below the line: bound by memory", ha="right", **place)
    axes.text(0.02, 0.96, "above: bound by instructions", **place)


def _legend(axes: Axes, results: StaticProfile, kernels: set[str]) -> None:
    entries = [(mark, INK, f"{name} kernel") for name, mark in MARKS.items() if name in kernels]
    for colour, case in zip(STEPS, results.cases, strict=False):
        head, dtypes, *options = case.title.split(", ")
        entries.append(("o", colour, "\n  ".join((f"{head}, {dtypes}", *options))))
    if len(results.cases) > len(STEPS):
        entries.append(("o", SOFT, "other steps"))
    for mark, colour, label in entries:
        axes.plot([], [], mark, color=colour, markersize=8, label=label)
    axes.legend(frameon=False, fontsize=10, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def measured(results: GpuProfile, path: Path) -> Path:
    """Bytes a second of each kernel, beside a copy's."""
    bars = [
        (f"{case.title}:\n{kernel.kernel} {kernel.tile}", kernel.us, kernel.gbs, kernel.pct_copy)
        for case in results.cases
        for kernel in case.kernels
        if kernel.gbs and kernel.pct_copy
    ]
    names, _, speeds, shares = zip(*bars, strict=True)
    head = f"Every kernel moves at least {min(shares):.0f} % of what a copy does"
    grid: dict[str, Any] = {"left": 0.36, "top": 0.97, "right": 0.95}
    with figure(path, 1.6 + 0.5 * len(bars), (head, results.title), **grid) as (axes,):
        axes.barh(range(len(bars)), speeds, color=STEPS[0], height=0.62)
        axes.set_yticks(range(len(bars)), names)
        axes.invert_yaxis()
        axes.axvline(results.copy_gbs, color=INK, linewidth=1.6)
        for height, (_, time, speed, share) in enumerate(bars):
            place = INSIDE if share > 30 else BESIDE
            text = f"{share:.0f} %, {time:,.0f} us"
            axes.annotate(text, (speed, height), textcoords="offset points", fontsize=9, **place)
        axes.set(xlabel="GB/s; the line is a copy in the same run")
        axes.set_xlim(0, 1.05 * max(results.copy_gbs, *speeds))
    return path
