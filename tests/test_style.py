"""What the rules are written like: nothing in them stands twice."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import fusedcalib

HOME = Path(fusedcalib.__file__).parent
WINDOW = 6  # lines in a row that two files may not share


def lines_of(path: Path) -> list[tuple[int, str]]:
    """Numbered lines of a file, docstrings among them, but no blank lines and no imports."""
    text = path.read_text(encoding="utf-8")
    imports = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom))
    left_out = {i for node in imports for i in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(text.splitlines(), start=1)
    return [(i, line.strip()) for i, line in lines if line.strip() and i not in left_out]


def blocks_of(path: Path) -> dict[tuple[str, ...], int]:
    """Every run of so many lines, and the line of the file where it starts."""
    lines = lines_of(path)
    windows = (lines[i : i + WINDOW] for i in range(len(lines) - WINDOW + 1))
    return {tuple(line for _, line in window): window[0][0] for window in windows}


@pytest.mark.parametrize("folder", ["rules", "reference"])
def test_no_block_of_six_lines_stands_in_two_files(folder: str):
    """A rule is short: what two of them share belongs to the stages, the facade or their base."""
    found = defaultdict(list)
    files = sorted((HOME / folder).glob("*.py"))
    assert len(files) > 10
    for path in files:
        for block, line in blocks_of(path).items():
            found[block].append(f"{path.name}:{line}")
    twice = [f"{', '.join(places)}: {block[0]}" for block, places in found.items() if len(places) > 1]
    assert not twice, "\n".join(["blocks in two files:", *twice])
