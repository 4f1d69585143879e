"""The parameter lists that are measured: shapes as data, so every run times the same work.

Linear weights are `(out, in)` and convolution weights `(out, in, height, width)`, as PyTorch keeps
them: the first axis counts rows, and a row is what gradient centralization takes the mean of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import architectures
from .architectures import Shape


@dataclass(frozen=True)
class ParamList:
    """One list of parameters: what the optimizer sees of a model."""

    name: str
    shapes: tuple[Shape, ...]
    group_each: bool = False  # one param group per tensor
    offset: int = 0  # elements between the allocation and the tensor: breaks 16-byte alignment

    @property
    def tensors(self) -> int:
        return len(self.shapes)

    @property
    def params(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def llama_layer(copies: int) -> Iterator[Shape]:
    """Layers of Llama-3-8B."""
    for _ in range(copies):
        yield from (param.shape for param in architectures.LLAMAS["llama3-8b"].layer())


def gpt2(*numbers: int) -> Iterator[Shape]:
    """GPT-2 of so many layers, width, vocabulary and context."""
    return (param.shape for param in architectures.gpt2(*numbers))


def resnet50() -> Iterator[Shape]:
    """ResNet-50 for 1000 classes: each convolution is followed by a batch norm's two vectors."""

    def conv_norm(out: int, inp: int, k: int) -> Iterator[Shape]:
        yield from ((out, inp, k, k), (out,), (out,))

    yield from conv_norm(64, 3, 7)
    inp = 64
    for mid, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from conv_norm(mid, inp, 1)
            yield from conv_norm(mid, mid, 3)
            yield from conv_norm(4 * mid, mid, 1)
            if block == 0:
                yield from conv_norm(4 * mid, inp, 1)
            inp = 4 * mid
    yield from ((1000, 2048), (1000,))


def vit_b() -> Iterator[Shape]:
    """ViT-B/16 for images of 224 x 224 and 1000 classes."""
    yield from ((1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,))
    for _ in range(12):
        for out, inp in ((2304, 768), (768, 768), (3072, 768), (768, 3072)):
            yield from ((out, inp), (out,))
        yield from ((768,),) * 4
    yield from ((768,), (768,), (1000, 768), (1000,))


SMALL_SET: tuple[Shape, ...] = ((64,), (128, 128), (128,), (64, 64, 3, 3), (256,))

# Made on demand: naming a list costs nothing, and only what is measured is laid out.
LISTS: dict[str, Callable[[], ParamList]] = {
    "gpt2-124m": lambda: ParamList("gpt2-124m", tuple(gpt2(*architectures.GPT2))),
    "gpt2-small-cpu": lambda: ParamList("gpt2-small-cpu", tuple(gpt2(4, 512, 24576, 1024))),
    "llama3-8b-layer-x1": lambda: ParamList("llama3-8b-layer-x1", tuple(llama_layer(1))),
    "llama3-8b-layer-x4": lambda: ParamList("llama3-8b-layer-x4", tuple(llama_layer(4))),
    "resnet50": lambda: ParamList("resnet50", tuple(resnet50())),
    "vit-b": lambda: ParamList("vit-b", tuple(vit_b())),
    "small-1000": lambda: ParamList("small-1000", SMALL_SET * 200),
    "1000x1024": lambda: ParamList("1000x1024", ((1024,),) * 1000),
    "10000x64": lambda: ParamList("10000x64", ((64,),) * 10_000),
    "tiny-1000": lambda: ParamList("tiny-1000", ((8,),) * 1000),
    "long-rows-128k": lambda: ParamList("long-rows-128k", ((512, 131_072),)),
    "long-rows-4m": lambda: ParamList("long-rows-4m", ((16, 4 * 2**20),)),
    "odd-columns": lambda: ParamList("odd-columns", ((4099, 2047),)),
    "even-columns": lambda: ParamList("even-columns", ((4099, 2048),)),
    "depthwise": lambda: ParamList("depthwise", ((512, 1, 3, 3),)),
    "unaligned": lambda: ParamList("unaligned", ((4096, 2048),) * 4, offset=1),
    "aligned": lambda: ParamList("aligned", ((4096, 2048),) * 4),
    "groups-200": lambda: ParamList("groups-200", ((128, 128),) * 200, group_each=True),
    # 100M parameters in ever smaller pieces, every row of the same length.
    "split-10": lambda: ParamList("split-10", ((10_000, 1000),) * 10),
    "split-1000": lambda: ParamList("split-1000", ((100, 1000),) * 1000),
    "split-10000": lambda: ParamList("split-10000", ((10, 1000),) * 10_000),
}


def get(name: str) -> ParamList:
    """The list of that name; `single-2^20` is one tensor of 2^20 elements, any exponent.

    A single tensor is a matrix with rows of 1024, so that there is something to centralize.
    """
    if name in LISTS:
        return LISTS[name]()
    head, _, exponent = name.partition("^")
    if head == "single-2" and exponent.isdigit() and int(exponent) >= 10:
        return ParamList(name, ((2 ** (int(exponent) - 10), 1024),))
    raise KeyError(f"no parameter list named {name!r}; there are {', '.join(sorted(LISTS))}")


def _placed(shape: Shape, offset: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    flat = torch.empty(math.prod(shape) + offset, device=device, dtype=dtype)
    return flat[offset:].view(shape)


def _draw(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def initial(shape: Shape, index: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The start value of tensor `index`: the same for every method and every run."""
    draw = _draw(device, 2 * index + 1)
    return torch.randn(shape, generator=draw, device=device).mul_(0.1).to(dtype)


def gradient(shape: Shape, index: int, step: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The gradient of tensor `index` at `step`, N(1, 1).

    The mean is far from zero, so a method that forgets to centralize cannot pass the gate.
    """
    draw = _draw(device, 2 * (index + 100_000 * step))
    return torch.randn(shape, generator=draw, device=device).add_(1.0).to(dtype)


def build(
    spec: ParamList,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    source: list[Tensor] | None = None,
) -> list[Tensor]:
    """Fresh leaf parameters with gradients; values copied from `source` where it is given."""
    made = []
    for index, shape in enumerate(spec.shapes):
        param = _placed(shape, spec.offset, device, dtype)
        param.copy_(initial(shape, index, device, dtype) if source is None else source[index])
        param = param.detach().requires_grad_()
        param.grad = _placed(shape, spec.offset, device, dtype)
        made.append(param)
    return made


def load_gradients(spec: ParamList, lists: list[list[Tensor]], step: int) -> None:
    """Fill the gradients of several copies of one list with the same values."""
    for index, shape in enumerate(spec.shapes):
        first = lists[0][index]
        value = gradient(shape, index, step, first.device, first.dtype)
        for params in lists:
            grad = params[index].grad
            assert grad is not None
            grad.copy_(value)
