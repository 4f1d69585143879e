"""Networks: residual ones (Zagoruyko and Komodakis 2016) as in the CSGD paper, small ones for digits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from fusedcalib.nn import calibrate


class Block(nn.Module):
    """Norm, ReLU, convolution, twice, and a way around them."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inp), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(inp, out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        changes = inp != out or stride != 1
        self.around = nn.Conv2d(inp, out, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        ready = functional.relu(self.norm1(x))
        inner = self.conv2(functional.relu(self.norm2(self.conv1(ready))))
        return inner + (x if self.around is None else self.around(ready))  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """WRN of 32x32 images.

    Args:
        depth: number of layers, 6 n + 4 of three stages.
        widths: channels of the first convolution and of each stage.
        classes: default 10.
    """

    def __init__(self, depth: int, widths: tuple[int, ...], classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // (2 * len(widths) - 2)
        self.first = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.stages = nn.Sequential(
            *(
                Block(inp if i == 0 else out, out, 2 if i == 0 and stage > 0 else 1)
                for stage, (inp, out) in enumerate(pairwise(widths))
                for i in range(blocks)
            )
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stages(self.first(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


Shape = tuple[int, tuple[int, ...], int]  # depth, widths, branches

# Of the paper's Table 2.
CCNNS: dict[str, Shape] = {
    "CCNNs2-40": (40, (16, 64, 128, 256), 2),
    "CCNNs3-28": (28, (64, 64, 128, 256), 3),
}
# With those of its plain networks; the first convolution has 16 channels, which makes their 8.9M and 36.5M.
NETWORKS: dict[str, Shape] = {
    "resnet18": (18, (16, 16, 16, 32, 64), 1),
    "wrn40": (40, (16, 64, 128, 256), 1),
    "wrn28": (28, (16, 160, 320, 640), 1),
    **{name.lower(): shape for name, shape in CCNNS.items()},
}


def ccnns(name: str, **options: Any) -> WideResNet:
    """A network of the paper's Table 2, with random weights; options as `fusedcalib.nn.calibrate`."""
    depth, widths, branches = CCNNS[name]
    model = WideResNet(depth, widths)
    calibrate(model, branches, **options)
    return model


# -- for digits of 8x8


def with_norm(network: nn.Sequential) -> nn.Sequential:
    """A network with a batch norm behind each convolution and each linear layer but the last."""
    layers: list[nn.Module] = []
    for layer in network:
        layers.append(layer)
        if isinstance(layer, nn.Conv2d):
            layers.append(nn.BatchNorm2d(layer.out_channels))
        elif isinstance(layer, nn.Linear) and layer is not network[-1]:
            layers.append(nn.BatchNorm1d(layer.out_features))
    return nn.Sequential(*layers)


def small_cnn(width: int = 8) -> nn.Module:
    """Four convolutions with batch norm; channels 1, 1, 2, 2 times the width."""

    def layer(inp: int, out: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()

    return nn.Sequential(
        *(*layer(1, width), nn.MaxPool2d(2), *layer(width, width)),
        *(*layer(width, 2 * width), nn.MaxPool2d(2), *layer(2 * width, 2 * width)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)),
    )


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers and ReLU, no norm, ten classes."""
    layers = [part for inp, out in pairwise(widths) for part in (nn.Linear(inp, out), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 10))


def mlp() -> nn.Sequential:
    """Five linear layers, no norm, He's first weights."""
    model = perceptron(64, 256, 128, 64, 32)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return model
