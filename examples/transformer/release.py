"""What gradient release saves and costs: a training with it and without, which differ in nothing else.

python examples/transformer/release.py --run   trains and measures both, then draws
python examples/transformer/release.py         draws results/ and writes docs/memory.md's words

Memory is what the storages of all tensors take that a step makes, on the CPU; times are of steps in turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from weakref import finalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs without an installation

import data
import torch
from model import Transformer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train import bits

import fusedcalib

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parents[1] / "docs" / "memory.md"
STEPS, ROUNDS, WARM, CONTEXT, LAYERS, WIDTH, HEADS = 60, 60, 5, 64, 4, 384, 4
SMALL_BATCH, BATCH = 1, 4  # sequences: where memory is looked at, where time is
BUCKETS = (1 << 20, 4 << 20, 64 << 20)  # bytes; memory is looked at in the first, the last is the default
MANY, FEW, MOST, SMALL = (100, 1000, 10_000), 10, 100, 8  # parameters, those of a bucket, buckets, elements
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}
SEVEN: dict[str, Any] = {"master_weights": "split8", "state_dtype": "8bit"}


class Live(TorchDispatchMode):
    """Bytes of the storages that live, after each operation; those of the given tensors are there before."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = 0
        self.history: list[int] = []
        for tensor in tensors:
            self.see(tensor)

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            finalize(storage, self.gone, key, size)

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        self.history.append(self.now)
        return out


class Training:
    """One of the two trainings.

    Args:
        bucket_bytes: in which gradients are released; None for no release.
        batch: sequences a step.
        dtype: of the weights.
        **options: AdamW's.
    """

    def __init__(
        self, text: data.Text, bucket_bytes: int | None, batch: int, dtype: torch.dtype, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.text, self.batch, self.taken = text, batch, 0
        self.model = Transformer(LAYERS, WIDTH, HEADS, CONTEXT).to(dtype)
        self.params = list(self.model.parameters())
        self.optimizer = fusedcalib.AdamW(self.params, **{**OPTIONS, **options})
        if bucket_bytes is not None:
            fusedcalib.enable_gradient_release(self.model, self.optimizer, bucket_bytes)

    def step(self) -> float:
        """The loss, in bits a byte, before the step."""
        self.taken += 1
        self.optimizer.param_groups[0]["lr"] = 1e-3 * min(self.taken / 10, 1 - 0.9 * self.taken / STEPS)
        loss = bits(self.model, data.drawn(self.text.train, self.taken, 0, self.batch, CONTEXT))
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss.item()

    def tensors(self) -> list[torch.Tensor]:
        """Parameters and states."""
        states = [t for entry in self.optimizer.state.values() for t in entry.values()]
        return [*self.params, *states]


def training(text: data.Text, release: bool) -> dict[str, Any]:
    """Losses of a training in bf16, and the bytes that live within its last step."""
    run = Training(text, BUCKETS[0] if release else None, SMALL_BATCH, torch.bfloat16, **SEVEN)
    losses = [run.step() for _ in range(STEPS - 1)]
    run.optimizer.zero_grad()
    with Live(run.tensors()) as live:
        losses.append(run.step())
    return {"loss": losses, "live": live.history}


def times(text: data.Text) -> dict[str, Any]:
    """CPU seconds of whole training steps in fp32, in each size of buckets and without release, in turns."""
    sizes: dict[str, int | None] = {"without": None, **{str(size): size for size in BUCKETS}}
    runs = {key: Training(text, size, BATCH, torch.float32) for key, size in sizes.items()}
    found: dict[str, list[float]] = {key: [] for key in runs}
    for number in range(WARM + ROUNDS):
        for key in sorted(runs, reverse=number % 2 == 0):
            begin = time.process_time()
            runs[key].step()
            if number >= WARM:
                found[key].append(time.process_time() - begin)
    plans = {key: len(run.optimizer._engine._plans._parts) for key, run in runs.items()}
    return {"seconds": found, "buckets": plans}


def bucket_times() -> dict[str, float]:
    """Microseconds of host a bucket of a few small parameters, by how many there are besides."""
    found = {}
    for count in MANY:
        model = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(SMALL)) for _ in range(count))
        optimizer = fusedcalib.AdamW(model.parameters())
        params, each = list(model)[: FEW * MOST], []
        with fusedcalib.enable_gradient_release(model, optimizer, FEW * SMALL * 4) as handle:
            for _ in range(WARM + ROUNDS):
                for param in params:
                    param.grad = torch.ones(SMALL)
                begin = time.process_time()
                for param in params:
                    handle._collect(param)
                each.append((time.process_time() - begin) * FEW / len(params))
                optimizer.step()
        found[str(count)] = 1e6 * statistics.median(each[WARM:])
    return found


def run() -> dict[str, Any]:
    """Both trainings, their memory and their times."""
    torch.set_num_threads(1)
    text = data.read()
    found = {key: training(text, key == "with") for key in ("with", "without")}
    sizes = [p.numel() for p in Transformer(LAYERS, WIDTH, HEADS, CONTEXT).parameters()]
    setting = {
        "steps": STEPS,
        "batches": [SMALL_BATCH, BATCH],
        "context": CONTEXT,
        "layers": LAYERS,
        "width": WIDTH,
    }
    return {
        "device": "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "setting": {**setting, "bucket_bytes": BUCKETS[0], "bucket": FEW},
        "parameters": {"count": sum(sizes), "tensors": len(sizes), "largest": max(sizes)},
        "trainings": found,
        "times": times(text),
        "bucket_times": bucket_times(),
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Losses on each other, and the bytes that live within a step."""
    from matplotlib import pyplot

    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    style |= {"font.size": 11, "axes.grid": True, "grid.color": "#e4e4e4", "axes.axisbelow": True}
    ways = {"without": ("backward(); step()", "#E69F00", 5.0), "with": ("gradient release", "#0072B2", 1.8)}
    with pyplot.rc_context(style):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for key, (name, colour, width) in ways.items():
            losses, live = (results["trainings"][key][which] for which in ("loss", "live"))
            left.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=width, label=name)
            share = [i / (len(live) - 1) for i in range(len(live))]
            right.plot(share, [b / 1e6 for b in live], color=colour, linewidth=1.8, label=name)
        left.set_title("The same loss, step by step (bits/byte)", fontsize=11)
        left.set_xlabel("step")
        right.set_title("Tensors that live within a step (MB)", fontsize=11)
        right.set_xlabel("forward pass, backward pass, step (share of operations)")
        right.set_ylim(bottom=0)
        left.legend(frameon=False)
        versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        millions = results["parameters"]["count"] / 1e6
        title = f"AdamW, split8 and 8 bit, {millions:.1f}M parameters in bf16, buckets of 1 MiB"
        figure.suptitle(f"{title} ({results['device']}, {versions})", fontsize=11, x=0.01, ha="left")
        figure.savefig(path, dpi=100)


def words(results: dict[str, Any]) -> str:
    """What docs/memory.md says of the results."""
    parameters, setting = results["parameters"], results["setting"]
    live = {key: max(results["trainings"][key]["live"]) for key in ("with", "without")}
    saved = (live["without"] - live["with"]) / parameters["count"]
    hosts = [f"{value:.0f} among {int(name):,}" for name, value in results["bucket_times"].items()]
    took = [_share_of_time(results["times"], key) for key in results["times"]["seconds"] if key != "without"]
    versions = f"one thread, torch {results['versions']['torch']}"
    lines = [
        f"A byte transformer of {parameters['count'] / 1e6:.1f}M parameters in {parameters['tensors']} "
        f"tensors ({results['device']}, {versions}), in buckets of 1 MiB unless said; "
        "`python examples/transformer/release.py --run` measures it:",
        "",
        f"- Its {setting['steps']} losses are the same numbers with release and without.",
        f"- Tensors take {live['without'] / 1e6:.1f} MB at most within a step without release, and "
        f"{live['with'] / 1e6:.1f} MB with it: {saved:.2f} bytes a parameter less (bf16, a sequence a step).",
        f"- A training step takes {', '.join(took)}, as a share of one without (seconds of the CPU, "
        f"medians of {len(results['times']['seconds']['without'])} in turns; fp32, "
        f"{setting['batches'][1]} sequences).",
        f"- A bucket of {setting['bucket']} small parameters takes the host, in µs: {', '.join(hosts)}.",
        "",
        "![loss and memory with gradient release](../examples/transformer/results/release.png)",
    ]
    return "\n".join(lines)


def _share_of_time(times: dict[str, Any], key: str) -> str:
    """How long a step takes as a share of one without release, in buckets of one size."""
    ratios = [a / b for a, b in zip(times["seconds"][key], times["seconds"]["without"], strict=True)]
    low, high = (statistics.quantiles(ratios, n=10)[i] for i in (0, -1))
    buckets = times["buckets"][key]
    about = f"in {buckets} bucket{'s' * (buckets > 1)} of {int(key) >> 20} MiB"
    return f"{statistics.median(ratios):.3f} ({low:.3f}-{high:.3f}) {about}"


def with_words(page: str, results: dict[str, Any]) -> str:
    """The page with the words between their two marks."""
    begin, end = "<!-- release:begin -->", "<!-- release:end -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{words(results)}\n\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", action="store_true", help="train and measure first")
    options = parser.parse_args()
    file = RESULTS / "release.json"
    if options.run:
        file.write_text(json.dumps(run()) + "\n")
    results = json.loads(file.read_text())
    draw(results, RESULTS / "release.png")
    PAGE.write_text(with_words(PAGE.read_text(), results))
    print(words(results))


if __name__ == "__main__":
    main()
