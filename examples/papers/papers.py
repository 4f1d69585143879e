"""What the source papers claim, in miniature: real digits, paired seeds, some minutes in all on a CPU.

python3 bench/run.py papers [gc | noise | hilbert | csgd | svgd ...] [--out DIR] [--seeds N] [--workers N]

Each seed fixes the split, the order of the batches and, where shapes agree, the first weights of both sides
of a comparison. Images of 8x8 say nothing about other sizes: what is looked at is the direction.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import hilbert
import torch
from judge import Comparison, Expected, Retrace, better, learns, same, worse
from models import mlp, perceptron, small_cnn, with_norm
from torch import Tensor, nn

import fusedcalib
from fusedcalib.bench.env import machine
from fusedcalib.bench.measure.timing import one_thread
from fusedcalib.bench.report import tables
from fusedcalib.bench.repository import digits

Data = tuple[Tensor, Tensor]
Maker = Callable[[], tuple[nn.Module, torch.optim.Optimizer]]
Schedule = Callable[[float], float]
TRAIN, BATCH, FIRST_SEED = 300, 32, 1000


Found = Iterator[Comparison | Retrace]


def constant(part: float) -> float:
    """A schedule that keeps the learning rate."""
    return 1.0


def falling(part: float) -> float:
    """A schedule that halves and divides by ten where the SVGD paper does, at 27 and 60 % of a training."""
    return 1.0 if part < 0.27 else 0.5 if part < 0.6 else 0.1


def error_of(
    make: Maker, seed: int, data: Data, epochs: int, schedule: Schedule = constant, train: int = TRAIN
) -> float:
    """The test error in % after one training; everything random hangs on the seed."""
    images, labels = data
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=draw)
    chosen, rest = order[:train], order[train:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: schedule(epoch / epochs))
    for _ in range(epochs):
        for batch in torch.split(chosen[torch.randperm(train, generator=draw)], BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            torch.autograd.backward(loss)
            optimizer.step()
        scheduler.step()
    model.eval()
    with torch.no_grad():
        wrong = model(images[rest]).argmax(1) != labels[rest]
    return 100 * float(wrong.float().mean())


def errors_of(make: Maker, seeds: int, *setting: Any) -> tuple[float, ...]:
    """The test error of each seed; `setting` as `error_of` takes it."""
    return tuple(error_of(make, FIRST_SEED + i, *setting) for i in range(seeds))


def centring(
    name: str, lr: float, norm: bool, centralize: bool, **options: float
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The convolutional network of digits.py, and an optimizer."""
    model = with_norm(digits.network()) if norm else digits.network()
    return model, fusedcalib.create(name, model.parameters(), lr=lr, centralize=centralize, **options)


def centralization(seeds: int | None = None) -> Found:
    """Gradient centralization (Yong et al. 2020): less error, in a network without batch norm.

    With batch norm there is no difference to be seen at this size; some trainings with SGD end badly, with
    and without centring, so that there are more seeds.
    """
    data = digits.load(torch.device("cpu"))
    rules: dict[str, dict[str, Any]] = {
        "SGD": {"lr": 0.1, "momentum": 0.9},
        "Adam": {"lr": 0.005},
        "Adagrad": {"lr": 0.02},
    }
    for norm, words, usual, expected in (
        (False, "", 6, better(1.0, 5 / 6)),
        (True, ", batch norm", 12, same()),
    ):
        for name, options in rules.items():
            plain, centred = (
                errors_of(
                    partial(centring, name, norm=norm, centralize=on, **options), seeds or usual, data, 20
                )
                for on in (False, True)
            )
            yield Comparison(f"{name}, without and with centralize{words}", plain, centred, expected)


def zeros(noise: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A perceptron of five hidden layers, all zero, and SGD whose noise hangs on the seed."""
    model = perceptron(64, 50, 50, 50, 50, 50)
    for p in model.parameters():
        nn.init.zeros_(p)
    seed = torch.initial_seed()
    return model, fusedcalib.SGD(model.parameters(), lr=0.1, noise=noise, seed=seed)


def gradient_noise(seeds: int = 5) -> Found:
    """Gradient noise (Neelakantan et al. 2015): without it a network of zeros learns nothing."""
    images, labels = digits.load(torch.device("cpu"))
    data = (images - images.mean()) / images.std(), labels
    setting = data, 60, constant, 1000  # 1920 steps
    without = errors_of(partial(zeros, None), seeds, *setting)
    noisy = errors_of(partial(zeros, fusedcalib.GradientNoise(0.01)), seeds, *setting)
    yield Comparison("SGD from zeros, without and with noise", without, noisy, learns())


def retraces() -> Found:
    """Losses that the SVGD authors logged; there is nothing random in them."""
    for name, (published, options) in hilbert.RUNS.items():
        x = torch.zeros(hilbert.SIZE, dtype=torch.float64, requires_grad=True)
        optimizer = fusedcalib.create(name, [x], **options)

        def step(grad: Tensor, x: Tensor = x, optimizer: torch.optim.Optimizer = optimizer) -> None:
            x.grad = grad
            optimizer.step()

        found = hilbert.losses(x.detach, step, x.dtype)
        yield Retrace(f"{name} on the Hilbert matrix", tuple(published), tuple(found.tolist()))


def calibrated(branches: int, mode: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A calibrated network and its optimizer."""
    model = small_cnn()
    fusedcalib.nn.calibrate(model, branches, mode)
    return model, fusedcalib.nn.CSGD(model, lr=0.05, momentum=0.9)


def csgd(seeds: int = 12) -> Found:
    """CSGD (Zhuo et al. 2019): four branches have less error than one.

    "mixed" has four times the parameters; a plain network as wide is as good.
    """
    data = digits.load(torch.device("cpu"))
    one = errors_of(partial(calibrated, 1, "mixed"), seeds, data, 25)
    for mode in ("grouped", "mixed"):
        four = errors_of(partial(calibrated, 4, mode), seeds, data, 25)
        yield Comparison(f"CSGD, one branch and four, {mode}", one, four, better(0.2))


def virtual(
    scale: float | None, lr: float, name: str = "SGD", norm: bool = False, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A perceptron, virtual where there is a scale, and an optimizer."""
    model = with_norm(mlp()) if norm else mlp()
    if scale is not None:
        fusedcalib.nn.virtualize(model, scale)
    return model, fusedcalib.create(name, model.parameters(), lr=lr, **options)


def svgd(seeds: int | None = None) -> Found:
    """SVGD (Li and Shu 2019): less error than SGD, without batch norm. RMSprop has less still.

    RMSprop has TensorFlow's decay, 0.9: at torch's, 0.99, there is no difference. Nor is there one from SGD
    in the paper's own setting: batch norm, an L1 penalty, more images.
    """
    data = digits.load(torch.device("cpu"))
    own = errors_of(partial(virtual, 0.03, 0.3), seeds or 20, data, 30, falling)
    rivals: list[tuple[str, dict[str, Any], Expected]] = [
        ("SGD", {"lr": 0.1}, better()),
        ("SGD", {"lr": 0.3}, better()),
        ("RMSprop", {"lr": 0.003, "alpha": 0.9}, worse()),
    ]
    for name, options, expected in rivals:
        base = errors_of(partial(virtual, None, name=name, **options), seeds or 20, data, 30, falling)
        words = ", ".join(f"{key} {value:g}" for key, value in options.items())
        yield Comparison(f"{name} ({words}) and SVGD (lr 0.3, s 0.03)", base, own, expected)
    setting = data, 28, falling, 1000  # 896 steps
    base, own = (
        errors_of(partial(virtual, scale, 0.1, norm=True, l1=1e-4), seeds or 10, *setting)
        for scale in (None, 0.1)
    )
    yield Comparison("SGD (lr 0.1) and SVGD (lr 0.1, s 0.1), batch norm", base, own, same(0.5))


EXPERIMENTS: dict[str, Callable[..., Found]] = {
    "gc": centralization,
    "noise": gradient_noise,
    "hilbert": retraces,
    "csgd": csgd,
    "svgd": svgd,
}
WITHOUT_SEEDS = ("hilbert",)


def records_of(name: str, seeds: int | None) -> list[dict[str, Any]]:
    """What an experiment found, as data; its own number of seeds by default."""
    given = () if name in WITHOUT_SEEDS or seeds is None else (seeds,)
    with one_thread():
        return [{"experiment": name, **found.record()} for found in EXPERIMENTS[name](*given)]


def in_turn(names: list[str], seeds: int | None, workers: int) -> Iterator[list[dict[str, Any]]]:
    """The records of each experiment, in order; several at a time where there is more than one worker."""
    if workers == 1:
        yield from (records_of(name, seeds) for name in names)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(records_of, names, [seeds] * len(names))


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    import papers_page
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140)
    start = time.monotonic()
    head = asdict(machine.describe(torch.device("cpu")))
    head["cpu"]["threads"] = 1  # of each training
    names = options.names or list(EXPERIMENTS)
    records = []
    for found in in_turn(names, options.seeds, min(options.workers, len(names))):
        records += found
        for record in found:
            console.print(papers_page.line(record), highlight=False, soft_wrap=True)
    results = {**head, "seconds": round(time.monotonic() - start, 1), "comparisons": records}
    tables.show(papers_page.table(results))
    for file in papers_page.save(results, options.out):
        console.print(f"wrote {file}", highlight=False)
    failed = [record["title"] for record in records if not record["holds"]]
    for title in failed:
        console.print(f"NOT AS EXPECTED: {title}", style="bold red")
    console.print(f"{results['seconds']:.0f} s")
    return 1 if failed else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="bench/run.py papers", description=about)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(EXPERIMENTS)} (all)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for papers.json and papers.png")
    parser.add_argument("--seeds", type=int, default=None, help="of each comparison, at least 2 (5 to 20)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one for each core)")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(EXPERIMENTS)):
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    if options.seeds is not None and options.seeds < 2:
        parser.error("--seeds must be at least 2")
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
