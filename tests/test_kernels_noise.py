"""The noise of the kernels and loops against that of NumPy, on shapes hard to count through."""

import numpy as np
import pytest
import torch
from kernel_cases import FUSED, TRITON, device_of
from kernel_run import FULL_NAN
from kernel_trial import placed

import fusedcalib
from fusedcalib import GradientNoise, WeightNoise, noise
from fusedcalib.kernels.language import jit, tl
from fusedcalib.kernels.philox import Words, normal_tile, words_at
from fusedcalib.kernels.storage import stochastic

WORDS = (7, 11, 13)
EPS = torch.finfo(torch.float32).eps
# How far normals of two executors lie apart: six roundings of the radius, or a root that is 2 units off,
# of numbers up to 6.7.
APART = 2e-6


@jit
def words_kernel(first, out, C: tl.constexpr):
    index = tl.load(first) + tl.arange(0, C)
    step = tl.full([], 5, tl.uint32)
    keys = tl.full([], 7, tl.uint32), tl.full([], 11, tl.uint32), tl.full([], 13, tl.uint32)
    a, b, c, d = words_at(index, Words(keys[0], step, keys[1], keys[2]))
    lane = tl.arange(0, C)
    tl.store(out + lane, a.to(tl.int32, bitcast=True))
    tl.store(out + C + lane, b.to(tl.int32, bitcast=True))
    tl.store(out + 2 * C + lane, c.to(tl.int32, bitcast=True))
    tl.store(out + 3 * C + lane, d.to(tl.int32, bitcast=True))


@jit
def normals_kernel(first, out, R: tl.constexpr, C: tl.constexpr, QUADS: tl.constexpr):
    """Normals [R, C]: rows from the first of three numbers, columns from the second, of rows of the third."""
    r, c = tl.arange(0, R), tl.arange(0, C)
    keys = tl.full([], 7, tl.uint32), tl.full([], 11, tl.uint32), tl.full([], 13, tl.uint32)
    step, sigma = tl.full([], 5, tl.uint32), tl.full([], 1, tl.float32)
    row, start, columns = tl.load(first), tl.load(first + 1), tl.load(first + 2)
    words = Words(keys[0], step, keys[1], keys[2])
    z = normal_tile(((row + r) * columns + start)[:, None], sigma, words, R, C, QUADS)
    tl.store(out + r[:, None] * C + c[None, :], z)


@jit
def rounded_kernel(x, out):
    bits = tl.full([], 0xFFFF, tl.uint32)
    tl.store(out, stochastic(tl.load(x), bits, tl.bfloat16))


@pytest.mark.parametrize("backend", [TRITON])
def test_a_nan_is_not_rounded_to_a_number(backend: str):
    """Not that of GPUs either, which the largest random bits would carry over to minus zero."""
    x = torch.tensor([FULL_NAN], device=device_of(backend))
    out = torch.zeros_like(x)
    rounded_kernel[(1,)](x, out)
    assert x.view(torch.int32).item() == 0x7FFFFFFF
    assert out.isnan().all()


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("first", [0, 2**32 - 3, 2**40 + 1])
def test_words_are_the_same(backend: str, first: int):
    device, count = device_of(backend), 64
    out = torch.empty(4, count, dtype=torch.int32, device=device)
    words_kernel[(1,)](torch.tensor([first], device=device), out, C=count)
    index = np.arange(first, first + count, dtype=np.uint64)
    counter = (index & np.uint64(0xFFFFFFFF), index >> np.uint64(32), WORDS[0], 5)
    expected = np.stack(noise.philox(counter, WORDS[1:])).astype(np.uint32)
    np.testing.assert_array_equal(out.cpu().numpy().view(np.uint32), expected)


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("row", [0, 2**31 + 1])
@pytest.mark.parametrize("columns", [64, 65, 66, 67, 4097])
def test_tiles_of_normals_are_cut_from_the_same_sequence(backend: str, row: int, columns: int):
    """Wherever a row begins; indices pass 2^32, and a counter's lower word its end."""
    device, rows, start, width = device_of(backend), 4, 64, 64
    out = torch.empty(rows, width, device=device)
    first = torch.tensor([row, start, columns], device=device)
    normals_kernel[(1,)](first, out, R=rows, C=width, QUADS=columns % 4 == 0)
    begins = [(row + i) * columns + start for i in range(rows)]
    expected = np.stack([noise.normals(begin, width, 5, WORDS) for begin in begins])
    np.testing.assert_allclose(out.cpu().numpy(), expected, rtol=0, atol=APART)


# Rows of each class, odd and even, that begin anywhere in a counter; vectors, a scalar, strides.
SHAPES = ((), (37,), (4099,), (5, 1), (7, 13), (70, 5), (3, 255), (3, 64), (6, 1021), (3, 2, 3, 3))
SHAPES += ((1, 4095), (1, 8191), (1, 40001))
PLACED = [(shape, "contiguous") for shape in SHAPES]
PLACED += [((6, 10), "transposed"), ((3, 1001), "transposed"), ((33,), "every other column")]
PLACED += [((6, 10), "every other row"), ((6, 12), "unaligned"), ((4, 6, 3, 3), "channels last")]


# Loops with noise take five seconds to compile for each number of inner dimensions: once for all of those.
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    ("kind", "centralize"), [(GradientNoise(1.0), True), (WeightNoise(1.0), False)], ids=str
)
def test_steps_agree(backend: str, kind: GradientNoise | WeightNoise, centralize: bool):
    """From rest and without a gradient only the noise is left: parameters are sums of it, below 16."""
    steps = 2
    where = PLACED[: len(SHAPES)] if centralize and backend == "numba" else PLACED
    found = stepped(backend, kind, centralize, steps, where)
    # A row mean is off by what its terms are and, of up to 32 additions in a row, half a unit each.
    of_mean = APART + 32 * EPS / 2 if centralize and isinstance(kind, GradientNoise) else 0.0
    limit = steps * (APART + of_mean + 8 * EPS)
    expected = stepped("eager", kind, centralize, steps, where)
    for (shape, view), p, q in zip(where, found, expected, strict=True):
        error = (p - q).abs().max().item()
        assert error <= limit, f"{shape} {view}: off by {error}"
        assert q.numel() < 64 or q.std() > 0.5


def stepped(
    backend: str,
    kind: GradientNoise | WeightNoise,
    centralize: bool,
    steps: int,
    where: list[tuple[tuple[int, ...], str]],
) -> list[torch.Tensor]:
    """Parameters after some steps of SGD whose gradients are zero and lie in memory in one piece."""
    device = device_of(backend)
    zeros = [placed(torch.zeros(shape), view, torch.float32, device) for shape, view in where]
    params = [torch.nn.Parameter(z) for z in zeros]
    for p in params:
        p.grad = torch.zeros(p.shape, device=device)
    options = {"noise": kind, "seed": 3, "centralize": centralize, "backend": backend}
    optimizer = fusedcalib.SGD(params, lr=1.0, **options)
    for _ in range(steps):
        optimizer.step()
    return [p.detach().cpu() for p in params]
