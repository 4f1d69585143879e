"""Bytes of Python source, and batches of them that do not depend on the number of ranks."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 20  # every 20th file is kept for validation
FOREIGN = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """The bytes to train on and those held out, uint8 [n] each."""

    train: Tensor
    held_out: Tensor


def read(folder: Path | None = None) -> Text:
    """All *.py files of a folder, in order of their names; by default the standard library's.

    Raises:
        ValueError: there are too few files to hold any out.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(folder.rglob("*.py")) if FOREIGN.isdisjoint(f.relative_to(folder).parts)]
    if len(files) < HELD_OUT:
        raise ValueError(f"{folder} has {len(files)} *.py files, and {HELD_OUT} are the least: choose --data")
    parts = [f.read_bytes() for f in files]
    held_out = b"".join(parts[HELD_OUT - 1 :: HELD_OUT])
    train = b"".join(part for i, part in enumerate(parts) if (i + 1) % HELD_OUT)
    return Text(*(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, held_out)))


def drawn(text: Tensor, step: int, seed: int, batch: int, context: int) -> Tensor:
    """The sequences of a step, int64 [batch, context + 1], from places drawn by seed and step alone."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return windows(text, torch.randint(len(text) - context, (batch,), generator=draw), context)


def spaced(text: Tensor, count: int, context: int) -> Tensor:
    """Sequences at even distances, int64 [count, context + 1]."""
    return windows(text, torch.linspace(0, len(text) - context - 1, count).long(), context)


def windows(text: Tensor, starts: Tensor, context: int) -> Tensor:
    return text[starts[:, None] + torch.arange(context + 1)].long()
