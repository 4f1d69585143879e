"""The figure of a static profile: what each kernel takes of the memory and of the processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report import plots
from . import profile_gpu, profile_steps
from .gpus import Gpu
from .static_costs import issue_rate

Results = dict[str, Any]
MARKS = {"step": "o", "norm": "s", "sums": "^", "finish": "v"}
NAMED = 8  # colours; further steps are grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5FA8", "#8C6D31")
INSIDE: Any = {"xytext": (-6, 0), "ha": "right", "va": "center", "color": "white"}
BESIDE: Any = {"xytext": (6, 0), "ha": "left", "va": "center"}


def draw(results: Results, path: Path) -> Path:
    """Instructions over bytes of an element; on the line the GPU takes as long for both."""
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(9.5, 5.6))
        axes = figure.subplots(1, 1, gridspec_kw={"left": 0.09, "top": 0.93, "right": 0.7})
        points = [
            (case, kernel)
            for case, found in enumerate(results["cases"])
            for kernel in found["kernels"]
            if kernel["elements"]
        ]
        for case, kernel in points:
            colour = COLOURS[case] if case < NAMED else plots.SOFT
            padded = kernel["instructions"] * kernel["lanes"] / kernel["elements"]
            axes.plot(kernel["bytes"], padded, MARKS[kernel["kernel"]], color=colour, markersize=8, alpha=0.8)
        gpu = Gpu(**results["gpu"])
        _axes(axes, gpu, points)
        _legend(axes, results, {kernel["kernel"] for _, kernel in points})
        plots.heading(
            figure, headline(results), f"{profile_steps.title(results)}\nOn paper: no GPU was measured"
        )
        figure.savefig(path, bbox_inches="tight")
    return path


def draw_measured(results: Results, path: Path) -> Path:
    """Bytes a second of each kernel, beside a copy's."""
    bars = [(found, row) for found in results["cases"] for row in found["kernels"] if row["moved"]]
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(9.5, 1.6 + 0.5 * len(bars)))
        axes = figure.subplots(1, 1, gridspec_kw={"left": 0.36, "top": 0.97, "right": 0.95})
        names = [f"{profile_steps.case_title(found)}:\n{row['kernel']} {row['tile']}" for found, row in bars]
        heights = range(len(bars))
        axes.barh(heights, [row["gbs"] for _, row in bars], color=COLOURS[0], height=0.62)
        axes.set_yticks(heights, names)
        axes.invert_yaxis()
        axes.axvline(results["copy_gbs"], color=plots.INK, linewidth=1.6)
        for height, (_, row) in zip(heights, bars, strict=True):
            text = f"{row['pct_copy']:.0f} %, {row['us']:,.0f} us"
            place = INSIDE if row["pct_copy"] > 30 else BESIDE
            axes.annotate(text, (row["gbs"], height), textcoords="offset points", fontsize=9, **place)
        axes.set(xlabel="GB/s; the line is a copy in the same run")
        axes.set_xlim(0, 1.05 * max(results["copy_gbs"], *(row["gbs"] for _, row in bars)))
        slowest = min(row["pct_copy"] for _, row in bars)
        head = f"Every kernel moves at least {slowest:.0f} % of what a copy does"
        plots.heading(figure, head, profile_gpu.title(results))
        figure.savefig(path, bbox_inches="tight")
    return path


def headline(results: Results) -> str:
    """What binds the kernels."""
    kernels = [k for found in results["cases"] for k in found["kernels"] if k["elements"]]
    by_issue = [k for k in kernels if k["bound"] == "issue"]
    if not by_issue:
        nearest = max(k["seconds"]["issue"] / k["seconds"]["memory"] for k in kernels)
        return f"The memory binds every kernel: instructions take at most {100 * nearest:.0f} % of its time"
    return f"Instructions bind {len(by_issue)} of {len(kernels)} kernels, the memory the others"


def _axes(axes: Axes, gpu: Gpu, points: list[tuple[int, Results]]) -> None:
    widths = sorted({kernel["bytes"] for _, kernel in points})
    ends = [0.8 * widths[0], 1.25 * widths[-1]]
    ridge = issue_rate(gpu) / gpu.bandwidth  # instructions in the time of a byte
    label = f"{ridge:.1f} instructions a byte:\nboth take as long"
    axes.plot(ends, [ridge * width for width in ends], color=plots.INK, linewidth=1.6, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(*ends)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="bytes an element (log scale)", ylabel="instructions an element (log scale)")
    axes.text(
        0.98, 0.03, "below the line: bound by memory", transform=axes.transAxes, ha="right", color=plots.SOFT
    )
    axes.text(0.02, 0.96, "above: bound by instructions", transform=axes.transAxes, color=plots.SOFT)


def _legend(axes: Axes, results: Results, kernels: set[str]) -> None:
    for name, mark in MARKS.items():
        if name in kernels:
            axes.plot([], [], mark, color=plots.INK, markersize=8, label=f"{name} kernel")
    for colour, found in zip(COLOURS, results["cases"], strict=False):
        axes.plot([], [], "o", color=colour, markersize=8, label=_lines(found))
    if len(results["cases"]) > NAMED:
        axes.plot([], [], "o", color=plots.SOFT, markersize=8, label="other steps")
    axes.legend(frameon=False, fontsize=10, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _lines(found: Results) -> str:
    """The title of a case, its options on lines of their own."""
    head, dtypes, *options = profile_steps.case_title(found).split(", ")
    return "\n  ".join((f"{head}, {dtypes}", *options))
