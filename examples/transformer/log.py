"""What a training tells: a bar or lines on the screen, a row a step in metrics.jsonl. Rank 0 speaks."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Log:
    """Of the steps after `start`, up to `steps`.

    Losses and norms stay on the device until `flush`, so that a step does not wait for it.

    Args:
        out: folder of metrics.jsonl, or None. Its rows up to `start` are kept.
    """

    def __init__(self, out: Path | None, steps: int, start: int) -> None:
        self.speaks = dist.get_rank() == 0
        self.steps = steps
        self.pending: list[tuple[int, float, Tensor, Tensor]] = []
        self.file = out / "metrics.jsonl" if out and self.speaks else None
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lines = self.file.read_text().splitlines() if start and self.file.exists() else []
            kept = [line for line in lines if json.loads(line).get("step", steps) <= start]
            self.file.write_text("".join(f"{line}\n" for line in kept))
        pretty = sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
        self.bar = Bar(start, steps) if self.speaks and pretty else None
        self.began = time.perf_counter()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.say(text)
        elif self.speaks:
            print(text, flush=True)

    def step(self, step: int, rate: float, loss: Tensor, norm: Tensor | None) -> None:
        """Notes the loss of this rank's share and the norm of all gradients."""
        norm = loss.new_zeros(()) if norm is None else norm
        self.pending.append((step, rate, loss.detach(), norm.to(loss)))

    def flush(self, mean: Callable[[Tensor], Tensor], tokens: int) -> None:
        """Writes the noted steps, of so many tokens each, with losses averaged over ranks."""
        steps, rates, losses, norms = zip(*self.pending, strict=True)
        found = torch.stack((mean(torch.stack(losses)), torch.stack(norms))).tolist()
        now = time.perf_counter()
        speed = tokens * len(steps) / (now - self.began)
        self.began, self.pending = now, []
        for step, rate, loss, norm in zip(steps, rates, *found, strict=True):
            self.write({"step": step, "loss": loss, "lr": rate, "grad_norm": norm, "tokens_per_s": speed})
        text = f"loss {loss:.4f} bits/byte, lr {rate:.2e}, grad norm {norm:.3f}, {speed:,.0f} tokens/s"
        if self.bar:
            self.bar.move(step, text)
        else:
            self.say(f"step {step}/{self.steps}: {text}")

    def write(self, row: dict[str, Any]) -> None:
        if self.file:
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")


class Bar:
    """rich's."""

    def __init__(self, start: int, steps: int) -> None:
        from rich import progress

        parts = "step {task.completed}/{task.total}", "{task.description}"
        self.progress = progress.Progress(
            progress.TextColumn(parts[0]), progress.BarColumn(), progress.TextColumn(parts[1])
        )
        self.task = self.progress.add_task("", total=steps, completed=start)
        self.progress.start()

    def move(self, step: int, text: str) -> None:
        self.progress.update(self.task, completed=step, description=text)

    def say(self, text: str) -> None:
        self.progress.console.print(text)

    def stop(self) -> None:
        self.progress.stop()
