"""CIFAR in its binary version: images as bytes, flips and crops, the scale of the network's input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

SIZE, PAD = 32, 4
PLACE = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True)
class Format:
    """The binary version of a data set: records of label bytes, the last of which counts, and an image."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int
    classes: int


FORMATS = {
    "cifar10": Format(
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        ("test_batch.bin",),
        1,
        10,
    ),
    "cifar100": Format("cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), ("test.bin",), 2, 100),
}


class DataError(Exception):
    """Files that are missing or are not what they should be."""


def load(folder: Path, dataset: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [n, 3, 32, 32] as bytes and their labels [n], then those of the test.

    Args:
        folder: the one with the files, or the one that theirs was unpacked in.
        dataset: "cifar10" or "cifar100".

    Raises:
        DataError: a file is missing or damaged; says which, and where to get it.
    """
    form = FORMATS[dataset]
    names = (*form.train, *form.test)
    found = next((f for f in (folder, folder / form.folder) if (f / names[0]).exists()), folder)
    if missing := [name for name in names if not (found / name).exists()]:
        raise DataError(
            f"no {', '.join(missing)} in {found} or its folder {form.folder}: "
            f"unpack {PLACE}{form.archive} there"
        )
    train, test = (_records([found / name for name in files], form) for files in (form.train, form.test))
    return (*train, *test)


def _records(files: list[Path], form: Format) -> tuple[Tensor, Tensor]:
    length = form.label_bytes + 3 * SIZE * SIZE
    parts = []
    for file in files:
        data = np.fromfile(file, dtype=np.uint8)
        if not len(data) or len(data) % length:
            raise DataError(f"{file} has {len(data)} bytes, not a multiple of {length}: unpack it again")
        parts.append(data.reshape(-1, length))
        if (highest := parts[-1][:, form.label_bytes - 1].max()) >= form.classes:
            raise DataError(
                f"{file} has the label {highest}, beyond {form.classes} classes: another data set?"
            )
    records = torch.from_numpy(np.concatenate(parts))
    labels = records[:, form.label_bytes - 1].long()
    return records[:, form.label_bytes :].reshape(-1, 3, SIZE, SIZE), labels


def augmented(images: Tensor, draw: torch.Generator) -> Tensor:
    """Every image flipped or not, and cropped to its size after padding with zeros, at random."""
    n, channels, height, width = images.shape
    padded = functional.pad(images, (PAD, PAD, PAD, PAD))
    flipped = torch.randint(2, (n, 1), generator=draw).bool()
    top, left = torch.randint(2 * PAD + 1, (2, n, 1), generator=draw)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(flipped, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    examples = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return padded[examples, channel, rows[:, None, :, None], columns[:, None, None, :]]


class Scaling:
    """Bytes to numbers of mean 0 and deviation 1 in each channel of the training images."""

    def __init__(self, images: Tensor) -> None:
        moments = torch.tensor([_moments(channel) for channel in images.unbind(1)], device=images.device)
        self.mean, self.std = moments.T[..., None, None]

    def __call__(self, images: Tensor) -> Tensor:
        return torch.div(images - self.mean, self.std)


def _moments(values: Tensor) -> tuple[float, float]:
    counts = torch.bincount(values.flatten().int(), minlength=256).double()
    levels = torch.arange(256, device=values.device, dtype=torch.float64)
    mean = float((counts * levels).sum() / counts.sum())
    variance = float((counts * (levels - mean).square()).sum() / counts.sum())
    return mean, max(variance, 1e-12) ** 0.5
