"""What the source papers claim, in miniature: real digits, paired seeds, a minute or less each on a CPU.

python -m fusedcalib.bench.papers [gc | csgd | svgd ...]

Each seed fixes the split, the order of the batches and, where shapes agree, the first weights of both sides
of a comparison. Images of 8x8 say nothing about other sizes: what is looked at is the direction.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev

import torch
from torch import Tensor, nn

import fusedcalib

from . import digits
from .timing import one_thread

Data = tuple[Tensor, Tensor]
Maker = Callable[[], tuple[nn.Module, torch.optim.Optimizer]]
Schedule = Callable[[float], float]
TRAIN, BATCH, FIRST_SEED = 300, 32, 1000


@dataclass(frozen=True)
class Comparison:
    """Test errors in % of two sides over the same seeds.

    Attributes:
        title: what is compared.
        base, other: errors, of each seed.
        gain: by how much the other side is expected to be better, at least, in points of error.
        wins: in which share of the seeds it must not be worse.
    """

    title: str
    base: tuple[float, ...]
    other: tuple[float, ...]
    gain: float = 0.0
    wins: float = 0.5

    @property
    def differences(self) -> list[float]:
        """Base less other: above 0 is better."""
        return [a - b for a, b in zip(self.base, self.other, strict=True)]

    @property
    def won(self) -> int:
        """Seeds in which the other side is not worse."""
        return sum(d >= 0 for d in self.differences)

    @property
    def holds(self) -> bool:
        """Whether what is expected was found."""
        return mean(self.differences) > self.gain and self.won >= self.wins * len(self.base)

    def __str__(self) -> str:
        error = stdev(self.differences) / math.sqrt(len(self.differences))
        return (
            f"{self.title}: {mean(self.base):.2f} -> {mean(self.other):.2f} % error, by "
            f"{mean(self.differences):.2f} (se {error:.2f}), not worse in {self.won} of {len(self.base)}: "
            f"{'as expected' if self.holds else 'NOT AS EXPECTED'}"
        )


def constant(part: float) -> float:
    """The learning rate all the way."""
    return 1.0


def falling(part: float) -> float:
    """Halved and divided by ten where the SVGD paper does, at 27 and 60 % of a training."""
    return 1.0 if part < 0.27 else 0.5 if part < 0.6 else 0.1


def error_of(make: Maker, seed: int, data: Data, epochs: int, schedule: Schedule = constant) -> float:
    """The test error in % after one training; everything random hangs on the seed."""
    images, labels = data
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=draw)
    chosen, rest = order[:TRAIN], order[TRAIN:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: schedule(epoch / epochs))
    for _ in range(epochs):
        for batch in torch.split(chosen[torch.randperm(TRAIN, generator=draw)], BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            torch.autograd.backward(loss)
            optimizer.step()
        scheduler.step()
    model.eval()
    with torch.no_grad():
        wrong = model(images[rest]).argmax(1) != labels[rest]
    return 100 * float(wrong.float().mean())


def errors_of(
    make: Maker, seeds: int, data: Data, epochs: int, schedule: Schedule = constant
) -> tuple[float, ...]:
    return tuple(error_of(make, FIRST_SEED + i, data, epochs, schedule) for i in range(seeds))


def centralization(seeds: int = 6) -> list[Comparison]:
    """Gradient centralization (Yong et al. 2020): less error, in a network without batch norm.

    With batch norm there is no difference to be seen at this size.
    """
    data = digits.load(torch.device("cpu"))
    rules = {
        "SGD": {"lr": 0.1, "momentum": 0.9},
        "Adam": {"lr": 0.005},
        "Adagrad": {"lr": 0.02},
    }
    found = []
    for name, options in rules.items():

        def make(
            centralize: bool, name: str = name, options: dict[str, float] = options
        ) -> tuple[nn.Module, torch.optim.Optimizer]:
            model = digits.network()
            return model, fusedcalib.create(name, model.parameters(), centralize=centralize, **options)

        plain = errors_of(lambda make=make: make(False), seeds, data, 20)  # type: ignore[misc]
        centred = errors_of(lambda make=make: make(True), seeds, data, 20)  # type: ignore[misc]
        found.append(Comparison(f"{name}, without and with centralize", plain, centred, 1.0, 5 / 6))
    return found


def small_cnn(width: int = 8) -> nn.Module:
    """Four convolutions with batch norm; channels 1, 1, 2, 2 times the width."""

    def layer(inp: int, out: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()

    return nn.Sequential(
        *(*layer(1, width), nn.MaxPool2d(2), *layer(width, width)),
        *(*layer(width, 2 * width), nn.MaxPool2d(2), *layer(2 * width, 2 * width)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)),
    )


def calibrated(branches: int, mode: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A calibrated network and its optimizer."""
    model = small_cnn()
    fusedcalib.nn.calibrate(model, branches, mode)
    return model, fusedcalib.nn.CSGD(model, lr=0.05, momentum=0.9)


def csgd(seeds: int = 6) -> list[Comparison]:
    """CSGD (Zhuo et al. 2019): four branches have less error than one.

    "mixed" has four times the parameters; a plain network as wide is as good.
    """
    data = digits.load(torch.device("cpu"))
    one = errors_of(lambda: calibrated(1, "mixed"), seeds, data, 25)
    return [
        Comparison(
            f"CSGD, one branch and four, {mode}",
            one,
            errors_of(lambda mode=mode: calibrated(4, mode), seeds, data, 25),  # type: ignore[misc]
            0.2,
        )
        for mode in ("grouped", "mixed")
    ]


def mlp() -> nn.Module:
    """Five linear layers, no norm, He's first weights."""
    widths = (64, 256, 128, 64, 32)
    layers = [part for inp, out in pairwise(widths) for part in (nn.Linear(inp, out), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return model


def virtual(scale: float | None, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A perceptron, virtual where there is a scale, and SGD."""
    model = mlp()
    if scale is not None:
        fusedcalib.nn.virtualize(model, scale)
    return model, fusedcalib.SGD(model.parameters(), lr=lr)


def svgd(seeds: int = 20) -> list[Comparison]:
    """SVGD (Li and Shu 2019): less error than SGD, without batch norm. RMSprop has less still."""
    data = digits.load(torch.device("cpu"))
    own = errors_of(lambda: virtual(0.03, 0.3), seeds, data, 30, falling)
    return [
        Comparison(
            f"SGD (lr {lr}) and SVGD (lr 0.3, s 0.03)",
            errors_of(lambda lr=lr: virtual(None, lr), seeds, data, 30, falling),  # type: ignore[misc]
            own,
        )
        for lr in (0.1, 0.3)
    ]


EXPERIMENTS = {"gc": centralization, "csgd": csgd, "svgd": svgd}


def main(names: list[str]) -> int:
    unknown = set(names) - set(EXPERIMENTS)
    if unknown:
        print(
            f"no experiment {', '.join(sorted(unknown))}; there are {', '.join(EXPERIMENTS)}", file=sys.stderr
        )
        return 2
    held = True
    with one_thread():
        for name in names or EXPERIMENTS:
            for comparison in EXPERIMENTS[name]():
                print(comparison, flush=True)
                held = held and comparison.holds
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
