"""A log that is written as it goes and comes back whole: it stays below a size."""

from __future__ import annotations

from pathlib import Path

MOST = 16 * 2**20  # bytes of a file
SHOWN = 30_000  # characters of a command's output, its beginning and its end


class Log:
    """Statements have room in the file when output has none any more."""

    def __init__(self, path: Path, most: int = MOST) -> None:
        self.path, self._most = path, most
        if path.exists() and path.stat().st_size > most // 4:  # of earlier runs the end
            path.write_bytes(path.read_bytes()[-most // 4 :])

    def __call__(self, text: str = "") -> None:
        print(text, flush=True)
        self._write(f"{text}\n", self._most)

    def output(self, text: str) -> None:
        """Keeps what a command wrote."""
        self._write(text, self._most * 3 // 4)

    def follow(self, text: str) -> None:
        """Keeps what a command wrote, and shows it."""
        print(text, end="", flush=True)
        self.output(text)

    def _write(self, text: str, most: int) -> None:
        with self.path.open("ab") as file:
            left = most - file.tell()
            file.write(text.encode(errors="replace")[: max(0, left)])


def shortened(text: str, most: int = SHOWN) -> str:
    """The beginning and the end of a text."""
    left_out = len(text) - most
    if left_out <= 0:
        return text
    return f"{text[: most // 2]}\n[{left_out} characters are left out]\n{text[-most // 2 :]}"


def last_line(text: str) -> str:
    """The last line of a text that is not empty."""
    return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "")
