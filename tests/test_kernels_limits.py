"""Tensors beyond 2^31 elements, launches that do not grow, and nothing compiled twice."""

from typing import Any

import pytest
import torch
from cases import prepared
from kernel_cases import BACKENDS, DTYPES, FUSED, GPU, NUMBA, TRITON, Case, device_of
from kernel_trial import Arrangement, Trial, bits, gradient_values, parameter_values, placed

import fusedcalib
from fusedcalib.layout.buckets import GEOMETRY, Bucket

FAR = 2**31 + 2**20  # elements: int32 offsets would have wrapped around
ADAMW = Case("AdamW", {"lr": 0.1, "centralize": False}, DTYPES["bf16 fp32 state"])
BY_ROWS = ADAMW._replace(options={**ADAMW.options, "centralize": "gradient", "max_row_norm": 0.3})


def move_rows(bucket: Bucket) -> None:
    """Makes the slot the last rows of one with more than FAR elements: nothing before them is mapped."""
    table, k = bucket.table[0], len(bucket.key.dtypes)
    rows, columns, tall = table[k], table[k + 1], table[k + 3]
    strides = [columns] * k
    if bucket.key.inner:
        first = k + GEOMETRY + bucket.key.inner
        strides = table[first : first + k]
    blocks = -(-FAR // (min(strides) * tall))
    _shift(bucket, [blocks * tall * stride for stride in strides])
    table[k] = rows + blocks * tall
    bucket.tiles[:, 1] += blocks


def move_columns(bucket: Bucket) -> None:
    """The same with the columns of one long row."""
    table, k = bucket.table[0], len(bucket.key.dtypes)
    columns, wide = table[k + 1], table[k + 4]
    strides = [1] * k
    if bucket.key.inner:
        strides = table[-k:]
        table[k + GEOMETRY] += -(-FAR // wide) * wide
    blocks = -(-FAR // wide)
    _shift(bucket, [blocks * wide * stride for stride in strides])
    table[k + 1] = columns + blocks * wide
    bucket.tiles[:, 2] += blocks


def _shift(bucket: Bucket, elements: list[int]) -> None:
    for i, (dtype, moved) in enumerate(zip(bucket.key.dtypes, elements, strict=True)):
        bucket.table[0, i] -= int(moved) * dtype.itemsize


FAR_AWAY = {
    "flat": (ADAMW, Arrangement((3000,)), move_columns),
    "tile": (BY_ROWS, Arrangement((5, 100)), move_rows),
    "loop": (BY_ROWS, Arrangement((2, 9000)), move_rows),
    "strided rows": (BY_ROWS, Arrangement((5, 96), "columns of a wider"), move_rows),
    "inner dimensions": (BY_ROWS, Arrangement((3, 4, 5, 6), "channels last"), move_rows),
}
# The CPU's loop walks a strided slot row by row: it has no tile that starts at a far column.
FAR_COLUMNS = pytest.param(
    "triton",
    (ADAMW, Arrangement((3000,), "every other column"), move_columns),
    id="triton-strided columns",
    marks=TRITON.marks,
)


@pytest.mark.parametrize(
    ("backend", "far"),
    [
        *(
            pytest.param(*backend.values, far, id=f"{backend.values[0]}-{name}", marks=backend.marks)
            for backend in FUSED
            for name, far in FAR_AWAY.items()
        ),
        FAR_COLUMNS,
    ],
)
def test_offsets_beyond_32_bits(backend: str, far: tuple[Case, Arrangement, Any]):
    """Without 8 GB: a slot's address is moved back as far as its only tiles are moved on."""
    case, arrangement, move = far
    near, distant = (Trial(backend, case, [arrangement]) for _ in range(2))
    for trial in (near, distant):
        torch.manual_seed(1)
        trial.new_gradients()
        with torch.no_grad():
            plan = prepared(trial.optimizer)
            if trial is distant:
                (bucket,) = plan.buckets
                move(bucket)
            plan.step()
    # Where rows do not matter a column is as good as any; where they do the moved rows are whole.
    for mine, expected in zip(_tensors(distant), _tensors(near), strict=True):
        torch.testing.assert_close(bits(mine), bits(expected), rtol=0, atol=0)


def _tensors(trial: Trial) -> list[torch.Tensor]:
    (p,) = trial.params
    return [p.detach(), *(value for key, value in trial.state(p).items() if key != "step")]


@pytest.mark.parametrize("backend", [TRITON])
def test_offsets_of_pieces_beyond_32_bits(backend: str):
    """A row too long for a tile: its three launches, row sums, step and projection, over far rows."""
    far = (BY_ROWS, Arrangement((2, 40001)), move_rows)
    test_offsets_beyond_32_bits(backend, far)


def _free_gib() -> float:
    return torch.cuda.mem_get_info()[0] / 2**30 if GPU else 0.0


@pytest.mark.skipif(_free_gib() < 40, reason="needs a GPU with 40 GiB of free memory")
@pytest.mark.parametrize("shape", [(FAR,), (2**20 + 512, 2048), (3, FAR // 3)], ids=str)
def test_a_tensor_of_more_than_two_to_the_31_elements(shape: tuple[int, ...]):
    """The real size, with numbers whose sums and means are exact: rows of 1.5 and -0.5 in turn."""
    p = torch.nn.Parameter(torch.zeros(shape, device="cuda"))
    p.grad = torch.full(shape, 1.5, device="cuda")
    p.grad[..., ::2] = -0.5
    fusedcalib.SGD([p], lr=0.25, momentum=0.5, centralize=True, backend="triton").step()
    mean = 0.5 if len(shape) > 1 else 0.0
    parts = (t.view(-1).split(2**28) for t in (p.detach(), p.grad))
    for stepped, gradient in zip(*parts, strict=True):
        assert torch.equal(stepped, 0.25 * (mean - gradient))


def many(backend: str, shapes: list[tuple[int, ...]], **options: Any):
    """An optimizer over the shapes, six tensors to a group, no two groups with the same options.

    What is a number is off in some groups: that does not divide a launch.
    """
    device = device_of(backend)
    params = [torch.nn.Parameter(parameter_values(s).float().to(device)) for s in shapes]
    for p in params:
        p.grad = gradient_values(p.shape).float().to(device)
    groups = [
        {"params": params[i : i + 6], "lr": 0.1 / (1 + i), "weight_decay": 0.01 * (i // 6 % 3)}
        for i in range(0, len(params), 6)
    ]
    for group in groups[1::3]:
        group.update(l1=0.0, max_row_norm=None)
    return fusedcalib.AdamW(groups, backend=backend, **options)


def launches(optimizer: torch.optim.Optimizer) -> int:
    """Takes a step."""
    with torch.no_grad():
        return prepared(optimizer).step()


# Shapes, and the launches they take: one for each row class that occurs (vectors are one), on the
# CPU one loop with row means or norms and one without; plain torch launches nothing of ours.
CENTRED, PROJECTED = {"centralize": True}, {"max_row_norm": 1.0}
BOTH = CENTRED | PROJECTED
LAUNCHES = {
    "vectors": ([(8,), (64,)], BOTH, {"eager": 0, "numba": 1, "triton": 1}),
    "no rows": ([(8,), (8, 16), (4, 300)], {"l1": 0.1}, {"eager": 0, "numba": 1, "triton": 1}),
    "one class": ([(8, 16), (4, 64), (3, 4, 4)], CENTRED, {"eager": 0, "numba": 1, "triton": 1}),
    "three classes": ([(8,), (8, 16), (4, 200)], CENTRED, {"eager": 0, "numba": 2, "triton": 3}),
    "projected": ([(8,), (8, 16), (4, 200)], PROJECTED, {"eager": 0, "numba": 2, "triton": 3}),
    "rows of one too": ([(8,), (8, 16), (9, 1)], BOTH, {"eager": 0, "numba": 3, "triton": 3}),
    "unaligned too": ([(8, 16), (4, 63)], CENTRED, {"eager": 0, "numba": 2, "triton": 2}),
}


@pytest.mark.parametrize(
    ("name", "tensors"), [*((name, n) for name in LAUNCHES for n in (6, 48)), ("three classes", 300)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_launches_do_not_grow_with_tensors_or_groups(backend: str, name: str, tensors: int):
    shapes, options, expected = LAUNCHES[name]
    optimizer = many(backend, [shapes[i % len(shapes)] for i in range(tensors)], **options)
    assert launches(optimizer) == expected[backend]


@pytest.mark.parametrize(("options", "expected"), [({}, 1), (CENTRED, 2), (PROJECTED, 2), (BOTH, 3)], ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_rows_in_pieces_take_a_launch_for_each_sum_on_a_gpu(
    backend: str, options: dict[str, Any], expected: int
):
    taken = launches(many(backend, [(1, 32772)] * 7, **options))
    assert taken == {"numba": 1, "triton": expected}[backend]


def compiled(backend: str) -> int:
    """How many kernels have been compiled in this process so far."""
    if backend == "numba":
        from fusedcalib.executors.numba import run as cpu

        return cpu.kernel_for.cache_info().misses
    from fusedcalib.kernels.step import step_kernel

    return sum(len(cache[0]) for cache in step_kernel.device_caches.values())


CHANGES = {"lr": 0.0, "betas": (0.5, 1 - 2**-20), "weight_decay": 1.0, "eps": 1.0, "eps_inside_sqrt": True}
CHANGES |= {"l1": 0.5, "max_row_norm": 7.0}


# Interpreted kernels are not compiled.
@pytest.mark.parametrize("backend", [NUMBA, *([TRITON] if GPU else [])])
def test_nothing_is_compiled_again(backend: str):
    """Not when a hyperparameter, the step count, the gradients or the list of tensors changes."""
    shapes = [(8,), (8, 16), (4, 200)]
    options = {**BOTH, "l1": 0.1}
    optimizer = many(backend, shapes, **options)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    optimizer.step()
    before = compiled(backend)
    for key, value in CHANGES.items():
        optimizer.param_groups[0][key] = value
        optimizer.step()
    for p in optimizer.param_groups[0]["params"]:
        p.grad = placed(p.grad, "contiguous", torch.float32, device_of(backend))
    optimizer.step()
    many(backend, shapes * 3, lr=1.0, **options).step()
    assert compiled(backend) == before
