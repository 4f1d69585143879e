"""What it costs in loss to keep parameters and states in fewer bytes: trainings that differ in nothing else.

python examples/transformer/memory.py --run [--seeds 4]   trains in every way and seed, then draws
python examples/transformer/memory.py                     draws results/ and writes docs/memory.md's table

Weights in bf16 are turned to fp32 for the forward pass: only what is kept differs, not the arithmetic.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs without an installation

import data
import torch
from model import Transformer
from torch import Tensor
from torch.func import functional_call
from train import bits

import fusedcalib

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parents[1] / "docs" / "memory.md"
STEPS, BATCH, CONTEXT, LAYERS, WIDTH, HEADS = 300, 8, 64, 2, 64, 4
HELD_OUT = 64  # batches, of which the last is not drawn by chance


class Way(NamedTuple):
    """An optimizer and how it keeps what it steps; bytes resident a parameter, with its gradient."""

    name: str
    rule: str
    bytes: float
    options: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16


EIGHT: dict[str, Any] = {"state_dtype": "8bit"}
FP32: dict[str, Any] = {"state_dtype": "float32"}
WAYS = {
    "fp32": Way("fp32", "AdamW", 16, {}, torch.float32),
    "exact": Way("split16, fp32 states", "AdamW", 14, {"master_weights": "split16", **FP32}),
    "eight": Way("split16, 8 bit states", "AdamW", 8.13, {"master_weights": "split16", **EIGHT}),
    "seven": Way("split8, 8 bit states", "AdamW", 7.13, {"master_weights": "split8", **EIGHT}),
    "six": Way("rounded at random, 8 bit states", "AdamW", 6.13, {"stochastic_rounding": True, **EIGHT}),
    "bf16": Way("bf16 to nearest", "AdamW", 8, {}),
    "sgd": Way("SGD, fp32", "SGD", 12, {}, torch.float32),
    "sgd eight": Way("SGD, split16, 8 bit momentum", "SGD", 7.06, {"master_weights": "split16", **EIGHT}),
    "sgd bf16": Way("SGD, split16, bf16 momentum", "SGD", 8, {"master_weights": "split16"}),
}
RATES: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9},
}


def train(way: Way, seed: int, text: data.Text) -> float:
    """Bits a byte of held-out text after a training."""
    torch.manual_seed(seed)
    model = Transformer(LAYERS, WIDTH, HEADS, CONTEXT).to(way.dtype)
    options = {**RATES[way.rule], **way.options, "max_grad_norm": 1.0}
    optimizer = getattr(fusedcalib, way.rule)(model.parameters(), **options)
    highest = options["lr"]

    def loss(sequences: Tensor) -> Tensor:
        single = {name: p.float() for name, p in model.named_parameters()}
        return bits(lambda x: functional_call(model, single, (x,)), sequences)

    for step in range(1, STEPS + 1):
        optimizer.param_groups[0]["lr"] = highest * min(step / 20, 1 - 0.9 * step / STEPS)
        optimizer.zero_grad()
        torch.autograd.backward(loss(data.drawn(text.train, step, seed, BATCH, CONTEXT)))
        optimizer.step()
    with torch.no_grad():
        parts = torch.split(data.spaced(text.held_out, HELD_OUT * BATCH, CONTEXT), BATCH)
        return float(torch.stack([loss(part) for part in parts]).mean())


def run(seeds: int) -> dict[str, Any]:
    """Held-out losses of every way and seed."""
    text = data.read()
    found: dict[str, list[float]] = {key: [] for key in WAYS}
    for seed in range(seeds):
        for key, way in WAYS.items():
            found[key].append(train(way, seed, text))
            print(f"seed {seed}, {way.name}: {found[key][-1]:.4f} bits/byte", flush=True)
    setting = {"steps": STEPS, "batch": BATCH, "context": CONTEXT, "layers": LAYERS, "width": WIDTH}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"device": "cpu", "versions": versions, "setting": setting, "held_out": found}


def differences(found: dict[str, list[float]], key: str) -> list[float]:
    """Of each seed, by how much a way is worse than fp32."""
    than = "sgd" if key.startswith("sgd") else "fp32"
    return [a - b for a, b in zip(found[key], found[than], strict=True)]


def draw(results: dict[str, Any], path: Path) -> None:
    """A line a way: a dot for each seed's difference from fp32, and their mean."""
    from matplotlib import pyplot

    found = results["held_out"]
    shown = [key for key in WAYS if key not in ("fp32", "sgd")]
    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    style |= {"font.size": 11, "axes.grid": True, "axes.grid.axis": "x", "grid.color": "#e4e4e4"}
    style |= {"axes.axisbelow": True}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
        axes.axvline(0, color="#6b6b6b", linewidth=1)
        for place, key in enumerate(shown):
            each = differences(found, key)
            colour = "#D55E00" if key == "bf16" else "#0072B2"
            axes.plot(each, [place] * len(each), "o", color=colour, alpha=0.45, markeredgewidth=0)
            axes.plot(statistics.mean(each), place, "|", color=colour, markersize=22, markeredgewidth=2.5)
        axes.set_yticks(range(len(shown)), [f"{WAYS[key].name} ({WAYS[key].bytes:g} B)" for key in shown])
        axes.invert_yaxis()
        axes.set_xlabel("held-out loss minus fp32's, same seed (bits/byte); bars: means")
        versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        title = f"Fewer bytes a parameter, {len(found['fp32'])} seeds of a byte transformer"
        about = f"{results['setting']['steps']} steps, {results['device']}, {versions}"
        axes.set_title(f"{title}\n{about}", fontsize=11)
        figure.savefig(path, dpi=100)


def table(results: dict[str, Any]) -> str:
    """What docs/memory.md says of the results."""
    found, versions = results["held_out"], results["versions"]
    lines = [
        f"Held-out bits a byte of a byte transformer ({results['setting']['steps']} steps, "
        f"{len(found['fp32'])} seeds, {results['device']}, torch {versions['torch']}): mean, and the "
        "difference from fp32 with the same seed, with its standard deviation over seeds. "
        "`python examples/transformer/memory.py --run` makes it.",
        "",
        "| kept as | bytes | bits a byte | minus fp32 |",
        "|---|---|---|---|",
    ]
    for key, way in WAYS.items():
        each = differences(found, key)
        spread = statistics.stdev(each) if len(each) > 1 else 0.0
        apart = "" if key in ("fp32", "sgd") else f"{statistics.mean(each):+.4f} ({spread:.4f})"
        lines.append(f"| {way.name} | {way.bytes:g} | {statistics.mean(found[key]):.4f} | {apart} |")
    picture = "../examples/transformer/results/memory.png"
    return "\n".join([*lines, "", f"![what fewer bytes cost in loss]({picture})"])


def with_table(page: str, results: dict[str, Any]) -> str:
    """The page with the table between its two marks."""
    begin, end = "<!-- memory:begin -->", "<!-- memory:end -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{table(results)}\n\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", action="store_true", help="train first")
    parser.add_argument("--seeds", type=int, default=4, help="of each way (4)")
    options = parser.parse_args()
    file = RESULTS / "memory.json"
    if options.run:
        file.write_text(json.dumps(run(options.seeds)) + "\n")
    results = json.loads(file.read_text())
    draw(results, RESULTS / "memory.png")
    PAGE.write_text(with_table(PAGE.read_text(), results))
    print(table(results))


if __name__ == "__main__":
    main()
