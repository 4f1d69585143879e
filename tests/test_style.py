"""What the package is written like: nothing in a folder of it stands twice."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import fusedcalib

HOME = Path(fusedcalib.__file__).parent
WINDOW = 6  # lines in a row that may not stand again
# A folder, with those below it; "" for the files that lie in the package itself.
FOLDERS = ("", "bench", "engine", "executors", "kernels", "layout", "matrices", "nn", "reference", "rules")
SHARE: dict[
    str, float
] = {}  # per cent of a folder's lines that may stand within a repeated block; none where not named


def lines_of(path: Path) -> list[tuple[int, str]]:
    """Numbered lines of a file, docstrings among them, but no blank lines and no imports."""
    text = path.read_text(encoding="utf-8")
    imports = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom))
    left_out = {i for node in imports for i in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(text.splitlines(), start=1)
    return [(i, line.strip()) for i, line in lines if line.strip() and i not in left_out]


def files_of(folder: str) -> list[Path]:
    return sorted((HOME / folder).rglob("*.py") if folder else HOME.glob("*.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_block_of_six_lines_stands_twice(folder: str):
    """What two files share belongs to one of them, or to what both stand on."""
    blocks, count = defaultdict(list), 0
    for path in files_of(folder):
        lines = lines_of(path)
        count += len(lines)
        for i in range(len(lines) - WINDOW + 1):
            window = lines[i : i + WINDOW]
            blocks[tuple(line for _, line in window)].append((path.name, [number for number, _ in window]))
    twice = {block: places for block, places in blocks.items() if len(places) > 1}
    within = {(name, number) for places in twice.values() for name, numbers in places for number in numbers}
    said = [
        f"{', '.join(f'{name}:{numbers[0]}' for name, numbers in places)}: {block[0]}"
        for block, places in twice.items()
    ]
    assert count > 300
    assert 100 * len(within) <= SHARE.get(folder, 0) * count, "\n".join(["blocks that stand twice:", *said])


def test_every_folder_is_looked_at():
    folders = {path.name for path in HOME.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= {*FOLDERS}
