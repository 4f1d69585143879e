"""The figure of step times: each method over one of them, a panel for each case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import tables
from .plots import COLOURS, INK, SOFT, STYLE, heading, ratio_axis
from .results import Results, extras_of

BUSY = "Step times on a busy machine: do not rely on them"


def steps(results: Results, path: Path, names: list[str] | None = None) -> Path:
    """Step time of each method over torch fused's, one panel for each list; bars are 10-90 %."""
    kinds = ((case, (case["dtypes"], case["subject"], extras_of(case))) for case in results["cases"])
    fp32 = [case for case, kind in kinds if kind == ("fp32", "AdamW", "")]
    cases = [case for case in fp32 if names is None or case["list"] in names]
    clock = "on the device" if results["device"] else "of a step"
    label = f"time {clock} / time of torch.optim.AdamW(fused=True), log scale"
    shown = [(case, "torch_fused", tables.case_title(case)) for case in cases]
    return _draw(path, shown, label, (_steps_title(cases), _subtitle(results, cases)))


def compared(results: Results, path: Path) -> Path:
    """Every case of a run, each method over the one that its table compares with."""
    cases = [case for case in results["cases"] if tables.base_of(case)]
    shown: list[Shown] = []
    for case in cases:
        base = tables.base_of(case) or ""
        title = next(row["title"] for row in case["methods"] if row["name"] == base)
        shown.append((case, base, f"{tables.case_title(case)}; 1 is {title}"))
    clock = "on the device" if results["device"] else "of a step"
    label = f"time {clock} / time of the method named above the panel, log scale"
    return _draw(path, shown, label, (_compared_title(shown), _subtitle(results, cases)))


def _compared_title(shown: list[Shown]) -> str:
    """Of the first panel."""
    for case, base, _ in shown:
        for name, title, spread in _ratios(case, base):
            if name.startswith("own"):
                if spread["disturbed"]:
                    return BUSY
                names = {row["name"]: row["title"] for row in case["methods"]}
                return f"{title} / {names[base]}: {spread['median']:.2f} on {case['list']}"
    return "Step times"


Shown = tuple[dict[str, Any], str, str]  # case, what is compared with, title


def _draw(path: Path, shown: list[Shown], label: str, titles: tuple[str, str]) -> Path:
    rows = [_ratios(case, base) for case, base, _ in shown]
    heights = [len(of) + 1.2 for of in rows]
    with mpl.rc_context(STYLE):
        height = 0.5 + 0.34 * sum(heights)
        figure = Figure(figsize=(9.5, height))
        top = min(0.93, 1 - 0.4 / height)  # room for the title of the first panel
        options = {"height_ratios": heights, "hspace": 0.3, "top": top, "left": 0.2}
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False, gridspec_kw=options)
        for axes, (_, _, title), of in zip(panels[:, 0], shown, rows, strict=True):
            _ratio_panel(axes, of, title)
        low = min((spread["p10"] for of in rows for _, _, spread in of), default=1.0)
        high = max((spread["p90"] for of in rows for _, _, spread in of), default=1.0)
        ratio_axis(panels[-1, 0], low, high)
        panels[-1, 0].set_xlabel(label)
        heading(figure, *titles)
        figure.savefig(path, bbox_inches="tight")
    return path


Row = tuple[str, str, dict[str, Any]]  # method, title, spread


def _ratios(case: dict[str, Any], base: str = "torch_fused") -> list[Row]:
    """The measured methods of a case but the one compared with, slowest first."""
    rows = [
        (row["name"], row["title"], row["ratio_to"][base])
        for row in case["methods"]
        if base in row["ratio_to"] and not row["name"].startswith("stream_")
    ]
    return sorted(rows, key=lambda row: -row[2]["median"])


def _colour(name: str) -> str:
    return COLOURS.get(name, COLOURS["own_gc"] if name.startswith("own") else SOFT)


def _ratio_panel(axes: Axes, rows: list[Row], title: str) -> None:
    for y, (name, _, spread) in enumerate(rows):
        colour = _colour(name)
        axes.plot([spread["p10"], spread["p90"]], [y, y], color=colour, linewidth=5, alpha=0.35)
        axes.plot(spread["median"], y, "o", color=colour, markersize=8)
        mark = tables.DISTURBED if spread["disturbed"] else ""
        place: dict[str, Any] = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
        text = axes.annotate(f"{mark}{spread['median']:.2f}", (spread["p90"], y), **place)
        text.set(color=colour, fontweight="bold")
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.2})
    axes.axvline(1, color=INK, linewidth=1.2, zorder=1)
    axes.set_title(title, color=SOFT)
    axes.set_yticks(range(len(rows)), [title for _, title, _ in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    for tick, (name, _, _) in zip(axes.get_yticklabels(), rows, strict=True):
        own = name.startswith("own")
        tick.set(color=_colour(name) if own else INK, fontweight="bold" if own else "normal")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _steps_title(cases: list[dict[str, Any]]) -> str:
    if any(tables.was_disturbed(case) for case in cases):
        return BUSY
    parts = []
    for case in cases:
        spread = next((s for name, _, s in _ratios(case) if name == "own_gc"), None)
        if spread is not None:
            parts.append(f"{spread['median']:.2f} on {case['list']}")
    if not parts:
        return "Step times relative to torch's fused AdamW"
    return "Step with GC / torch's fused step without: " + ", ".join(parts[:2])


def _subtitle(results: Results, cases: list[dict[str, Any]]) -> str:
    text = "Left of the line is faster. Dot: median of ratios in interleaved rounds, bar: 10-90 %"
    if any(tables.was_disturbed(case) for case in cases):
        text += f"\n{tables.DISTURBED}: other programs were running, and too few samples were quiet"
    return f"{text}\n{tables.measured_on(results)}"
