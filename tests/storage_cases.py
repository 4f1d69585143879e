"""Bits of fp32 numbers, and the two codes of compressed state, as the tests of the reference need them."""

import torch
from torch import Tensor

from fusedcalib.reference.storage import decode_nonnegative, decode_signed, encode_nonnegative, encode_signed

CODES = {"signed": (encode_signed, decode_signed), "nonnegative": (encode_nonnegative, decode_nonnegative)}


def of_bits(bits: Tensor) -> Tensor:
    """Fp32 numbers of int64 bits."""
    return (bits - (bits >= 2**31) * 2**32).to(torch.int32).view(torch.float32)


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.int32).long() & 0xFFFFFFFF


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits_of(a), bits_of(b))


def fp32(start: int, stop: int, step: int) -> Tensor:
    """Fp32 numbers of the bits in a range."""
    return of_bits(torch.arange(start, stop, step))


def roundtrip(kind: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    encode, decode = CODES[kind]
    codes, scales = encode(x)
    return codes, scales, decode(codes, scales)


def largest_of(x: Tensor) -> Tensor:
    """The largest magnitude of each element's block."""
    blocks = torch.nn.functional.pad(x.abs(), (0, -x.shape[1] % 64)).unflatten(1, (-1, 64))
    return blocks.amax(2, keepdim=True).expand_as(blocks).flatten(1)[:, : x.shape[1]].double()
