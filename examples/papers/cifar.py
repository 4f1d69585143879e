"""Train a network of the papers on CIFAR, plain or calibrated.

python3 bench/run.py cifar --data DIR [--dataset cifar10|cifar100] [--model wrn40 ...] [--resume] ...

Defaults are the GC paper's: SGD, momentum 0.9, weight decay 5e-4, batches of 128, 200 epochs, the learning
rate 0.1 divided by ten every 60; flips, and crops after padding by 4. The CSGD paper has weight decay 1e-4
and 64,000 steps, which are 164 epochs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from cifar_data import FORMATS, DataError, Scaling, augmented, load
from models import NETWORKS, WideResNet
from torch import Tensor, nn
from torch.nn import functional

import fusedcalib
from fusedcalib.bench.env import machine

EVALUATED = 1000


class CheckpointError(Exception):
    """Nothing to resume, or another training's."""


# -- training ---------------------------------------------------------------------------------


class Training:
    """A network, its optimizer and where the training is.

    Args:
        options: of the command.
        data: as `load` returns it, on the device.
    """

    def __init__(self, options: argparse.Namespace, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        self.images, self.labels, self.test_images, self.test_labels = data
        self.batch, self.epochs = options.batch, options.epochs
        self.scaling = Scaling(self.images)
        torch.manual_seed(options.seed)
        self.model = network(options).to(self.images.device)
        self.optimizer = optimizer_of(self.model, options)
        drops = [part * options.epochs for part in options.drops]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda epoch: 0.1 ** sum(epoch >= drop - 1e-9 for drop in drops)
        )
        self.draw = torch.Generator().manual_seed(options.seed)
        self.settings = {name: getattr(options, name) for name in SETTINGS}
        self.history: list[dict[str, float]] = []

    def epoch(self) -> dict[str, float]:
        """One pass over the training images, then the test."""
        start, rate = time.monotonic(), self.optimizer.param_groups[0]["lr"]
        loss, wrong = self._train()
        self.scheduler.step()
        found = {
            "epoch": len(self.history) + 1,
            "lr": rate,
            "loss": loss,
            "train_error": wrong,
            "test_error": self.test_error(),
            "seconds": round(time.monotonic() - start, 2),
        }
        self.history.append(found)
        return found

    def _train(self) -> tuple[float, float]:
        """Mean loss and error in %, as they were on the way."""
        self.model.train()
        n, device = len(self.labels), self.images.device
        losses, wrong = torch.zeros((), device=device), torch.zeros((), device=device)
        batches = torch.split(torch.randperm(n, generator=self.draw), self.batch)
        for i, batch in enumerate(batches):
            where = batch.to(device)
            labels = self.labels[where]
            scores = self.model(self.scaling(augmented(self.images[where], self.draw)))
            loss = functional.cross_entropy(scores, labels)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            losses += loss.detach() * len(batch)
            wrong += (scores.detach().argmax(1) != labels).sum()
            if sys.stdout.isatty():
                print(f"\repoch {len(self.history) + 1}: batch {i + 1}/{len(batches)}", end=" ", flush=True)
        return float(losses) / n, 100 * float(wrong) / n

    def test_error(self) -> float:
        """The error on the test images, in %."""
        self.model.eval()
        wrong = 0
        with torch.no_grad():
            for images, labels in zip(
                torch.split(self.test_images, EVALUATED),
                torch.split(self.test_labels, EVALUATED),
                strict=True,
            ):
                wrong += int((self.model(self.scaling(images)).argmax(1) != labels).sum())
        return 100 * wrong / len(self.test_labels)

    def save(self, path: Path) -> None:
        """All that goes on from here; no half-written file takes the place of a whole one."""
        state = {
            **{name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler")},
            "draw": self.draw.get_state(),
            "settings": self.settings,
            "history": self.history,
        }
        new = path.with_suffix(".new")
        torch.save(state, new)
        os.replace(new, path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of the same settings.

        Raises:
            CheckpointError: there is none, or its settings are others.
        """
        if not path.exists():
            raise CheckpointError(f"no {path} to resume")
        state = torch.load(path, map_location=self.images.device, weights_only=True)
        others = [
            f"--{name.replace('_', '-')} {state['settings'].get(name)}, not {value}"
            for name, value in self.settings.items()
            if state["settings"].get(name) != value
        ]
        if others:
            raise CheckpointError(f"{path} is of another training: {'; '.join(others)}")
        for name in ("model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        self.draw.set_state(state["draw"].cpu())
        self.history = state["history"]


def network(options: argparse.Namespace) -> nn.Module:
    """A network with random weights, calibrated where there are branches."""
    depth, widths, branches = NETWORKS[options.model]
    branches = options.branches or branches
    model = WideResNet(depth, widths, FORMATS[options.dataset].classes)
    if branches > 1:
        fusedcalib.nn.calibrate(model, branches, options.mode)
    return model


def optimizer_of(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """CSGD where there are branches, else SGD."""
    shared = {
        name: getattr(options, name) for name in ("lr", "momentum", "weight_decay", "centralize", "seed")
    }
    if any(isinstance(layer, fusedcalib.nn.CalibConv2d) for layer in model.modules()):
        noise = fusedcalib.WeightNoise(options.noise) if options.noise else None
        return fusedcalib.nn.CSGD(model, noise=noise, branch_lr=options.branch_lr, **shared)
    own: torch.optim.Optimizer = fusedcalib.SGD(model.parameters(), **shared)
    return own


# -- command ----------------------------------------------------------------------------------

SETTINGS = [
    *("dataset", "model", "branches", "mode", "epochs", "batch", "lr", "drops", "momentum"),
    *("weight_decay", "centralize", "noise", "branch_lr", "seed"),
]


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    device = machine.pick_device(options.device)
    checkpoint = options.out / "cifar.pt"
    try:
        data = load(options.data, options.dataset)
        training = Training(options, tuple(part.to(device) for part in data))  # type: ignore[arg-type]
        if options.resume:
            training.resume(checkpoint)
    except (DataError, CheckpointError) as error:
        print(f"fusedcalib: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    count = sum(p.numel() for p in training.model.parameters())
    print(f"{options.model} on {options.dataset}: {count / 1e6:.2f}M parameters, {device}", flush=True)
    while len(training.history) < options.epochs:
        found = training.epoch()
        training.save(checkpoint)
        print(
            f"{chr(13) if sys.stdout.isatty() else ''}epoch {found['epoch']}/{options.epochs}: "
            f"loss {found['loss']:.4f}, train error {found['train_error']:.2f} %, "
            f"test error {found['test_error']:.2f} %, lr {found['lr']:g}, {found['seconds']:.0f} s",
            flush=True,
        )
    results = {**asdict(machine.describe(device)), "settings": training.settings, "history": training.history}
    results["test_error"] = training.history[-1]["test_error"]
    file = options.out / "cifar.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"test error {results['test_error']:.2f} %; wrote {file} and {checkpoint}")
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(
        prog="bench/run.py cifar", description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the binary files, or the one above it")
    add("--dataset", default="cifar10", choices=FORMATS, help="which")
    add("--model", default="resnet18", choices=NETWORKS, help="network")
    add("--branches", type=int, default=0, help="of CSGD; 0: the model's own")
    add("--mode", default="mixed", choices=("mixed", "grouped"), help="of branches")
    add("--epochs", type=int, default=200, help="the CSGD paper has 164")
    add("--batch", type=int, default=128, help="images a step")
    add("--lr", type=float, default=0.1, help="learning rate")
    add(
        "--drops",
        type=float,
        nargs="*",
        default=[0.3, 0.6, 0.9],
        help="parts of the training after which lr is divided by 10",
    )
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight-decay", type=float, default=5e-4, help="the CSGD paper has 1e-4")
    add("--centralize", action="store_true", help="centre gradients")
    add("--noise", type=float, default=1e-4, help="deviation of CSGD's noise; 0: none")
    add("--branch-lr", type=float, default=0.01, help="learning rate of branch weights")
    add("--seed", type=int, default=0, help="of all that is random")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where")
    add("--out", type=Path, default=Path("out"), help="folder for cifar.json and the checkpoint cifar.pt")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.batch < 2 or options.branches < 0:
        parser.error("--epochs must be at least 1, --batch 2, --branches 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
