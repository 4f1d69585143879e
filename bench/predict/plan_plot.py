"""The figure of plan.py: time of a step over the number of GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..measure.baselines import METHODS
from ..report import plots

Results = dict[str, Any]
# Ours in the strong colours; the same work has the same line style.
LINES = {
    "torch_fused": (plots.INK, "-"),
    "own_plain": (plots.COLOURS["own_plain"], "-"),
    "eager_chain": (plots.COLOURS["eager_gc_fused"], "--"),
    "own_chain": (plots.COLOURS["own_gc"], "--"),
}


def draw(results: Results, title: str, path: Path) -> Path:
    """Both axes are logarithmic; the dotted line is what the memory alone would take."""
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(9.5, 4.6))
        axes = figure.subplots(1, 1, gridspec_kw={"left": 0.09, "top": 0.93, "right": 0.97})
        sizes = [found["gpus"] for found in results["plans"]]
        for name, (colour, style) in LINES.items():
            if times := _milliseconds(results, name, "total"):
                label = METHODS[name].title
                axes.plot(sizes, times, style, color=colour, marker="o", linewidth=2.2, label=label)
        floor = _milliseconds(results, "own_plain", "memory")
        axes.plot(sizes, floor, ":", color=plots.SOFT, linewidth=1.6, label="fusedcalib, memory alone")
        _axes(axes, sizes)
        axes.legend(frameon=False, fontsize=10, loc="best")
        subtitle = f"{title}\nOn paper: no GPU was measured"
        plots.heading(figure, headline(results), subtitle)
        figure.savefig(path, bbox_inches="tight")
    return path


def headline(results: Results) -> str:
    """What binds our plain step, and from where on."""
    bounds = {
        found["gpus"]: step["bound"]
        for found in results["plans"]
        for step in found["steps"]
        if step["name"] == "own_plain"
    }
    by_memory = [size for size, bound in bounds.items() if bound == "memory"]
    others = [size for size, bound in bounds.items() if bound != "memory"]
    if not others or not by_memory:
        return (
            f"A plain step on {results['model']} is bound by the {'host' if others else 'memory'} throughout"
        )
    return (
        f"A plain step on {results['model']}: memory decides up to {max(by_memory):,} GPUs, the host "
        f"from {min(others):,} on"
    )


def _milliseconds(results: Results, name: str, part: str) -> list[float]:
    steps = (step for found in results["plans"] for step in found["steps"] if step["name"] == name)
    return [1e3 * step["seconds"][part] for step in steps]


def _axes(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="GPUs (log scale)", ylabel="time of a step (ms, log scale)")
