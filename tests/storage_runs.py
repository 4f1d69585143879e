"""Training runs whose states and weights are kept in bytes, and what is kept of them, by the reference."""

import io
from collections.abc import Iterable
from typing import Any

import torch
from cases import parameters
from torch import Tensor

import fusedcalib
from fusedcalib.reference.storage import decode_nonnegative, decode_signed, encode_nonnegative, encode_signed
from fusedcalib.reference.weights import join

# Rows of blocks and a part of one, a vector, too small for bytes, a convolution, nothing but whole blocks.
SHAPES = ((20, 100), (9,), (3, 40), (), (8, 3, 5, 5), (4, 128))
LEAST = {"min_8bit_size": 256}
BYTES = {"state_dtype": "8bit", **LEAST}
KEPT: dict[str, dict[str, Any]] = {
    "8bit": BYTES,
    "split16": {"master_weights": "split16", "state_dtype": "float32"},
    "split8": {"master_weights": "split8"},
    "split8, 8bit": {"master_weights": "split8", **BYTES},
    "split8 at random, 8bit": {"master_weights": "split8", "stochastic_rounding": True, **BYTES},
    "float32, 8bit": {"master_weights": "float32", **BYTES},
    "bfloat16_stochastic": {"state_dtype": "bfloat16_stochastic"},
    "of each": {"state_dtype": {"exp_avg": "8bit", "exp_avg_sq": "bfloat16"}, **LEAST},
}
KINDS = {"exp_avg": (encode_signed, decode_signed), "exp_avg_sq": (encode_nonnegative, decode_nonnegative)}


def weights(dtype: torch.dtype = torch.bfloat16, shapes: Iterable[tuple[int, ...]] = SHAPES) -> Any:
    return parameters(shapes, dtype, "cpu")


def adamw(params: Any, **options: Any) -> fusedcalib.AdamW:
    options = {"lr": 0.01, "backend": "eager", "weight_decay": 0.1, **options}
    return fusedcalib.AdamW(params, **options)


def step(optimizer: torch.optim.Optimizer, *numbers: int) -> None:
    """Steps whose gradients depend on their number only; some elements have next to none."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for group in optimizer.param_groups:
            for p in group["params"]:
                wide = (
                    torch.randn(p.shape, generator=generator)
                    * torch.randn(p.shape, generator=generator).exp()
                )
                p.grad = wide.to(p.dtype)
        optimizer.step()


def through_a_file(value: Any) -> Any:
    """As `torch.load` reads it by default: plain types only."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def state_value(entry: dict[str, Any], name: str) -> Tensor:
    """A state of AdamW in fp32, whatever it is kept in."""
    if name in entry:
        return entry[name].float()
    return KINDS[name][1](entry[f"{name}_codes"], entry[f"{name}_scales"])


def weight_value(p: Tensor, entry: dict[str, Any]) -> Tensor:
    """A parameter in fp32 with what it has beside it."""
    if "master_param" in entry:
        return entry["master_param"].clone()
    if "param_remainder" not in entry:
        return p.detach().float()
    remainder = entry["param_remainder"]
    bits = 16 if remainder.ndim > p.ndim else 8
    kept = remainder.clone().view(torch.int16 if bits == 16 else torch.int8)
    return join(p.detach(), kept.view(p.shape), bits)
