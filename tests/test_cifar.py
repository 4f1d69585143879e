"""The training on CIFAR, on generated files of its format and a small network."""

import json

import cifar
import models
import numpy as np
import pytest
import torch

from fusedcalib.bench.measure.timing import one_thread

TINY = ["--model", "tiny", "--batch", "16", "--lr", "0.05", "--device", "cpu"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models.NETWORKS, "tiny", (8, (4, 4, 8, 8), 1))
    with one_thread():
        yield


def write(folder, dataset, each=12):
    """Files of a data set; an image's brightness tells its label."""
    form = cifar.FORMATS[dataset]
    folder = folder / form.folder
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name in (*form.train, *form.test):
        labels = draw.integers(0, form.classes, (each, 1), dtype=np.uint8)
        others = np.full((each, form.label_bytes - 1), 255, dtype=np.uint8)
        noise = draw.integers(0, 5, (each, 3 * 32 * 32))
        images = (labels * (250 // form.classes) + noise).astype(np.uint8)
        np.concatenate([others, labels, images], axis=1).tofile(folder / name)
    return folder


@pytest.fixture
def data(tmp_path):
    return write(tmp_path, "cifar10")


def run(data, out, *arguments):
    return cifar.main(["--data", str(data), "--out", str(out), *TINY, *arguments])


def state(out):
    return torch.load(out / "cifar.pt", weights_only=True)


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dataset", "train"), [("cifar10", 60), ("cifar100", 12)])
@pytest.mark.parametrize("above", [False, True])
def test_files_are_read(tmp_path, dataset, train, above):
    folder = write(tmp_path, dataset)
    images, labels, test_images, test_labels = cifar.load(tmp_path if above else folder, dataset)
    assert images.shape == (train, 3, 32, 32)
    assert test_images.shape == (12, 3, 32, 32)
    assert images.dtype == torch.uint8
    step = 250 // cifar.FORMATS[dataset].classes
    for x, y in ((images, labels), (test_images, test_labels)):
        assert y.dtype == torch.int64
        assert ((x.amin((1, 2, 3)) // step) == y).all()
    assert len(labels.unique()) > 1


def test_planes_are_red_green_blue_in_rows(tmp_path):
    folder = write(tmp_path, "cifar10", each=1)
    record = np.arange(1 + 3072) % 251
    record[0] = 3
    record.astype(np.uint8).tofile(folder / "test_batch.bin")
    images, labels = cifar.load(folder, "cifar10")[2:]
    assert labels.tolist() == [3]
    for channel, row, column in ((0, 0, 5), (1, 2, 3), (2, 31, 31)):
        assert images[0, channel, row, column] == (1 + channel * 1024 + row * 32 + column) % 251


def test_missing_files_are_named_with_their_place(data, tmp_path, capsys):
    (data / "data_batch_3.bin").unlink()
    assert run(data, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "no data_batch_3.bin in" in message
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz" in message
    assert run(tmp_path / "none", tmp_path / "out", "--dataset", "cifar100") == 2
    message = capsys.readouterr().err
    assert "no train.bin, test.bin in" in message
    assert "cifar-100-binary.tar.gz" in message


def test_damaged_files_are_named(data):
    file = data / "test_batch.bin"
    whole = file.read_bytes()
    for content in (whole[:-1], b""):
        file.write_bytes(content)
        with pytest.raises(cifar.DataError, match=r"test_batch\.bin has \d+ bytes"):
            cifar.load(data, "cifar10")
    file.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(cifar.DataError, match="label 10"):
        cifar.load(data, "cifar10")


# -- images -----------------------------------------------------------------------------------


def test_augmented_images_are_crops_and_flips():
    images = torch.randint(1, 256, (64, 3, 32, 32), dtype=torch.uint8)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    found = cifar.augmented(images, torch.Generator().manual_seed(0))
    seen = set()
    for image, of in zip(found, padded, strict=True):
        (place,) = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(image.flip(2) if flip else image, of[:, top : top + 32, left : left + 32])
        ]
        seen.add(place)
    for part, all_of_it in zip(zip(*seen, strict=True), (range(9), range(9), range(2)), strict=True):
        assert set(part) == set(all_of_it)
    assert len(seen) > 32


def test_scaling():
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8) // torch.tensor([1, 2, 3]).view(3, 1, 1)
    scaled = cifar.Scaling(images)(images.to(torch.uint8)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(scaled.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std(1, correction=0), torch.ones(3))


# -- training ---------------------------------------------------------------------------------


def test_it_learns_and_says_so(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(data, out, "--epochs", "6", "--drops", "0.5") == 0
    results = json.loads((out / "cifar.json").read_text())
    history = results["history"]
    assert [row["epoch"] for row in history] == list(range(1, 7))
    assert history[-1]["loss"] < history[0]["loss"]
    assert [row["lr"] for row in history] == pytest.approx([0.05] * 3 + [0.005] * 3)
    assert results["test_error"] == history[-1]["test_error"]
    assert results["settings"]["weight_decay"] == 5e-4
    printed = capsys.readouterr().out
    assert "epoch 6/6: loss" in printed
    assert f"test error {results['test_error']:.2f} %; wrote" in printed


def test_one_epoch_of_cifar100_calibrated(tmp_path):
    folder = write(tmp_path, "cifar100")
    setting = ("--epochs", "1", "--branches", "2", "--centralize")
    assert run(folder, tmp_path, "--dataset", "cifar100", *setting) == 0
    found = state(tmp_path)
    groups = {group["name"]: group for group in found["optimizer"]["param_groups"]}
    assert list(groups) == ["calibrated", "others", "branches"]
    assert groups["calibrated"]["centralize"] is True
    assert len(next(value for name, value in reversed(found["model"].items()) if "bias" in name)) == 100


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("branches", ["0", "2"])
def test_resumed_is_as_uninterrupted(data, tmp_path, monkeypatch, branches):
    setting = ("--epochs", "3", "--drops", "0.6", "--branches", branches)
    assert run(data, tmp_path / "whole", *setting) == 0
    epoch = cifar.Training.epoch

    def stops(self):
        if len(self.history) == 1:
            self._train()  # what is lost of the epoch in which it stops must not matter
            raise StoppedError
        return epoch(self)

    monkeypatch.setattr(cifar.Training, "epoch", stops)
    with pytest.raises(StoppedError):
        run(data, tmp_path / "parts", *setting)
    monkeypatch.setattr(cifar.Training, "epoch", epoch)
    assert len(state(tmp_path / "parts")["history"]) == 1
    assert run(data, tmp_path / "parts", *setting, "--resume") == 0
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert [row["loss"] for row in whole["history"]] == [row["loss"] for row in parts["history"]]
    assert all(torch.equal(parts["model"][name], value) for name, value in whole["model"].items())
    assert torch.equal(whole["draw"], parts["draw"])


def test_another_trainings_checkpoint_is_refused(data, tmp_path, capsys):
    assert run(data, tmp_path, "--epochs", "1", "--resume") == 2
    assert "to resume" in capsys.readouterr().err
    assert run(data, tmp_path, "--epochs", "1") == 0
    assert run(data, tmp_path, "--epochs", "1", "--weight-decay", "0.1", "--resume") == 2
    assert "--weight-decay 0.0005, not 0.1" in capsys.readouterr().err


# -- networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "millions"), [("wrn40", 8.9), ("wrn28", 36.5), ("resnet18", 0.18)])
def test_plain_networks_are_of_the_papers_size(name, millions):
    depth, widths, branches = models.NETWORKS[name]
    with torch.device("meta"):
        model = models.WideResNet(depth, widths)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + (1 if name == "resnet18" else 3) == depth
    assert branches == 1
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.05 if millions > 1 else 0.02)
