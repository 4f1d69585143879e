"""Projection of rows to the last bit: what is short enough is left alone, what is bad stays in its row."""

import pytest
import torch
from kernel_cases import BACKENDS, DTYPES, Dtypes, device_of
from kernel_trial import bits, placed

import fusedcalib
from fusedcalib.reference import project_rows

INF, NAN = float("inf"), float("nan")
LIMIT = 2.0
# Columns of every row class, on a GPU and in the CPU's loop: in a tile, looped over, in pieces.
COLUMNS = (5, 64, 200, 1000, 4096, 8192, 8193, 20000, 32768, 40001)
VIEWS = ("contiguous", "columns of a wider", "transposed")
STORED = {name: DTYPES[name] for name in ("fp32", "bf16", "fp64")}

backends = pytest.mark.parametrize("backend", BACKENDS)


def four(columns: int, value: float) -> torch.Tensor:
    """A row of zeros but for four elements, far apart: its norm is exactly twice the value's size."""
    row = torch.zeros(columns, dtype=torch.float64)
    row[[0, columns // 3, columns // 2, columns - 1]] = value * torch.tensor([1.0, -1.0, -1.0, 1.0]).double()
    return row


def stepped(
    backend: str, rows: torch.Tensor, dtypes: Dtypes, view: str = "contiguous", centralize: bool = False
) -> torch.Tensor:
    """Rows after a step of SGD without a gradient: nothing happens to them but projection."""
    device = device_of(backend)
    p = torch.nn.Parameter(placed(rows, view, dtypes.param, device))
    p.grad = placed(torch.zeros_like(rows), view, dtypes.grad, device)
    options = {"lr": 0.1, "max_row_norm": LIMIT, "centralize": centralize}
    fusedcalib.SGD([p], backend=backend, **options).step()
    return p.detach()


@backends
@pytest.mark.parametrize("dtypes", STORED.values(), ids=STORED)
def test_rows_within_the_limit_keep_their_bits(backend: str, dtypes: Dtypes):
    """At the limit too; a row twice as long is halved exactly."""
    for columns in COLUMNS:
        short = torch.randn(columns, dtype=torch.float64)
        nearly = 0.99 if dtypes.param == torch.bfloat16 else 0.9999  # of the limit, though rounded
        short *= nearly * LIMIT / torch.linalg.vector_norm(short)
        again = 5 if columns < 1024 else 1  # more rows than a tile has
        rows = torch.stack([four(columns, 1), four(columns, 2), short, 0 * short] * again)
        expected = torch.stack([rows[0], rows[0], rows[2], rows[3]] * again).to(dtypes.param)
        for view in (
            VIEWS if columns < 1024 and (dtypes is DTYPES["fp32"] or backend != "numba") else VIEWS[:1]
        ):
            found = stepped(backend, rows, dtypes, view)
            assert torch.equal(bits(found), bits(expected)), f"{view}, {columns} columns"


@backends
@pytest.mark.parametrize("centralize", [False, True])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_row_is_projected_as_by_the_oracle_and_alone(backend: str, bad: float, centralize: bool):
    """A norm of NaN is not above the limit; an infinite one leaves zeros, and NaN where it came from."""
    for columns in COLUMNS:
        rows = torch.stack([four(columns, 0.5), four(columns, 2), -four(columns, 2), four(columns, 2)])
        rows[1, -1], rows[2, columns // 2] = bad, -bad
        expected = project_rows(rows.float(), LIMIT)
        found = stepped(backend, rows, DTYPES["fp32"], centralize=centralize)
        assert torch.equal(bits(found), bits(expected)), f"{columns} columns"
