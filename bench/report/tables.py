"""Results as tables of text, for the terminal, the report and the README alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from .records import Curve, Spread, Training
from .results import Measured, Results, Row

Table = tuple[list[str], list[list[str]]]  # header, rows
T = TypeVar("T")
Columns = dict[str, Callable[[T], str]]  # header: the cell of a thing

DISTURBED = "~"
BUSY = f"{DISTURBED} other programs were running: do not rely on such a number"


def table_of(things: Iterable[T], columns: Columns[T]) -> Table:
    """A table with a row for each thing."""
    return [*columns], [[cell(thing) for cell in columns.values()] for thing in things]


def spread_text(spread: Spread | None) -> str:
    """`0.94 (0.91-0.97)`: median and 10-90 %; marked where the machine was disturbed."""
    if spread is None:
        return "-"
    return f"{DISTURBED * spread.disturbed}{spread.median:.2f} ({spread.p10:.2f}-{spread.p90:.2f})"


def number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def bytes_text(count: int | None) -> str:
    """A size as `12 B`, `32 kB`, `103 MB`."""
    if count is None:
        return "-"
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"


def share_text(row: Row) -> str:
    """Bandwidth in % of the memory stream's, which ran in the same rounds."""
    disturbed = row.over_stream is not None and row.over_stream.disturbed
    return DISTURBED * disturbed + number(row.pct_stream, ".0f")


def chain_ratio(case: Measured, method: str, to: str) -> Spread | None:
    """The ratio of two methods of a case with extras: "own" and "eager" are those that have them."""
    full = {key: f"{key}_{case.extras}" for key in ("own", "eager")}
    return case.ratio(full.get(method, method), full.get(to, to))


def chain_name(case: Measured) -> str:
    """`noise`, or `SGD bf16: noise` where it is not AdamW in fp32."""
    own = [row for row in case.methods if row.name == f"own_{case.extras}"]
    name = own[0].title.partition(" with ")[2] if own else case.extras
    plain = (case.subject, case.dtypes) == ("AdamW", "fp32")
    return name if plain else f"{case.subject} {case.dtypes}: {name}"


def chain_table(results: Results) -> Table:
    """A step with extras over the same composed around torch's fused step, and what each adds."""

    def composed(case: Measured) -> str:
        return next((row.title for row in case.methods if row.name == f"eager_{case.extras}"), "-")

    def over(*pair: str) -> Callable[[Measured], str]:
        return lambda case: spread_text(chain_ratio(case, *pair))

    columns: Columns[Measured] = {
        "with": chain_name,
        "composed of": composed,
        "bytes": lambda case: f"{case.bytes_per_param:g}",
        "fusedcalib / composed": over("own", "eager"),
        "/ fusedcalib without": over("own", "own_plain"),
        "composed / torch fused without": over("eager", "torch_fused"),
    }
    return table_of(results.of_chains, columns)


def _over(base: str | None, clock: str = "ratio_to") -> tuple[Callable[[Row], str], Callable[[Row], str]]:
    """Cells of a ratio to the method of that name, and of its number of rounds."""

    def ratio(row: Row) -> str:
        return "1" if row.name == base else spread_text(getattr(row, clock).get(base))

    def rounds(row: Row) -> str:
        spread = row.ratio_to.get(base or "")
        return number(spread.n if spread else row.kept if row.name == base else None, "d")

    return ratio, rounds


def case_table(case: Measured, to: str = "torch_fused") -> Table:
    """One list: each method's time, its ratio to `to`, and its share of the machine's limit."""
    ratio, rounds = _over(to)
    columns: Columns[Row] = {
        f"{case.subject} step": lambda row: row.title,
        "ms": lambda row: number(row.device_ms_median if case.on_gpu else row.wall_ms),
        "/ torch fused (10-90 %)": ratio,
        "n": rounds,
        "% of stream": share_text,
    }
    if case.on_gpu:
        columns |= {
            "wall / torch fused": _over(to, "wall_ratio_to")[0],
            "host µs": lambda row: number(row.host_us, ".0f"),
            "launches": lambda row: number(row.launches, "d"),
        }
    return table_of(case.passed, columns)


def full_table(case: Measured) -> Table:
    """One case with all that was measured of it."""
    ratio, rounds = _over(case.base)
    columns: Columns[Row] = {
        "step": lambda row: row.title,
        "ms": lambda row: number(row.device_ms_median if case.on_gpu else row.wall_ms),
        f"/ {case.base_title} (10-90 %)": ratio,
        "n": lambda row: rounds(row) if row.name != case.base else "-",
        "GB/s": lambda row: number(row.gbs),
        "% of copy": lambda row: number(row.pct_copy),
        "% of 4r3w": lambda row: number(row.pct_4r3w),
        "extra memory": lambda row: bytes_text(row.peak_extra_bytes),
    }
    if case.on_gpu:
        columns |= {
            "wall ms": lambda row: number(row.wall_ms),
            "host µs": lambda row: number(row.host_us),
            "launches": lambda row: number(row.launches, "d"),
        }
    return table_of(case.passed, columns)


def training_table(e1: Training) -> Table:
    """E1: the final test accuracy of each optimizer over the seeds."""

    def accuracy(curve: Curve) -> str:
        of = curve.accuracy
        return f"{of.median[-1]:.1f} ({of.p10[-1]:.1f}-{of.p90[-1]:.1f})"

    columns: Columns[Curve] = {
        "optimizer": lambda curve: curve.title,
        "test accuracy % (10-90 %)": accuracy,
        "training loss": lambda curve: f"{curve.loss.median[-1]:.4f}",
    }
    return table_of(e1.curves.values(), columns)


def markdown(table: Table) -> str:
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds of three digits."""
    return f"{1e3 * seconds:.3g}" if seconds < 0.9995 else f"{1e3 * seconds:.0f}"


def show(table: Table, title: str = "", width: int = 140) -> None:
    """Prints a table by rich where that is installed, ours in colour.

    `width` in characters, where there is no terminal.
    """
    header, rows = table
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        print(*([title, ""] if title else []), markdown(table), sep="\n")
        return
    made = RichTable(title=title or None, title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        made.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        made.add_row(*row, style="bold cyan" if row[0].startswith("fusedcalib") else None)
    Console(width=None if sys.stdout.isatty() else width).print(made)
