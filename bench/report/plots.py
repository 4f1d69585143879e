"""The figures: training curves and step times as ratios. Each title says the finding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import tables
from .results import Results

# Okabe and Ito's palette, which colour-blind readers can tell apart; ours has the strong colours.
INK, SOFT, GRID = "#222222", "#6b6b6b", "#e4e4e4"
COLOURS = {
    "own_gc": "#0072B2",
    "own_plain": "#009E73",
    "eager_gc_fused": "#D55E00",
    "eager_gc_foreach": "#D55E00",
    "compiled_gc": "#CC79A7",
    "gc": "#0072B2",
    "plain": "#009E73",
    "torch": INK,
}
NAMES = {
    "torch": "torch.optim.AdamW",
    "plain": "fusedcalib.AdamW",
    "gc": "fusedcalib.AdamW,\ncentralize=True",
}
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


def training(results: Results, path: Path) -> Path:
    """E1: test accuracy and training loss by epoch; bands are 10-90 % of the seeds."""
    curves = results["e1"]["curves"]
    epochs = len(curves["gc"]["loss"]["median"])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 4.2))
        left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.22, "top": 0.97})
        for axes, key in ((left, "accuracy"), (right, "loss")):
            for name in ("torch", "plain", "gc"):
                _curve(axes, name, curves[name][key])
            axes.set(xlabel="epoch", xlim=(1, epochs))
            axes.set_xticks([1, *range(5, epochs + 1, 5)])
        floor = min(min(curve["accuracy"]["p10"]) for curve in curves.values())
        left.set(ylabel="test accuracy (%)", ylim=(10 * (floor // 10), 100))
        right.set(ylabel="training loss (nats, log scale)", yscale="log")
        right.yaxis.set_major_formatter("{x:g}")
        _end_labels(right, epochs, {name: curves[name]["loss"]["median"][-1] for name in NAMES})
        heading(figure, _training_title(results["e1"]), _training_subtitle(results))
        figure.savefig(path, bbox_inches="tight")
    return path


def _curve(axes: Axes, name: str, band: dict[str, list[float]]) -> None:
    """A median in its band; the plain fusedcalib is dashed, to show the torch line beneath it."""
    epochs = range(1, len(band["median"]) + 1)
    colour = COLOURS[name]
    if name != "plain":
        axes.fill_between(epochs, band["p10"], band["p90"], color=colour, alpha=0.13, linewidth=0)
    width = {"torch": 3.2, "plain": 1.6, "gc": 2.4}[name]
    style = (0, (2.5, 2)) if name == "plain" else "-"
    axes.plot(epochs, band["median"], color=colour, linewidth=width, linestyle=style)


def _end_labels(axes: Axes, x: float, ends: dict[str, float]) -> None:
    """Names at the ends of the curves, in their colours, in place of a legend.

    From the top down, each at its curve's end or, where that is taken, below the one before.
    """
    points = axes.transData.transform([(x, y) for y in ends.values()])[:, 1]
    scale = 72 / axes.figure.get_dpi()
    free = float("inf")
    order = sorted(zip(points * scale, ends, strict=True), key=lambda end: (-end[0], end[1]))
    for at, name in order:
        height = min(at, free)
        place: dict[str, Any] = {"xytext": (8, height - at), "textcoords": "offset points"}
        text = axes.annotate(NAMES[name], (x, ends[name]), va="center", **place)
        text.set(color=COLOURS[name], fontweight="bold", fontsize=9, linespacing=1.3)
        free = height - 15 * (1 + NAMES[name].count("\n"))


def _training_title(e1: dict[str, Any]) -> str:
    finals = {name: e1["curves"][name]["accuracy"]["median"][-1] for name in ("torch", "gc")}
    gain, seeds = e1["gain"], len(e1["seeds"])
    if gain["mean"] > 0:
        return (
            f"Centralized gradients: {finals['gc']:.1f} % of digits right instead of "
            f"{finals['torch']:.1f} %, better on {gain['wins']} of {seeds} seeds"
        )
    return f"Centralized gradients: no gain in accuracy here ({seeds} seeds)"


def _training_subtitle(results: Results) -> str:
    e1 = results["e1"]
    return (
        f"AdamW, small CNN without batch norm, {e1['setting']['train']} training images; line: "
        f"median, band: 10-90 % of {len(e1['seeds'])} seeds\n{tables.measured_on(results)}"
    )


RULE_METHODS = (
    ("torch_fused", "torch fused", INK),
    ("torch_foreach", "torch foreach", "#999999"),
    ("own_plain", "fusedcalib", COLOURS["own_plain"]),
    ("own_gc", "fusedcalib with GC", COLOURS["own_gc"]),
)


def rules(results: Results, path: Path) -> Path:
    """Step time of each rule over that of a stream of the bytes which it must move; bars are 10-90 %."""
    cases = tables.rule_cases(results)
    names = [case["subject"] for case in cases]
    series = [
        (title, colour, [tables.over_stream(case, name) for case in cases])
        for name, title, colour in RULE_METHODS
    ]
    label = "time of a step / time of a memory stream of its bytes, log scale"
    subtitle = f"{cases[0]['list']}, fp32\n{tables.measured_on(results)}"
    return _dots(path, names, series, label, (_rules_title(cases), subtitle))


CHAIN_METHODS = (
    ("eager", "composed around torch fused", COLOURS["eager_gc_fused"]),
    ("own", "options of fusedcalib", COLOURS["own_gc"]),
)


def chain(results: Results, path: Path) -> Path:
    """Step time with extras, composed and ours, over that of our step without; bars are 10-90 %."""
    cases = tables.chain_cases(results)
    series = [
        (title, colour, [tables.chain_ratio(case, name, "own_plain") for case in cases])
        for name, title, colour in CHAIN_METHODS
    ]
    label = "time of a step / time of fusedcalib's step without, log scale"
    subtitle = f"{cases[0]['list']}\n{tables.measured_on(results)}"
    names = [tables.chain_name(case) for case in cases]
    return _dots(path, names, series, label, (_chain_title(cases), subtitle))


def _chain_title(cases: list[dict[str, Any]]) -> str:
    """Of the step with most around it."""
    usual = [case for case in cases if (case["subject"], case["dtypes"]) == ("AdamW", "fp32")]
    spread = tables.chain_ratio(usual[-1], "own", "eager") if usual else None
    if spread is None:
        return "What a step costs with more around it"
    mark = tables.DISTURBED if spread["disturbed"] else ""
    return f"In one step / composed: {mark}{spread['median']:.2f} with {tables.chain_name(usual[-1])}"


Series = tuple[str, str, list[dict[str, Any] | None]]  # title, colour, spreads


def _dots(path: Path, names: list[str], series: list[Series], label: str, titles: tuple[str, str]) -> Path:
    """One panel of ratios, a line of it for each name, the first on top."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 0.9 + 0.34 * len(names)))
        axes = figure.subplots(1, 1, gridspec_kw={"left": 0.2, "top": 0.93})
        spreads = []
        for title, colour, found in series:
            known = [(y, spread) for y, spread in enumerate(found[::-1]) if spread]
            for y, spread in known:
                axes.plot([spread["p10"], spread["p90"]], [y, y], color=colour, linewidth=5, alpha=0.35)
            medians = [spread["median"] for _, spread in known]
            axes.plot(medians, [y for y, _ in known], "o", color=colour, markersize=7, label=title)
            spreads += [spread for _, spread in known]
        axes.axvline(1, color=INK, linewidth=1.2, zorder=1)
        axes.set_yticks(range(len(names)), names[::-1])
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        low, high = (min(s["p10"] for s in spreads), max(s["p90"] for s in spreads)) if spreads else (1, 1)
        ratio_axis(axes, low, high)
        axes.set_xlabel(label)
        below = 0.0 if len(names) > 8 else -0.24
        place: dict[str, Any] = {"loc": "upper right", "bbox_to_anchor": (0.92, below)}
        figure.legend(ncols=len(series), frameon=False, fontsize=9, **place)
        heading(figure, *titles)
        figure.savefig(path, bbox_inches="tight")
    return path


def _rules_title(cases: list[dict[str, Any]]) -> str:
    ranges = []
    for name, words in (("own_plain", "without GC"), ("own_gc", "with")):
        found = [spread["median"] for case in cases if (spread := tables.over_stream(case, name))]
        ranges.append(f"{min(found):.2f} to {max(found):.2f} {words}" if found else f"not measured {words}")
    return f"Every rule / memory stream: {', '.join(ranges)}"


def ratio_axis(axes: Axes, low: float, high: float) -> None:
    """A log axis with ticks that are read as factors."""
    axes.set_xscale("log")
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low / 1.6 <= t <= high * 1.6]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])  # noqa: RUF001
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(low * 0.85, 0.7), max(high * 1.35, 1.5))


def heading(figure: Figure, title: str, subtitle: str) -> None:
    """Title and subtitle above the panels, in line with them, whatever the figure's height."""
    height = figure.get_figheight()
    top = 1 + (0.19 * (subtitle.count("\n") + 1)) / height
    left = 0.05
    figure.text(left, top + 0.12 / height, title, fontsize=13, fontweight="bold", va="bottom")
    figure.text(left, top, subtitle, fontsize=9, color=SOFT, va="top", linespacing=1.45)
