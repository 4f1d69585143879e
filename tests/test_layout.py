"""Layouts against the definition: element (row, column) is the one that flatten() puts there."""

import math

import numpy as np
import pytest
import torch

from fusedcalib.layout.buckets import TileShape
from fusedcalib.layout.geometry import Geometry, geometry_of, is_dense, overlaps_itself
from fusedcalib.layout.storage import in_bytes
from fusedcalib.layout.tables import _tiles, is_aligned

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
checked = hypothesis.settings(max_examples=150, deadline=None, database=None, derandomize=True)

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=5).map(tuple)


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """A view of this shape with distinct elements in any order, with gaps or none; its storage counts up."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from((1, 1, 1, 2))) for _ in shape]
    extra = [draw(st.sampled_from((0, 0, 0, 1))) for _ in shape]
    whole = [shape[d] * steps[d] + extra[d] for d in order]
    start = draw(st.integers(0, 3))
    memory = torch.arange(start + math.prod(whole), dtype=torch.float32)
    inverse = [order.index(d) for d in range(len(shape))]
    t = memory[start:].view(whole).permute(inverse)
    return t[tuple(slice(0, n * step, step) for n, step in zip(shape, steps, strict=True))]


@st.composite
def slots(draw: st.DrawFn) -> list[torch.Tensor]:
    """Tensors of one shape, some with the same strides, perhaps an expanded one."""
    shape = draw(shapes)
    first = draw(views(shape))
    others = [draw(st.one_of(st.just(first), views(shape))) for _ in range(draw(st.integers(1, 3)))]
    if shape and draw(st.booleans()):
        others.append(torch.arange(math.prod(shape[1:]), dtype=torch.float32).view(shape[1:]).expand(shape))
    return [first, *others]


def offset(layout: Geometry, tensor: int, row: int, column: int) -> int:
    """As kernels/table.py computes it."""
    if not layout.sizes:
        return row * layout.columns + column
    found = row * layout.strides[0][tensor]
    for size, strides in zip(layout.sizes[::-1], layout.strides[:0:-1], strict=True):
        found += column % size * strides[tensor]
        column //= size
    return found


def walked(layout: Geometry, tensor: int, t: torch.Tensor) -> torch.Tensor:
    """The elements in the order of rows and columns, read by address."""
    places = [offset(layout, tensor, r, c) for r in range(layout.rows) for c in range(layout.columns)]
    memory = torch.empty(0).set_(t.untyped_storage())
    return memory[torch.tensor(places, dtype=torch.long) + t.storage_offset()]


@checked
@hypothesis.given(slots(), st.booleans())
def test_tensors_are_paired_by_index(tensors: list[torch.Tensor], rows_matter: bool):
    """Whatever the order of the walk, it meets every index once, and the same one in every tensor."""
    centred = rows_matter and tensors[0].ndim > 1
    layout = geometry_of(tensors, centred)
    assert layout.rows * layout.columns == tensors[0].numel()
    index = torch.arange(tensors[0].numel()).view(tensors[0].shape)
    order = None
    for k, t in enumerate(tensors):
        found = walked(layout, k, t)
        if layout.sizes:  # strided: a column is an index over the inner dimensions, in order
            assert torch.equal(found, t.flatten())
            continue
        where = dict(zip(t.flatten().tolist(), index.flatten().tolist(), strict=True))
        met = [where[value] for value in found.tolist()]
        assert sorted(met) == list(range(t.numel()))
        assert met == (order := order or met)
    if centred:
        assert layout.rows == tensors[0].shape[0]
        first = walked(layout, 0, tensors[0]).view(layout.rows, -1)
        expected = tensors[0].reshape(layout.rows, -1)
        assert torch.equal(first.sort(dim=1)[0], expected.sort(dim=1)[0])


@checked
@hypothesis.given(shapes.flatmap(views))
def test_a_view_of_distinct_elements_does_not_overlap(t: torch.Tensor):
    assert not overlaps_itself(t)
    used = t.flatten().sort()[0]
    assert is_dense(t) == (t.numel() == used[-1] - used[0] + 1)


@checked
@hypothesis.given(shapes, st.lists(st.integers(0, 7), min_size=5, max_size=5))
def test_every_overlap_is_found(shape: tuple[int, ...], strides: list[int]):
    """With strides of any kind; a few of those that do not overlap may be taken for ones that do."""
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=False))
    t = torch.arange(reach).as_strided(shape, strides[: len(shape)])
    if t.unique().numel() < t.numel():
        assert overlaps_itself(t)
        assert not is_dense(t)


@checked
@hypothesis.given(slots(), st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
def test_aligned_means_that_every_row_starts_on_16_bytes(tensors: list[torch.Tensor], dtype: torch.dtype):
    """And that no vector of 16 bytes of the narrowest tensor reaches over the end of a row."""
    mixed = [tensors[0].to(dtype), *tensors[1:]]
    layout = geometry_of(mixed, mixed[0].ndim > 1)
    if is_aligned(mixed, layout):
        assert not layout.sizes
        for t in mixed:
            starts = [t.data_ptr() + r * layout.columns * t.element_size() for r in range(layout.rows)]
            assert not any(start % 16 for start in starts)
            assert layout.columns * t.element_size() % 16 == 0


@pytest.mark.parametrize("rows", [1, 4, 6])
@pytest.mark.parametrize("columns", [1, 4, 6, 8, 12])
def test_alignment_of_plain_matrices(rows: int, columns: int):
    """Known cases, so that "never aligned" would not pass: fp32 rows of 4, bf16 rows of 8 elements."""
    for dtype, vector in ((torch.float32, 4), (torch.bfloat16, 8), (torch.float64, 2)):
        t = torch.zeros(rows, columns, dtype=dtype)
        assert is_aligned([t, t], geometry_of([t, t], True)) == (columns % vector == 0)
        moved = torch.zeros(rows * columns + 1, dtype=dtype)[1:].view(rows, columns)
        assert not is_aligned([t, moved], geometry_of([t, moved], True))


@checked
@hypothesis.given(*[st.integers(1, 40)] * 4)
def test_tiles_cover_every_element_once(rows: int, columns: int, tall: int, wide: int):
    """In order of rows, then columns: the sums of a row's pieces lie side by side."""
    tiles = _tiles(Geometry(rows, columns), TileShape(tall, wide, None))
    assert tiles.dtype == np.int32
    assert tiles.tolist() == sorted(tiles.tolist())
    covered = np.zeros((rows, columns), dtype=int)
    for s, row_block, column_block in tiles:
        assert s == 0
        part = covered[row_block * tall :, column_block * wide :][:tall, :wide]
        assert part.size
        part += 1
    assert (covered == 1).all()


@pytest.mark.parametrize(
    ("columns", "least", "expected"), [(32, 4096, True), (32, 4097, False), (31, 0, False)]
)
def test_matrices_in_bytes(columns: int, least: int, expected: bool):
    """Rows of 32 columns and more, and as many elements as are asked for."""
    assert in_bytes(torch.empty(128, columns, device="meta"), least) == expected


@pytest.mark.parametrize(
    ("missing", "least", "expected"), [(0, 0, True), (1, 0, False), (0, 2**20 + 1, False)]
)
def test_vectors_in_bytes(missing: int, least: int, expected: bool):
    """Those as long as only a library makes of many parameters: 2^20 elements."""
    assert in_bytes(torch.empty(2**20 - missing, device="meta"), least) == expected
