"""What papers.py found, as lines, a table, a figure and a section of docs/nn.md.

python examples/papers/papers_page.py [papers.json] [--page docs/nn.md]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fusedcalib.bench.bootstrap import ROOT
from fusedcalib.bench.env import machine
from fusedcalib.bench.report import tables
from fusedcalib.bench.repository import readme

Record = dict[str, Any]
Results = dict[str, Any]
BEGIN, END = "<!-- papers:begin -->", "<!-- papers:end -->"
RESULTS = machine.RESULTS / "papers" / "papers.json"
PAGE = ROOT / "docs" / "nn.md"
# Okabe and Ito's, as in plots.py: what is expected to be better, the same, worse.
COLOURS = {"better": "#0072B2", "learns": "#0072B2", "same": "#6b6b6b", "worse": "#D55E00"}
WORDS = {"better": "less error", "same": "no difference", "worse": "more error"}


def verdict(record: Record) -> str:
    return "as expected" if record["holds"] else "NOT AS EXPECTED"


def line(record: Record) -> str:
    """One result in a line."""
    if record["kind"] == "curve":
        return f"{record['title']}: published losses within {record['largest']:.1e}: {verdict(record)}"
    return (
        f"{record['title']}: {_errors(record)} % error, by {record['difference']:.2f} "
        f"(se {record['standard_error']:.2f}), not worse in {_seeds(record)}: {verdict(record)}"
    )


def table(results: Results) -> tables.Table:
    header = ["", "error in %", "difference (standard error)", "not worse in", "expected", ""]
    rows = []
    for record in results["comparisons"]:
        if record["kind"] == "curve":
            found = [f"within {record['largest']:.1e}", "-", "-"]
        else:
            difference = f"{record['difference']:.2f} ({record['standard_error']:.2f})"
            found = [_errors(record), difference, _seeds(record)]
        rows.append([record["title"], *found, record["expected"], "holds" if record["holds"] else "FAILS"])
    return header, rows


def _errors(record: Record) -> str:
    base, other = (sum(record[side]) / len(record[side]) for side in ("base", "other"))
    return f"{base:.2f} -> {other:.2f}"


def _seeds(record: Record) -> str:
    return f"{record['not_worse']} of {len(record['base'])}"


def _of_errors(results: Results) -> list[Record]:
    return [record for record in results["comparisons"] if record["kind"] == "errors"]


def section(results: Results, figure: str) -> str:
    """The text between the markers."""
    header, rows = table(results)
    parts = [tables.markdown((header[:-1], [row[:-1] for row in rows]))]
    failed = [row[0] for row in rows if row[-1] != "holds"]
    parts.append(f"Not as expected: {'; '.join(failed)}." if failed else "All is as expected.")
    parts.append(f"![what each changes]({figure})")
    parts.append(f"Measured on {machine.Head.of(results).measured_on}.")
    return "\n\n".join(parts)


def title(results: Results) -> str:
    """The finding in a sentence."""
    records = _of_errors(results)
    if not records:
        return "Published losses, retraced"
    held = [record["direction"].replace("learns", "better") for record in records if record["holds"]]
    counts = [f"{words} in {held.count(kind)}" for kind, words in WORDS.items() if kind in held]
    failed = sum(not record["holds"] for record in results["comparisons"])
    counts.append(f"{failed} NOT as expected" if failed else "all as expected")
    return f"Of {len(records)} comparisons: {', '.join(counts)}"


def subtitle(results: Results) -> str:
    records = _of_errors(results)
    counts = [len(record["base"]) for record in records]
    lines = []
    if counts:
        spread = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])
        lines.append(
            f"Large dot and bar: mean over {spread} paired seeds and its standard error; small dots: seeds"
        )
    curves = [record["largest"] for record in results["comparisons"] if record["kind"] == "curve"]
    if curves:
        lines.append(
            f"Besides: published losses of {len(curves)} runs, retraced to {max(curves):.1e} of themselves"
        )
    return "\n".join([*lines, machine.Head.of(results).measured_on])


def draw(results: Results, path: Path) -> Path:
    """Paired differences; right of the line is less error."""
    from fusedcalib.bench.report.style import INK, bar, dot, figure, name_lines

    records = _of_errors(results)[::-1]
    height, right = 1.0 + 0.34 * len(records), 0.86
    titles = (title(results), subtitle(results))
    with figure(path, height, titles, left=0.36, right=right, top=0.97) as (axes,):
        axes.set_xscale("symlog", linthresh=1)
        for y, record in enumerate(records):
            colour, middle = COLOURS[record["direction"]], record["difference"]
            error = record["standard_error"]
            each = [a - b for a, b in zip(record["base"], record["other"], strict=True)]
            axes.plot(each, [y] * len(each), "o", color=colour, markersize=3, alpha=0.3, markeredgewidth=0)
            bar(axes, y, (middle - error, middle + error), colour, 0.45)
            dot(axes, y, middle, colour)
            text = f"{middle:+.2f} ± {error:.2f}".replace("-", "\N{MINUS SIGN}") + " !" * (
                not record["holds"]
            )
            place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
            axes.text(1.02, y, text, color=colour, fontweight="bold", fontsize=9, **place)
        name_lines(axes, [record["title"] for record in records], 0)
        axes.tick_params(axis="y", labelcolor=INK)
        low, high = axes.get_xlim()
        ticks = [t for t in (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100) if low <= t <= high]
        axes.set_xticks(ticks, [f"{t:+d}" if t else "0" for t in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("points of test error less (linear to 1, then log scale)")
        for kind, words in WORDS.items():
            axes.plot([], [], "o", color=COLOURS[kind], label=f"expected: {words}")
        below = -0.5 / (right * height)  # the label of the axis is above it
        axes.legend(loc="upper right", bbox_to_anchor=(1, below), ncols=3, frameon=False, fontsize=9)
    return path


def save(results: Results, folder: Path) -> list[Path]:
    """papers.json, and papers.png where there is anything to draw."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "papers.json"
    data.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    return [data, draw(results, folder / "papers.png")] if _of_errors(results) else [data]


def load(path: Path) -> Results:
    results: Results = json.loads(path.read_text())
    return results


def page(results: Results, text: str) -> str:
    """docs/nn.md with the section of these results."""
    return readme.insert(text, section(results, "../bench/results/papers/papers.png"), (BEGIN, END), "page")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, nargs="?", default=RESULTS, help="a papers.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    try:
        results = load(options.source)
        text = page(results, options.page.read_text())
        draw(results, options.source.with_suffix(".png"))
        options.page.write_text(text)
    except (OSError, ValueError) as error:
        print(f"the page was not changed: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
