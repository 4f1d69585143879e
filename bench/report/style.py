"""What all figures look like: colours, the heading, a panel with a line for each name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart; ours has the strong colours.
INK, SOFT, GRID = "#222222", "#6b6b6b", "#e4e4e4"
BLUE, GREEN, ORANGE, PINK = "#0072B2", "#009E73", "#D55E00", "#CC79A7"
COLOURS = {
    **dict.fromkeys(("own_gc", "own_chain", "gc"), BLUE),
    **dict.fromkeys(("own_plain", "plain"), GREEN),
    **dict.fromkeys(("eager_gc_fused", "eager_gc_foreach", "eager_chain"), ORANGE),
    "compiled_gc": PINK,
    "torch": INK,
}
WIDTH = 9.5  # inches
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
}


@contextmanager
def figure(
    path: Path, height: float, titles: tuple[str, str], shape: tuple[int, int] = (1, 1), **options: Any
) -> Iterator[list[Axes]]:
    """The panels of a figure, written when all is drawn; `titles`: the finding, and what it is of."""
    with mpl.rc_context(STYLE):
        made = Figure(figsize=(WIDTH, height))
        share = options.pop("sharex", False)
        yield list(made.subplots(*shape, sharex=share, squeeze=False, gridspec_kw=options).flat)
        _heading(made, *titles)
        made.savefig(path, bbox_inches="tight")


def _heading(made: Figure, title: str, subtitle: str) -> None:
    """Title and subtitle above the panels, in line with them, whatever the figure's height."""
    height, left = made.get_figheight(), 0.05
    top = 1 + (0.19 * (subtitle.count("\n") + 1)) / height
    made.text(left, top + 0.12 / height, title, fontsize=13, fontweight="bold", va="bottom")
    made.text(left, top, subtitle, fontsize=9, color=SOFT, va="top", linespacing=1.45)


def name_lines(axes: Axes, names: Sequence[str], middle: float = 1) -> None:
    """A line of the panel for each name, from below, and one across them where nothing differs."""
    axes.axvline(middle, color=INK, linewidth=1.2, zorder=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def bar(axes: Axes, y: float, ends: tuple[float, float], colour: str, alpha: float = 0.35) -> None:
    """How far a number may be off."""
    axes.plot(ends, [y, y], color=colour, linewidth=5, alpha=alpha)


def dot(axes: Axes, y: float, middle: float, colour: str, size: float = 7, **more: Any) -> None:
    axes.plot(middle, y, "o", color=colour, markersize=size, **more)


def ratio_axis(axes: Axes, low: float, high: float) -> None:
    """A log axis with ticks that are read as factors."""
    axes.set_xscale("log")
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low / 1.6 <= t <= high * 1.6]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])  # noqa: RUF001
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(low * 0.85, 0.7), max(high * 1.35, 1.5))
