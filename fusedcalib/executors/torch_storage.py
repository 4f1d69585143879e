"""kernels/storage.py in plain torch: how a tensor is kept, and what rules see of it. Not fast."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kernels import storage
from ..kernels.storage import BLOCK, CODED
from ..layout.storage import leading_of, scales_shape
from .source import Function, rebound


def where(condition: Any, x: Any, y: Any) -> Any:
    """x where the condition holds, else y."""
    if isinstance(condition, bool):
        return x if condition else y
    return torch.where(condition, x, y)


# The names that the functions of elements use, but for those of kernels/ops.py.
ELEMENTARY: dict[str, Any] = {
    "bits_of": lambda x: x.view(torch.int32),
    "float_of": lambda bits: bits.view(torch.float32),
    "at_most": lambda x, top: torch.where(x < top, x, top),
    "at_least": lambda x, bottom: torch.where(x > bottom, x, bottom),
    **storage.SINGLES,
    "where": where,
}
ELEMENTARY["magnitude"] = rebound(storage.magnitude, ELEMENTARY)


@cache
def function(name: str) -> Function:
    """A function of elements of kernels/storage.py, of tensors."""
    return rebound(getattr(storage, name), ELEMENTARY)


def as_rows(t: Tensor, leading: int = 1) -> Tensor:
    """A tensor as [rows, columns], its elements in the order of their indices; a vector is one row.

    `leading`: dimensions that a row is an index of.
    """
    return t.flatten(0, leading - 1).flatten(1) if t.ndim > 1 else t.reshape(1, -1)


def _blocks(t: Tensor, leading: int) -> Tensor:
    """[rows, blocks, 64], with zeros where a row ends before its last block."""
    rows = as_rows(t, leading)
    count = -(-rows.shape[1] // BLOCK)
    return pad(rows, (0, -rows.shape[1] % BLOCK)).reshape(rows.shape[0], count, BLOCK)


def _elements(blocks: Tensor, like: Tensor, leading: int) -> Tensor:
    """[rows, blocks, 64] in the shape of another tensor."""
    columns = as_rows(like, leading).shape[1]
    return blocks.flatten(1)[:, :columns].reshape(like.shape)


def coded(x: Tensor, kind: str, leading: int = 1) -> tuple[Tensor, Tensor]:
    """The bytes of fp32 values, like them, and their scales [rows, blocks], or more dimensions of rows."""
    blocks = _blocks(x, leading)
    largest = (blocks.contiguous().view(torch.int32) & 0x7FFFFFFF).amax(dim=2)
    scales = function("scale_of")(largest)
    top = 256.0 if kind == "signed" else 1.0
    inverse = torch.where(scales > 0, torch.full_like(scales, top) / scales, 0.0)  # one rounding
    codes = function(f"{kind}_code")(blocks, inverse[:, :, None])
    return _elements(codes.to(torch.uint8), x, leading), scales.view(scales_shape(x.shape, leading))


def decoded(codes: Tensor, scales: Tensor, kind: str) -> Tensor:
    """What bytes and their scales stand for, in fp32."""
    leading = leading_of(scales)
    levels = function(f"{kind}_level")(_blocks(codes, leading).to(torch.int32))
    return _elements(levels * as_rows(scales, leading)[:, :, None], codes, leading)


def split(x: Tensor, master: str) -> tuple[Tensor, Tensor]:
    """bf16 of fp32 values, and the integers that are left of them."""
    high, low = function("split")(x)
    parameter = high.to(torch.int16).view(torch.bfloat16)
    return parameter, low.to(torch.int16) if master == "split16" else (low >> 8).to(torch.int8)


def joined(parameter: Tensor, low: Tensor, master: str) -> Tensor:
    """The fp32 values that were split, or what lies next to a parameter that was set since."""
    high, low = parameter.view(torch.int16).to(torch.int32), low.to(torch.int32)
    joined_: Tensor = function("joined")(high, low if master == "split16" else low << 8)
    return joined_


def trimmed(x: Tensor, bits: Any = 128) -> Tensor:
    """fp32 values with 24 bits."""
    cut: Tensor = function("trimmed")(x, bits)
    return cut


def decode(tensors: tuple[Tensor, ...], kind: str, compute: torch.dtype) -> Tensor:
    """What rules see of a parameter or state: its tensor, and what it has beside it."""
    if kind in CODED:
        return decoded(tensors[0], tensors[1], kind)
    if kind in ("split16", "split8"):
        return joined(tensors[0], tensors[1], kind)
    return tensors[-1].to(compute)


def encode(tensors: tuple[Tensor, ...], x: Tensor, kind: str, bits: Any = None) -> None:
    """Keeps values in such tensors, rounded to nearest; at random by `bits` where the kind is so.

    bits: int32 words like x, of which the upper half is used.
    """
    parts: tuple[Tensor, ...] = (x, x)
    if kind in CODED:
        parts = coded(x, kind)
    elif kind in ("split16", "split8"):
        parts = split(x, kind)
    elif kind == "stochastic":
        parts = (stochastic(x, (bits >> 16) & 0xFFFF, torch.bfloat16),)
    for target, part in zip(tensors, parts, strict=False):
        target.copy_(part.view(target.shape) if kind in CODED else part)


def stochastic(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """x as one of the two bf16 numbers around it; of other dtypes as it is."""
    if dtype != torch.bfloat16:
        return x
    cut = (x.view(torch.int32) + bits) & -0x10000
    return torch.where(x == x, cut.view(torch.float32), x)
