"""E1: gradient centralization on real digits, paired seeds, three optimizers.

A small convolutional network without batch norm learns scikit-learn's 8x8 digits from 300 images.
Each seed fixes the split, the first weights and the order of the batches for all three optimizers:
torch.optim.AdamW, fusedcalib.AdamW, which must retrace it, and fusedcalib.AdamW(centralize=True).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ..measure.timing import one_thread
from ..report.records import Band, Curve, Gain, Training

TRAIN, EPOCHS, BATCH, LR = 300, 20, 32, 5e-3
FIRST_SEED = 100
NAMES = {
    "torch": "torch.optim.AdamW",
    "plain": "fusedcalib.AdamW",
    "gc": "fusedcalib.AdamW, centralize=True",
}

# Both compute in fp32 in another order of operations, so losses of about 2.3 differ by some units
# in the last place (2.4e-7 each) at first; training then magnifies any difference without limit.
# torch's own for-loop and fused versions differ by up to 2.4e-7 in the first epoch, and a learning
# rate that is wrong by one part in 10,000 makes a difference of 4e-4.
FIRST_EPOCH_TOLERANCE = 1e-4


@dataclass
class Run:
    """One training: the loss of each batch, the test accuracy in % after each epoch."""

    losses: list[float]
    accuracies: list[float]

    def epoch_losses(self) -> list[float]:
        batches = len(self.losses) // EPOCHS
        return [sum(self.losses[i * batches :][:batches]) / batches for i in range(EPOCHS)]


class CurvesDifferError(AssertionError):
    """fusedcalib.AdamW did not retrace torch.optim.AdamW."""


def optimizers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    import fusedcalib

    return {
        "torch": lambda params: torch.optim.AdamW(params, lr=LR),
        "plain": lambda params: fusedcalib.AdamW(params, lr=LR),
        "gc": lambda params: fusedcalib.AdamW(params, lr=LR, centralize=True),
    }


def load(device: torch.device) -> tuple[Tensor, Tensor]:
    """1797 images [n, 1, 8, 8] in 0..1 and their digits [n]."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return images.to(device), torch.tensor(data.target).to(device)


def network() -> nn.Sequential:
    """16-32-64 channels of 3x3, ReLU, no batch norm, max pooling twice, then the global mean."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def train(
    make: Callable[[Any], torch.optim.Optimizer],
    seed: int,
    data: tuple[Tensor, Tensor],
    epochs: int = EPOCHS,
) -> Run:
    """One training; everything random hangs on the seed alone."""
    images, labels = data
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=draw).to(images.device)
    chosen, rest = order[:TRAIN], order[TRAIN:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network().to(images.device)
    optimizer = make(model.parameters())
    losses, accuracies = [], []
    for _ in range(epochs):
        shuffled = torch.randperm(TRAIN, generator=draw).to(images.device)
        for batch in torch.split(chosen[shuffled], BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.detach())
        with torch.no_grad():
            right = model(images[rest]).argmax(1) == labels[rest]
        accuracies.append(right.float().mean())
    # Read once at the end: a read after each batch would make a GPU wait for the host.
    return Run(torch.stack(losses).tolist(), (100 * torch.stack(accuracies)).tolist())


def experiment(seeds: int, device: torch.device, tick: Callable[[], object] = lambda: None) -> Training:
    """Train every optimizer on every seed; `tick` is called after each training.

    Raises:
        CurvesDifferError: the two plain AdamW part within the first epoch.
    """
    torch.backends.cudnn.deterministic = True  # or torch itself would not retrace torch
    torch.backends.cudnn.allow_tf32 = False
    data = load(device)
    runs: dict[str, list[Run]] = {name: [] for name in NAMES}
    with one_thread():
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            for name, make in optimizers().items():
                runs[name].append(train(make, seed, data))
                tick()
    return summary(runs)


def summary(runs: dict[str, list[Run]]) -> Training:
    """The experiment, checked."""
    pairs = list(zip(runs["torch"], runs["plain"], strict=True))
    batches = len(pairs[0][0].losses) // EPOCHS
    apart = [[abs(a - b) for a, b in zip(x.losses, y.losses, strict=True)] for x, y in pairs]
    first = max(max(gap[:batches]) for gap in apart)
    if not first <= FIRST_EPOCH_TOLERANCE:
        raise CurvesDifferError(
            f"fusedcalib.AdamW differs from torch.optim.AdamW by {first:.2g} in the loss of the "
            f"first epoch, more than {FIRST_EPOCH_TOLERANCE:g}"
        )
    final = {name: [run.accuracies[-1] for run in of] for name, of in runs.items()}
    gains = [b - a for a, b in zip(final["torch"], final["gc"], strict=True)]
    return Training(
        setting={"train": TRAIN, "epochs": EPOCHS, "batch": BATCH, "lr": LR},
        seeds=[FIRST_SEED + i for i in range(len(pairs))],
        curves={
            name: Curve(
                NAMES[name],
                loss=_band([run.epoch_losses() for run in of]),
                accuracy=_band([run.accuracies for run in of]),
                final=final[name],
            )
            for name, of in runs.items()
        },
        max_diff_first_epoch=first,
        max_diff_all=max(map(max, apart)),
        tolerance_first_epoch=FIRST_EPOCH_TOLERANCE,
        gain=Gain(sum(gains) / len(gains), sum(gain > 0 for gain in gains), gains),
    )


def _band(curves: list[list[float]]) -> Band:
    """Median and 10-90 % over the seeds, for each epoch."""
    low, middle, high = np.percentile(curves, [10, 50, 90], axis=0).tolist()
    return Band(middle, low, high)
