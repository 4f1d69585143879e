"""Runs of optimizers whose parameters and states are kept otherwise than by a cast."""

from typing import Any

import pytest
import torch
from kernel_cases import device_of

import fusedcalib
from fusedcalib.layout import storage

BF16, F32 = torch.bfloat16, torch.float32
# Each form of a parameter and of states, and the random bits of both.
STORAGES: dict[str, dict[str, Any]] = {
    "seven": {"master_weights": "split8", "state_dtype": "8bit"},
    "exact": {"master_weights": "split16", "state_dtype": F32},
    "random": {"master_weights": "split8", "state_dtype": "bfloat16_stochastic", "stochastic_rounding": True},
    "six": {"state_dtype": "8bit", "stochastic_rounding": True},
    "copy": {"master_weights": "float32", "state_dtype": {"exp_avg": "8bit", "exp_avg_sq": BF16}},
}


def rows_in_blocks() -> list[torch.Tensor]:
    """Shapes whose rows are multiples of 64."""
    return [torch.randn(8, 128), torch.randn(3, 8, 16), torch.randn(2, 6400)]


def long_rows() -> list[torch.Tensor]:
    """Rows that one program walks, and rows in pieces, where they are added up."""
    return [torch.randn(2, 9001), torch.randn(2, 33000)]


FLAT = 1 << 14  # elements of a vector that is kept in bytes here: of 2^20 the interpreter takes a minute


def flat() -> list[torch.Tensor]:
    """A vector so long that it is kept in bytes, as one row."""
    return [torch.randn(FLAT + 5)]


def rows_with_ends() -> list[torch.Tensor]:
    """Shapes whose rows end within a block; those below 32 columns have fp32 states."""
    return [torch.randn(5, 100), torch.randn(7, 65), torch.randn(2, 9001), torch.randn(3, 27), torch.randn(9)]


def strided() -> list[torch.Tensor]:
    """The gradient, and so the parameter, in another order than codes are."""
    last = torch.randn(4, 5, 7, 7).to(memory_format=torch.channels_last)
    return [torch.randn(6, 8, 5, 3).permute(0, 3, 1, 2), torch.randn(128, 9).t(), last]


def unaligned() -> list[torch.Tensor]:
    """Addresses that are no multiples of 16."""
    return [torch.randn(n * m + 1)[1:].view(n, m) for n, m in ((8, 128), (3, 100))]


ARRANGEMENTS = {f.__name__: f for f in (rows_in_blocks, rows_with_ends, strided, unaligned, flat)}
BY_ROWS = {f.__name__: f for f in (strided, long_rows)}


def moved(t: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor elsewhere, in another dtype, as it lies in memory."""
    base = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device, dtype)
    return base.as_strided(t.shape, t.stride(), t.storage_offset())


def stepped(
    backend: str,
    rule: str,
    arrangement: str,
    options: dict[str, Any],
    dtype: torch.dtype = BF16,
    steps: int = 3,
) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    """An optimizer after some steps, of gradients whose magnitudes fall: scales follow, codes do not."""
    torch.manual_seed(1)
    device = device_of(backend)
    params = [torch.nn.Parameter(moved(t, device, dtype)) for t in {**ARRANGEMENTS, **BY_ROWS}[arrangement]()]
    options = {"lr": 1e-2, "min_8bit_size": 0, "backend": backend, **options}
    optimizer = getattr(fusedcalib, rule)(params, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "FLAT", FLAT)
        for step in range(steps):
            for p in params:
                p.grad = (torch.randn(p.shape) * 10.0 ** (-2 * step)).to(device, dtype)
            optimizer.step()
    return optimizer, params


def kept(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Every tensor that a step writes, by name."""
    found = {}
    for i, p in enumerate(params):
        found[f"parameter {i}"] = p.detach()
        found |= {f"{k} of {i}": t for k, t in optimizer.state[p].items() if isinstance(t, torch.Tensor)}
    return found


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        a, b = (x.cpu().contiguous().reshape(-1).view(torch.uint8) for x in (t, theirs[name]))
        assert t.dtype == theirs[name].dtype, name
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} bytes of {a.numel()} differ"
