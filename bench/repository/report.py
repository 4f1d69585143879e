"""report.md: what the main job found, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..report import tables
from ..report.records import Training
from ..report.results import Results

HOW = """\
- Methods take turns in rotated rounds; a ratio is taken within a round, and the tables show the
  median and the 10-90 % of these ratios, over n rounds.
- {clock}
- A method is timed only if three of its steps, with changing gradients, agree with a float64
  reference within a bound derived for each element.
- The stream has the traffic of AdamW, 4 reads and 3 writes, and no arithmetic."""
CPU_CLOCK = """\
Each sample stands between two of torch fused; it is dropped if these differ by more than 10 % or
  if other programs took more than 8 % of the machine in that round."""
GPU_CLOCK = """\
Device time is taken by CUDA events around steps that were queued behind a sleeping kernel; wall
  time is host and device together."""


def text(results: Results) -> str:
    """The whole report in Markdown."""
    parts = ["# fusedcalib: main job", f"Measured on: {results.measured_on}."]
    if results.device is None:
        parts.append("No GPU was used.")
    if results.e1:
        parts += training(results.e1)
    parts += ["## Time of a step", "![step times](steps.png)"]
    for case in results.cases:
        parts += [f"### {case.title}", tables.markdown(tables.case_table(case))]
        if missing := case.missing:
            parts.append("Not measured: " + "; ".join(missing) + ".")
    if results.disturbed:
        parts.append(
            f"`{tables.DISTURBED}`: other programs were running and too few samples were quiet, so "
            "all were taken: do not rely on such a number."
        )
    clock = GPU_CLOCK if results.device else CPU_CLOCK
    parts += ["## How it was measured", HOW.format(clock=clock), ceiling(results.ceil)]
    return "\n\n".join(part for part in parts if part) + "\n"


def training(e1: Training) -> list[str]:
    gain, count = e1.gain, len(e1.seeds)
    return [
        "## Training on real digits",
        "![training curves](training.png)",
        tables.markdown(tables.training_table(e1)),
        f"Centralized against torch.optim.AdamW, seed by seed: {gain.mean:+.1f} points of test "
        f"accuracy on average, better on {gain.wins} of {count} seeds.",
        f"fusedcalib.AdamW retraces torch.optim.AdamW: the losses differ by at most "
        f"{e1.max_diff_first_epoch:.1e} in the first epoch (allowed: "
        f"{e1.tolerance_first_epoch:.0e}) and {e1.max_diff_all:.1e} in the whole training.",
    ]


def ceiling(ceil: dict[str, Any]) -> str:
    """The machine's bandwidth in words."""
    known = [
        f"{words} {ceil[key]:.0f} GB/s"
        for key, words in (("copy_gbs", "copy"), ("stream_4r3w_gbs", "4 reads and 3 writes"))
        if ceil.get(key)
    ]
    return f"Memory bandwidth in the same run: {', '.join(known)} ({ceil['how']})." if known else ""


def write(results: Results, path: Path) -> Path:
    path.write_text(text(results))
    return path
