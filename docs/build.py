"""Writes the pages and stubs of the optimizers, the README's table of them, tables of what was measured.

python docs/build.py           writes them
python docs/build.py --check   only says which are out of date
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import stubs  # noqa: E402
import torch  # noqa: E402

import fusedcalib  # noqa: E402
from fusedcalib.bench.models import architectures, shardings  # noqa: E402
from fusedcalib.bench.models.traffic import DTYPES  # noqa: E402
from fusedcalib.bench.predict import plan, profile_kept  # noqa: E402
from fusedcalib.bench.report import results, tables  # noqa: E402
from fusedcalib.bench.repository import readme  # noqa: E402
from fusedcalib.optimizer import FusedOptimizer  # noqa: E402
from fusedcalib.options import OURS, WHOLE  # noqa: E402

BEGIN, END = "<!-- optimizers:begin -->", "<!-- optimizers:end -->"
PROFILE = ("<!-- profile:begin -->", "<!-- profile:end -->")
SCALING = ("<!-- plan:begin -->", "<!-- plan:end -->")
STORAGES = ("<!-- storages:begin -->", "<!-- storages:end -->")
GPUS = (8, 64, 512, 4096, 16_384)
SECTIONS = ("Args", "State", "Use it", "Raises", "Source", "Sources")
FP32 = 4  # bytes


def parts(doc: str) -> dict[str, str]:
    """A docstring by its sections: "" is what stands before the first, "Example" the doctest."""
    found: dict[str, list[str]] = {"": []}
    section = ""
    for line in inspect.cleandoc(doc).splitlines():
        head, colon, rest = line.partition(":")
        if line.startswith(">>>"):
            section = "Example"
        elif colon and head in SECTIONS:
            section, line = head, rest.strip()
        found.setdefault(section, []).append(line)
    return {name: "\n".join(lines).strip() for name, lines in found.items()}


def markdown(text: str) -> str:
    """A docstring's text with its formulas and names as GitHub's Markdown has them."""
    text = re.sub(r"^\.\. math::\n((?:    .*\n?|\n)+)", _formula, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]*)`", r"$`\1`$", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _formula(match: re.Match[str]) -> str:
    body = inspect.cleandoc(match[1]).strip()
    if "&" in body:
        body = f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"
    return f"```math\n{body}\n```\n\n"


def entries(text: str) -> list[tuple[str, str]]:
    """(names, words) of the entries of an Args section."""
    found = re.findall(r"^(?:    )?([\w, ]+): ((?:.*\n?)(?:        .*\n?|\s{8,}.*\n?)*)", text, re.MULTILINE)
    return [(names.strip(), " ".join(words.split())) for names, words in found]


def arguments(text: str) -> str:
    """The entries of an Args section as a list."""
    return "\n".join(f"- `{names}`: {markdown(words)}" for names, words in entries(text))


def said_of(cls: type) -> dict[str, str]:
    """What the docstring of a class says of each argument, or that of a base to which it refers."""
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("fusedcalib.rules.")]
    found = {name: words for base in reversed(bases) for name, words in said_of(base).items()}
    for names, words in entries(parts(cls.__doc__ or "").get("Args", "")):
        for name in names.split(", "):
            if not words.startswith("as `") or name not in found:
                found[name] = words
    return found


def _costs(cls: type[FusedOptimizer]) -> list[tuple[str, int, float]]:
    """(state, bytes kept, bytes moved) of each kind of state that the options make, fewest first."""
    kinds = sorted(dict.fromkeys(cls.rule.states.values()), key=len)
    return [
        (
            ", ".join(f"`{name}`" for name in states) or "none",
            FP32 * len(states),
            DTYPES["fp32"].moved(len(states), looked=cls.rule.trust.reads if cls.rule.trust else ()),
        )
        for states in kinds
    ]


def page(name: str, cls: type[FusedOptimizer]) -> str:
    """The page of one optimizer."""
    about = parts(cls.__doc__ or "")
    costs = [f"| {state} | {kept} | {moved} |" for state, kept, moved in _costs(cls)]
    example = about["Example"]
    blocks = [
        f"# {name}",
        markdown(about[""]),
        f"**Use it** {markdown(about['Use it'])}",
        "## Arguments",
        "`params`: parameters, named parameters or param groups.",
        arguments(about["Args"]),
        f"Besides, as every optimizer here, [{_shared()}](options.md).",
        "## State",
        markdown(about["State"]),
        "\n".join(
            ["| states in fp32 | bytes kept a parameter | bytes moved a step |", "|---|---|---|", *costs]
        ),
        "## Example",
        f"```pycon\n{example}\n```",
        f"Source: {markdown(about['Source'])}",
    ]
    return "\n\n".join(blocks) + "\n"


def _shared() -> str:
    return ", ".join(f"`{option.name}`" for option in (*OURS, *WHOLE))


def options_page() -> str:
    """What all optimizers share: the docstring of their base class."""
    about = parts(FusedOptimizer.__doc__ or "")
    after = about["Args"].partition("\n\n")
    blocks = [
        "# Options of every optimizer",
        markdown(about[""]),
        arguments(after[0]),
        markdown(after[2]),
        f"Sources: {markdown(about['Sources'])}",
    ]
    return "\n\n".join(blocks) + "\n"


def table() -> str:
    """The README's table."""
    lines = ["| class | as | bytes moved a parameter | use it |", "|---|---|---|---|"]
    for name, cls in fusedcalib.optimizers().items():
        costs = ", ".join(str(moved) for moved in sorted({moved for _, _, moved in _costs(cls)}))
        theirs = f"`torch.optim.{name}`" if hasattr(torch.optim, name) else "its paper"
        use = markdown(parts(cls.__doc__ or "")["Use it"]).replace("\n", " ")
        lines.append(f"| [{name}](docs/{name.lower()}.md) | {theirs} | {costs} | {use} |")
    return "\n".join(lines)


@cache
def scaling() -> str:
    """The tables of docs/scaling.md: each model on several sizes, one of them step by step."""
    blocks = []
    for name in architectures.LLAMAS:
        sizes = [shardings.sharding_of(gpus, None, 1, None) for gpus in GPUS]
        results = plan.plan(architectures.get(name), sizes, plan.Setting(), plan.SWEPT)
        blocks += [f"{results.title}:", tables.markdown(plan.sizes_table(results))]
    results = plan.plan(architectures.get(name), [shardings.sharding_of(512, None, 8, None)], plan.Setting())
    (found,) = results.plans
    blocks += [f"{name}, {found}:", tables.markdown(plan.steps_table(found))]
    return "\n\n".join(blocks)


def profile() -> str:
    """The table of docs/profile.md: the static profile that is kept."""
    kept = profile_kept.read()
    head = f"{kept.target}, Triton {kept.triton}; as compiled, no GPU was measured:"
    return f"{head}\n\n{tables.markdown(profile_kept.table(kept))}"


def storages() -> str:
    """The table of docs/memory.md: a step of AdamW on the CPU, by how it is kept, as it was measured."""
    found = results.load(ROOT / "bench" / "results" / "storages" / "cpu.json")
    cpu, versions, case = found.cpu, found.versions, found.cases[0]
    head = (
        f"A step of AdamW on {case.list} ({case.params / 1e6:.3g}M parameters) on the CPU "
        f"({cpu['name']}, {cpu['threads']} thread; torch {versions['torch']}, numba {versions['numba']}; "
        f"{found.utc[:10]}), as ratios of times with their 10-90 %:"
    )
    columns: tables.Columns[results.Measured] = {
        "kept as": lambda case: f"`{case.dtypes}`",
        "/ ours in all fp32": lambda case: tables.spread_text(case.ratio("own_plain", "own_fp32")),
        "/ torch fused": lambda case: tables.spread_text(case.ratio("own_plain", "torch_fused")),
        "which is": lambda case: case.base_title.removeprefix("torch fused, "),
    }
    return f"{head}\n\n{tables.markdown(tables.table_of(found.cases, columns))}"


def files() -> dict[Path, str]:
    """What every generated file should hold."""
    pages = {HERE / f"{name.lower()}.md": page(name, cls) for name, cls in fusedcalib.optimizers().items()}
    regions = {
        ROOT / "README.md": (table(), (BEGIN, END)),
        HERE / "scaling.md": (scaling(), SCALING),
        HERE / "profile.md": (profile(), PROFILE),
        HERE / "memory.md": (storages(), STORAGES),
    }
    for path, (text, markers) in regions.items():
        pages[path] = readme.insert(path.read_text(), text, markers, path.name)
    made = stubs.files(fusedcalib.optimizers().values(), said_of)
    return {**pages, **made, HERE / "options.md": options_page()}


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="docs/build.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if something is out of date"
    )
    options: Any = parser.parse_args(given)
    stale = {path: text for path, text in files().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        if options.check:
            print(f"out of date: {path.relative_to(ROOT)}; run python docs/build.py", file=sys.stderr)
        else:
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
