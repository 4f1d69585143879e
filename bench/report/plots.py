"""The figures of results: training curves, step times as ratios. Each title says the finding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from . import tables
from .records import Band, Spread, Training
from .results import Measured, Results, Row
from .style import COLOURS, INK, SOFT, bar, dot, figure, name_lines, ratio_axis

NAMES = {
    "torch": "torch.optim.AdamW",
    "plain": "fusedcalib.AdamW",
    "gc": "fusedcalib.AdamW,\ncentralize=True",
}
BUSY = "Step times on a busy machine: do not rely on them"


# -- training


def training(results: Results, path: Path) -> Path:
    """E1: test accuracy and training loss by epoch; bands are 10-90 % of the seeds."""
    e1 = results.e1
    assert e1 is not None
    curves = e1.curves
    epochs = len(curves["gc"].loss.median)
    subtitle = (
        f"AdamW, small CNN without batch norm, {e1.setting['train']} training images; line: "
        f"median, band: 10-90 % of {len(e1.seeds)} seeds\n{results.measured_on}"
    )
    with figure(path, 4.2, (_training_title(e1), subtitle), (1, 2), wspace=0.22, top=0.97) as (left, right):
        for name in NAMES:
            _curve(left, name, curves[name].accuracy)
            _curve(right, name, curves[name].loss)
        for axes in (left, right):
            axes.set(xlabel="epoch", xlim=(1, epochs))
            axes.set_xticks([1, *range(5, epochs + 1, 5)])
        floor = min(min(curve.accuracy.p10) for curve in curves.values())
        left.set(ylabel="test accuracy (%)", ylim=(10 * (floor // 10), 100))
        right.set(ylabel="training loss (nats, log scale)", yscale="log")
        right.yaxis.set_major_formatter("{x:g}")
        _end_labels(right, epochs, {name: curves[name].loss.median[-1] for name in NAMES})
    return path


def _curve(axes: Axes, name: str, band: Band) -> None:
    """A median in its band; the plain fusedcalib is dashed, to show the torch line beneath it."""
    epochs = range(1, len(band.median) + 1)
    colour = COLOURS[name]
    if name != "plain":
        axes.fill_between(epochs, band.p10, band.p90, color=colour, alpha=0.13, linewidth=0)
    width = {"torch": 3.2, "plain": 1.6, "gc": 2.4}[name]
    style = (0, (2.5, 2)) if name == "plain" else "-"
    axes.plot(epochs, band.median, color=colour, linewidth=width, linestyle=style)


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


def _training_title(e1: Training) -> str:
    finals = {name: e1.curves[name].accuracy.median[-1] for name in ("torch", "gc")}
    gain, seeds = e1.gain, len(e1.seeds)
    if gain.mean > 0:
        return (
            f"Centralized gradients: {finals['gc']:.1f} % of digits right instead of "
            f"{finals['torch']:.1f} %, better on {gain.wins} of {seeds} seeds"
        )
    return f"Centralized gradients: no gain in accuracy here ({seeds} seeds)"


# -- a line for each rule, or each chain


def rules(results: Results, path: Path) -> Path:
    """Step time of each rule over that of a stream of the bytes which it must move; bars are 10-90 %."""
    cases = results.of_rules
    series = [
        (title, colour, [case.over_stream(name) for case in cases])
        for name, title, colour in (
            ("torch_fused", "torch fused", INK),
            ("torch_foreach", "torch foreach", "#999999"),
            ("own_plain", "fusedcalib", COLOURS["own_plain"]),
            ("own_gc", "fusedcalib with GC", COLOURS["own_gc"]),
        )
    ]
    ranges = []
    for (_, _, spreads), words in zip(series[2:], ("without GC", "with"), strict=True):
        found = [spread.median for spread in spreads if spread]
        ranges.append(f"{min(found):.2f} to {max(found):.2f} {words}" if found else f"not measured {words}")
    title = f"Every rule / memory stream: {', '.join(ranges)}"
    label = "time of a step / time of a memory stream of its bytes, log scale"
    subtitle = f"{cases[0].list}, fp32\n{results.measured_on}"
    return _dots(path, [case.subject for case in cases], series, label, (title, subtitle))


def chain(results: Results, path: Path) -> Path:
    """Step time with extras, composed and ours, over that of our step without; bars are 10-90 %."""
    cases = results.of_chains
    series = [
        (title, COLOURS[f"{name}_chain"], [tables.chain_ratio(case, name, "own_plain") for case in cases])
        for name, title in (("eager", "composed around torch fused"), ("own", "options of fusedcalib"))
    ]
    label = "time of a step / time of fusedcalib's step without, log scale"
    subtitle = f"{cases[0].list}\n{results.measured_on}"
    names = [tables.chain_name(case) for case in cases]
    return _dots(path, names, series, label, (_chain_title(cases), subtitle))


def _chain_title(cases: list[Measured]) -> str:
    """The finding of the step with most around it."""
    usual = [case for case in cases if (case.subject, case.dtypes) == ("AdamW", "fp32")]
    spread = tables.chain_ratio(usual[-1], "own", "eager") if usual else None
    if spread is None:
        return "What a step costs with more around it"
    mark = tables.DISTURBED * spread.disturbed
    return f"In one step / composed: {mark}{spread.median:.2f} with {tables.chain_name(usual[-1])}"


Series = tuple[str, str, list[Spread | None]]  # title, colour, spreads


def _dots(path: Path, names: list[str], series: list[Series], label: str, titles: tuple[str, str]) -> Path:
    """One panel of ratios, a line of it for each name, the first on top."""
    with figure(path, 0.9 + 0.34 * len(names), titles, left=0.2, top=0.93) as (axes,):
        for title, colour, found in series:
            known = [(y, spread) for y, spread in enumerate(found[::-1]) if spread]
            for y, spread in known:
                bar(axes, y, (spread.p10, spread.p90), colour)
            medians = [spread.median for _, spread in known]
            axes.plot(medians, [y for y, _ in known], "o", color=colour, markersize=7, label=title)
        name_lines(axes, names[::-1])
        _ratios_on(axes, [spread for _, _, found in series for spread in found if spread], label)
        place: dict[str, Any] = {"bbox_to_anchor": (0.92, 0.0 if len(names) > 8 else -0.24)}
        made: Any = axes.figure
        made.legend(ncols=len(series), frameon=False, fontsize=9, loc="upper right", **place)
    return path


def _ratios_on(axes: Axes, spreads: list[Spread], label: str) -> None:
    low, high = min((s.p10 for s in spreads), default=1), max((s.p90 for s in spreads), default=1)
    ratio_axis(axes, low, high)
    axes.set_xlabel(label)


# -- a panel for each case

Shown = tuple[Measured, str, str]  # case, what is compared with, title


def steps(results: Results, path: Path, names: list[str] | None = None) -> Path:
    """Step time of each method over torch fused's, one panel for each list; bars are 10-90 %."""
    fp32 = [case for case in results.cases if case.kind == ("fp32", "AdamW", "")]
    cases = [case for case in fp32 if names is None or case.list in names]
    shown = [(case, "torch_fused", case.title) for case in cases]
    return _panels(results, path, shown, "torch.optim.AdamW(fused=True)", _steps_title(cases))


def compared(results: Results, path: Path) -> Path:
    """Every case of a run, each method over the one that its table compares with."""
    shown = [
        (case, case.base, f"{case.title}; 1 is {case.base_title}") for case in results.cases if case.base
    ]
    return _panels(results, path, shown, "the method named above the panel", _compared_title(shown))


def _panels(results: Results, path: Path, shown: list[Shown], of: str, title: str) -> Path:
    lines = [_lines(case, base) for case, base, _ in shown]
    heights = [len(rows) + 1.2 for rows in lines]
    height = 0.5 + 0.34 * sum(heights)
    top = min(0.93, 1 - 0.4 / height)  # room for the title of the first panel
    grid = {"height_ratios": heights, "hspace": 0.3, "top": top, "left": 0.2, "sharex": True}
    titles = (title, _subtitle(results, any(case.disturbed for case, _, _ in shown)))
    spreads = []
    with figure(path, height, titles, (len(shown), 1), **grid) as panels:
        for axes, (_, base, name), rows in zip(panels, shown, lines, strict=True):
            spreads += _panel(axes, rows, base)
            axes.set_title(name, color=SOFT)
        clock = "on the device" if results.device else "of a step"
        _ratios_on(panels[-1], spreads, f"time {clock} / time of {of}, log scale")
    return path


def _lines(case: Measured, base: str) -> list[Row]:
    """The measured methods of a case but the one compared with, slowest first."""
    rows = [row for row in case.methods if base in row.ratio_to and not row.name.startswith("stream_")]
    return sorted(rows, key=lambda row: -row.ratio_to[base].median)


def _panel(axes: Axes, rows: list[Row], base: str) -> list[Spread]:
    """A line for each method; returns the ratios that are shown."""
    name_lines(axes, [row.title for row in rows])
    spreads = [row.ratio_to[base] for row in rows]
    for y, (row, spread, tick) in enumerate(zip(rows, spreads, axes.get_yticklabels(), strict=True)):
        colour = COLOURS.get(row.name, COLOURS["own_gc"] if row.own else SOFT)
        tick.set(color=colour if row.own else INK, fontweight="bold" if row.own else "normal")
        bar(axes, y, (spread.p10, spread.p90), colour)
        dot(axes, y, spread.median, colour, 8)
        place: dict[str, Any] = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
        said = f"{tables.DISTURBED * spread.disturbed}{spread.median:.2f}"
        text = axes.annotate(said, (spread.p90, y), **place)
        text.set(color=colour, fontweight="bold")
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.2})
    return spreads


def _compared_title(shown: list[Shown]) -> str:
    """The finding of the first panel."""
    for case, base, _ in shown:
        for row in _lines(case, base):
            if row.own:
                spread = row.ratio_to[base]
                finding = f"{row.title} / {case.base_title}: {spread.median:.2f} on {case.list}"
                return BUSY if spread.disturbed else finding
    return "Step times"


def _steps_title(cases: list[Measured]) -> str:
    if any(case.disturbed for case in cases):
        return BUSY
    found = ((case, case.ratio("own_gc", "torch_fused")) for case in cases)
    parts = [f"{spread.median:.2f} on {case.list}" for case, spread in found if spread]
    if not parts:
        return "Step times relative to torch's fused AdamW"
    return "Step with GC / torch's fused step without: " + ", ".join(parts[:2])


def _subtitle(results: Results, disturbed: bool) -> str:
    text = "Left of the line is faster. Dot: median of ratios in interleaved rounds, bar: 10-90 %"
    if disturbed:
        text += f"\n{tables.DISTURBED}: other programs were running, and too few samples were quiet"
    return f"{text}\n{results.measured_on}"
