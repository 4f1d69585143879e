"""Results as tables of text, for the terminal, the report and the README alike."""

from __future__ import annotations

import sys
from typing import Any

from ..env import machine
from .results import Results, extras_of

Table = tuple[list[str], list[list[str]]]  # header, rows

DISTURBED = "~"


def spread_text(spread: dict[str, Any] | None) -> str:
    """`0.94 (0.91-0.97)`: median and 10-90 %; marked where the machine was disturbed."""
    if spread is None:
        return "-"
    mark = DISTURBED if spread["disturbed"] else ""
    return f"{mark}{spread['median']:.2f} ({spread['p10']:.2f}-{spread['p90']:.2f})"


def number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def bytes_text(count: int | None) -> str:
    """`12 B`, `32 kB`, `103 MB`."""
    if count is None:
        return "-"
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"


def share_text(row: dict[str, Any]) -> str:
    """Bandwidth in % of the memory stream's, which ran in the same rounds."""
    spread = stream_ratio(row) or {"disturbed": False}
    return (DISTURBED if spread["disturbed"] else "") + number(row["pct_stream"], ".0f")


def stream_ratio(row: dict[str, Any]) -> dict[str, Any] | None:
    """Time over that of the memory stream with the same traffic."""
    found: list[dict[str, Any]] = [s for to, s in row["ratio_to"].items() if to.startswith("stream_")]
    return found[0] if found else None


def rule_cases(results: Results) -> list[dict[str, Any]]:
    """The cases of all rules on the list that they share, AdamW's first."""
    cases = [case for case in results["cases"] if not extras_of(case)]
    shared = {(case["list"], case["dtypes"]) for case in cases if case["subject"] != "AdamW"}
    own = [case for case in cases if (case["list"], case["dtypes"]) in shared]
    return sorted(own, key=lambda case: case["subject"] != "AdamW")


def chain_cases(results: Results) -> list[dict[str, Any]]:
    """The cases of a step with extras, in the order of what they move."""
    return sorted(filter(extras_of, results["cases"]), key=lambda case: case["bytes_per_param"])


def chain_ratio(case: dict[str, Any], method: str, to: str) -> dict[str, Any] | None:
    """Of two methods of a case with extras: "own" and "eager" are those that have them."""
    full = {key: f"{key}_{extras_of(case)}" for key in ("own", "eager")}
    rows = [row for row in case["methods"] if row["name"] == full.get(method, method)]
    found: dict[str, Any] | None = rows[0]["ratio_to"].get(full.get(to, to)) if rows else None
    return found


def chain_name(case: dict[str, Any]) -> str:
    """`noise`, or `SGD bf16: noise` where it is not AdamW in fp32."""
    own = [row for row in case["methods"] if row["name"] == f"own_{extras_of(case)}"]
    name = own[0]["title"].partition(" with ")[2] if own else extras_of(case)
    plain = (case["subject"], case["dtypes"]) == ("AdamW", "fp32")
    return name if plain else f"{case['subject']} {case['dtypes']}: {name}"


def chain_table(results: Results) -> Table:
    """A step with extras over the same composed around torch's fused step, and what each adds."""
    header = ["with", "composed of", "bytes", "fusedcalib / composed", "/ fusedcalib without"]
    header.append("composed / torch fused without")
    rows = []
    for case in chain_cases(results):
        eager = [row["title"] for row in case["methods"] if row["name"] == f"eager_{extras_of(case)}"]
        pairs = (("own", "eager"), ("own", "own_plain"), ("eager", "torch_fused"))
        cells = [spread_text(chain_ratio(case, *pair)) for pair in pairs]
        rows.append([chain_name(case), *eager, str(case["bytes_per_param"]), *cells])
    return header, rows


def over_stream(case: dict[str, Any], method: str) -> dict[str, Any] | None:
    """A method's time over that of the stream of the same bytes."""
    rows = [row for row in case["methods"] if row["name"] == method]
    return stream_ratio(rows[0]) if rows else None


def case_table(case: dict[str, Any], to: str = "torch_fused") -> Table:
    """One list: each method's time, its ratio to `to`, and its share of the machine's limit."""
    gpu = case["clock"] == "device"
    header = [f"{case['subject']} step", "ms", "/ torch fused (10-90 %)", "n", "% of stream"]
    if gpu:
        header += ["wall / torch fused", "host µs", "launches"]
    rows = []
    for row in case["methods"]:
        if row["reason"] is not None:
            continue
        own = {"median": 1.0, "p10": 1.0, "p90": 1.0, "n": row["kept"], "disturbed": False}
        spread = own if row["name"] == to else row["ratio_to"].get(to)
        text = "1" if row["name"] == to else spread_text(spread)
        milliseconds = row["device_ms_median"] if gpu else row["wall_ms"]
        cells = [row["title"], number(milliseconds), text, number(spread["n"] if spread else None, "d")]
        cells.append(share_text(row))
        if gpu:
            wall = "1" if row["name"] == to else spread_text(row["wall_ratio_to"].get(to))
            cells += [wall, number(row["host_us"], ".0f"), number(row["launches"], "d")]
        rows.append(cells)
    return header, rows


def base_of(case: dict[str, Any]) -> str | None:
    """What the methods of a case are compared with; files of before have no other than torch's fused step."""
    base: str | None = case.get("base", "torch_fused")
    return base


def full_table(case: dict[str, Any]) -> Table:
    """One case with all that was measured of it."""
    gpu, base = case["clock"] == "device", base_of(case)
    rows = [row for row in case["methods"] if row["reason"] is None]
    names = {row["name"]: row["title"] for row in rows}
    header = ["step", "ms", f"/ {names.get(base or '', '-')} (10-90 %)", "n", "GB/s"]
    header += ["% of copy", "% of 4r3w", "extra memory", *(["wall ms", "host µs", "launches"] if gpu else [])]
    cells = []
    for row in rows:
        spread = row["ratio_to"].get(base)
        extra = row["peak_extra_bytes"]
        cells.append(
            [
                row["title"],
                number(row["device_ms_median"] if gpu else row["wall_ms"]),
                "1" if row["name"] == base else spread_text(spread),
                number(spread["n"] if spread else None, "d"),
                *(number(row[key]) for key in ("gbs", "pct_copy", "pct_4r3w")),
                bytes_text(extra),
                *(
                    [number(row["wall_ms"]), number(row["host_us"]), number(row["launches"], "d")]
                    if gpu
                    else []
                ),
            ]
        )
    return header, cells


def not_measured(case: dict[str, Any]) -> list[str]:
    """`apex FusedAdam: apex is not installed`, and so on."""
    return [f"{row['title']}: {row['reason']}" for row in case["methods"] if row["reason"]]


def training_table(e1: dict[str, Any]) -> Table:
    """E1: the final test accuracy of each optimizer over the seeds."""
    header = ["optimizer", "test accuracy % (10-90 %)", "training loss"]
    rows = []
    for curve in e1["curves"].values():
        low, middle, high = (curve["accuracy"][key][-1] for key in ("p10", "median", "p90"))
        loss = curve["loss"]["median"][-1]
        rows.append([curve["title"], f"{middle:.1f} ({low:.1f}-{high:.1f})", f"{loss:.4f}"])
    return header, rows


def markdown(table: Table) -> str:
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def milliseconds(seconds: float) -> str:
    """In three digits."""
    return f"{1e3 * seconds:.3g}" if seconds < 0.9995 else f"{1e3 * seconds:.0f}"


def case_title(case: dict[str, Any]) -> str:
    millions = f"{case['params'] / 1e6:.3g}M parameters"
    return f"{case['subject']}, {case['list']}: {case['tensors']} tensors, {millions}, {case['dtypes']}"


def was_disturbed(case: dict[str, Any]) -> bool:
    """Whether one of our own numbers was."""
    own = [row for row in case["methods"] if row["name"].startswith("own")]
    return any(spread["disturbed"] for row in own for spread in row["ratio_to"].values())


def measured_on(results: Results) -> str:
    """Device, versions and date in one line."""
    versions = results["versions"]
    names = ("torch", "triton" if results["device"] else "numba", "python")
    known = ", ".join(f"{name} {versions[name]}" for name in names if versions[name])
    return f"{machine.short_name(results)}; {known}; {results['utc'][:10]}"


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
