"""The parameter lists that are measured: shapes as data, so every run times the same work.

Linear weights are `(out, in)` and convolution weights `(out, in, height, width)`, as PyTorch keeps
them: the first axis counts rows, and a row is what gradient centralization takes the mean of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import architectures
from .architectures import Param, Shape


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


def list_of(name: str, params: Iterable[Param]) -> ParamList:
    """The parameters of a model as such a list."""
    return ParamList(name, tuple(param.shape for param in params))


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


LLAMA_LAYER = tuple(architectures.LLAMAS["llama3-8b"].layer())
SMALL_SET: tuple[Shape, ...] = ((64,), (128, 128), (128,), (64, 64, 3, 3), (256,))

LISTS = {
    one.name: one
    for one in (
        list_of("gpt2-124m", architectures.gpt2(*architectures.GPT2)),
        list_of("gpt2-small-cpu", architectures.gpt2(4, 512, 24576, 1024)),
        list_of("llama3-8b-layer-x1", LLAMA_LAYER),
        list_of("llama3-8b-layer-x4", LLAMA_LAYER * 4),
        ParamList("resnet50", tuple(resnet50())),
        ParamList("vit-b", tuple(vit_b())),
        ParamList("small-1000", SMALL_SET * 200),
        ParamList("1000x1024", ((1024,),) * 1000),
        ParamList("10000x64", ((64,),) * 10_000),
        ParamList("tiny-1000", ((8,),) * 1000),
        ParamList("long-rows-128k", ((512, 131_072),)),
        ParamList("long-rows-4m", ((16, 4 * 2**20),)),
        ParamList("odd-columns", ((4099, 2047),)),
        ParamList("even-columns", ((4099, 2048),)),
        ParamList("depthwise", ((512, 1, 3, 3),)),
        ParamList("unaligned", ((4096, 2048),) * 4, offset=1),
        ParamList("aligned", ((4096, 2048),) * 4),
        ParamList("groups-200", ((128, 128),) * 200, group_each=True),
        # 100M parameters in ever smaller pieces, every row of the same length.
        ParamList("split-10", ((10_000, 1000),) * 10),
        ParamList("split-1000", ((100, 1000),) * 1000),
        ParamList("split-10000", ((10, 1000),) * 10_000),
    )
}


def get(name: str) -> ParamList:
    """The list of that name; `single-2^20` is one tensor of 2^20 elements, any exponent.

    A single tensor is a matrix with rows of 1024, so that there is something to centralize.
    """
    if name in LISTS:
        return LISTS[name]
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
