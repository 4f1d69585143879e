"""Muon and AdamW in the same training: held-out loss by learning rate, and by seed at the best of each.

python examples/transformer/muon.py --run   trains, then draws
python examples/transformer/muon.py         draws what results/ has
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SETTING = ("--steps", "150", "--context", "64", "--log-every", "50", "--ema-decay", "0")
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
NAMES = {"adamw": ("AdamW", "#0072B2"), "muon": ("Muon", "#D55E00")}  # of Okabe and Ito's palette
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def trained(optimizer: str, lr: float, seed: int) -> dict[str, Any]:
    """The losses of a training by step, and that of text held out."""
    with TemporaryDirectory() as out:
        command = [sys.executable, str(HERE / "train.py"), *SETTING, "--out", out]
        command += ["--optimizer", optimizer, "--lr", str(lr), "--seed", str(seed)]
        print(optimizer, lr, seed, flush=True)
        subprocess.run(command, check=True, env={**os.environ, **ONE_THREAD})
        rows = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "step" in row]
    return {"optimizer": optimizer, "lr": lr, "seed": seed, "loss": losses, "held_out": rows[-1]["held_out"]}


def run() -> dict[str, Any]:
    """Every rate with the first seed, then the best rate of each optimizer with the others."""
    import torch

    runs = []
    for optimizer in NAMES:
        swept = [trained(optimizer, lr, SEEDS[0]) for lr in RATES]
        best = min(swept, key=lambda found: found["held_out"])["lr"]
        runs += [*swept, *(trained(optimizer, best, seed) for seed in SEEDS[1:])]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"device": "cpu", "threads": 1, "versions": versions, "setting": SETTING, "runs": runs}


def best_of(results: dict[str, Any], optimizer: str) -> list[dict[str, Any]]:
    """The trainings of an optimizer at the rate that has all seeds."""
    runs = [found for found in results["runs"] if found["optimizer"] == optimizer]
    rate = next(found["lr"] for found in runs if found["seed"] == SEEDS[1])
    return [found for found in runs if found["lr"] == rate]


def draw(results: dict[str, Any], path: Path) -> None:
    """Losses of all seeds on the left, held-out loss by learning rate on the right."""
    from matplotlib import pyplot

    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    style |= {"font.size": 11, "axes.grid": True, "grid.color": "#e4e4e4", "axes.axisbelow": True}
    with pyplot.rc_context(style):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
        for optimizer, (name, colour) in NAMES.items():
            chosen = best_of(results, optimizer)
            held_out = mean(found["held_out"] for found in chosen)
            for number, found in enumerate(chosen):
                label = f"{name}, lr {found['lr']:g}: {held_out:.3f} held out" if number == 0 else None
                left.plot(range(1, len(found["loss"]) + 1), found["loss"], color=colour, lw=1, label=label)
            swept = sorted((r["lr"], r["held_out"]) for r in results["runs"] if r["optimizer"] == optimizer)
            right.scatter(*zip(*swept, strict=True), color=colour, label=name, s=28)
        left.set(xlabel="step", ylabel="bits/byte", title="training loss, three seeds", ylim=(2.2, 6))
        right.set(xlabel="learning rate", ylabel="bits/byte", title="held-out loss", xscale="log")
        for axes in (left, right):
            axes.legend(frameon=False)
        figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", action="store_true", help="train first")
    file = RESULTS / "muon.json"
    if parser.parse_args().run:
        file.write_text(json.dumps(run(), indent=1) + "\n")
    if not file.exists():
        parser.error(f"{file} is not there: --run trains first")
    results = json.loads(file.read_text())
    for optimizer, (name, _) in NAMES.items():
        chosen = best_of(results, optimizer)
        losses = ", ".join(f"{found['held_out']:.3f}" for found in chosen)
        print(f"{name}, lr {chosen[0]['lr']:g}, held out by seed: {losses}")
    draw(results, RESULTS / "muon.png")


if __name__ == "__main__":
    main()
