"""What each way to keep AdamW's states and weights takes, as a figure: bytes, and time by them.

python3 bench/run.py storages --plot bench/results/plan/storages.png

Bytes are counted, for ours by what the engine lays out on the model; times follow from them and the bandwidth
of the GPU, and from the instructions that are compiled for it and executed, as executed.py counts them.
No GPU is used or needed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from ..models import architectures
from ..models.architectures import Model
from ..models.traffic import DTYPES, PUBLISHED
from ..report import tables
from ..report.style import BLUE, GREEN, INK, ORANGE, SOFT, bar, dot, figure, name_lines
from . import profile_static
from .gpus import GPUS, Gpu
from .profile_steps import ProfileCase

OURS = {  # as docs/memory.md calls them
    "fp32": "all fp32",
    "bf16": "all bf16",
    "split16": "exact",
    "split16+bf16-state": "ten",
    "split16+8bit": "eight",
    "split8+8bit": "seven",
    "bf16+8bit": "six",
}
STATES, BASE = 2, DTYPES["bf16"]  # AdamW; times are ratios to torch's fused step on all bf16


@dataclass(frozen=True)
class Row:
    """Bytes of a parameter, and the time of a step as a multiple of that of torch's fused one on bf16."""

    title: str
    own: bool
    kept: float
    moved: float
    by_bytes: float
    by_instructions: float | None = None  # by those that are executed; None where they are not known


def rows(model: Model, gpu_name: str) -> list[Row]:
    """Ours, and what others publish."""
    cases = [ProfileCase("AdamW", (), dtypes) for dtypes in OURS]
    found = profile_static.profile(cases, model, gpu_name)
    base = BASE.moved(STATES)
    seconds = base * model.count / found.gpu.bandwidth
    made = []
    for case in found.cases:
        storage, issue = DTYPES[case.dtypes], case.seconds.issue / seconds
        sizes = storage.kept(STATES), storage.moved(STATES)
        made.append(Row(OURS[case.dtypes], True, *sizes, case.moved_per_param / base, issue))
    for title, storage in PUBLISHED.items():
        moved = storage.moved(STATES)
        made.append(Row(title, False, storage.kept(STATES), moved, moved / base))
    return made


def table(found: list[Row]) -> tables.Table:
    columns: tables.Columns[Row] = {
        "kept as": lambda row: row.title,
        "resident": lambda row: f"{row.kept:.4g}",
        "moved": lambda row: f"{row.moved:.4g}",
        "step by bytes": lambda row: f"{row.by_bytes:.2f}",
        "by instructions": lambda row: "-" if row.by_instructions is None else f"{row.by_instructions:.2f}",
    }
    return tables.table_of(found, columns)


def draw(found: list[Row], model: Model, gpu: Gpu, path: Path) -> Path:
    """Bytes on the left, time on the right; a line for each way."""
    lines, colours = found[::-1], {True: BLUE, False: SOFT}
    titles = (
        "Computed from bytes, no GPU was measured: AdamW by how it is kept",
        f"bf16 parameters and gradients but for all fp32; {model.name} on {gpu.name} at "
        f"{gpu.bandwidth / 1e12:.3g} TB/s; grey: bytes as other libraries publish them.\n"
        "Dots: the memory alone; orange: to where starting the executed instructions takes longer, "
        "slow paths of divisions left out.",
    )
    with figure(path, 4.6, titles, (1, 2), left=0.27, right=0.98, top=0.93, wspace=0.08) as (left, right):
        name_lines(left, [row.title for row in lines], 0)
        name_lines(right, [""] * len(lines), 1)
        for y, row in enumerate(lines):
            for size, offset, alpha in ((row.kept, 0.17, 1.0), (row.moved, -0.17, 0.45)):
                left.barh(y + offset, size, 0.32, color=colours[row.own], alpha=alpha)
                _number(left, size + 0.4, y + offset, f"{size:.4g}", "left")
            if row.by_instructions and row.by_instructions > row.by_bytes:
                bar(right, y, (row.by_bytes, row.by_instructions), ORANGE)
                _number(right, row.by_instructions + 0.06, y, f"{row.by_instructions:.2f}", "left")
            dot(right, y, row.by_bytes, GREEN if row.own else SOFT)
            _number(right, row.by_bytes - 0.06, y, f"{row.by_bytes:.2f}", "right")
        left.set(xlabel="bytes a parameter: resident; pale: moved", xlim=(0, 32))
        right.set(xlabel="step / torch fused step on all bf16", xlim=(0.4, 2.15))
    return path


def _number(axes: Axes, x: float, y: float, text: str, side: str) -> None:
    """A number beside what shows it."""
    axes.text(x, y, text, va="center", ha=side, fontsize=8, color=INK)


def main(options: argparse.Namespace) -> int:
    model = architectures.chosen(options)
    found = rows(model, options.gpu)
    tables.show(table(found), f"{model.name}, AdamW, {options.gpu}: computed, no GPU was measured")
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        print(f"wrote {draw(found, model, GPUS[options.gpu], options.plot)}")
    return 0
