"""Every rule, stage, storage and shape, on every executor, against the oracle in float64."""

import pytest
from kernel_cases import ALL, BACKENDS, COVERING, LOOPS, TRITON, Case, cases, matrix
from kernel_trial import Arrangement, Trial

SMALL = [
    Arrangement(shape)
    for shape in (
        *((), (1,), (0, 3), (3, 0), (37,), (1, 5), (3, 4, 5), (8, 3, 3, 3), (16, 1, 3, 3)),
        *((7, 13), (4, 64), (130, 8), (5, 300), (2, 1024), (2, 1030)),
    )
]

# Both sides of every edge between tiles and row classes, on a GPU and in the CPU's loop; beyond
# 32768 columns the rows come in pieces. Two rows do not fill a tile; more of them than it holds do.
# A row of one element has a norm, but no mean to remove.
EDGES = [
    Arrangement((rows, columns))
    for rows, columns in (
        *((2, edge + d) for edge in (64, 256, 1024, 4096, 8192) for d in (-1, 0, 1)),
        *((5, 1), (65, 64), (17, 200), (3, 20001), (2, 32768), (2, 40001), (1, 40004)),
    )
] + [Arrangement((n,)) for n in (4095, 4096, 4097, 16385)]

HW, DHW = "channels last", "channels last 3d"
STRIDED = [
    Arrangement((6, 10), "transposed"),
    Arrangement((6, 10), "contiguous", "transposed"),
    Arrangement((70, 10), "transposed", "transposed"),
    Arrangement((2, 300), "transposed"),
    Arrangement((4, 6, 3, 3), HW, HW),
    Arrangement((4, 6, 3, 3), HW),
    Arrangement((4, 6, 3, 3), "contiguous", HW),
    Arrangement((2, 3, 2, 2, 4), DHW),
    Arrangement((2, 3, 4, 2, 5), "permuted"),
    Arrangement((2, 3, 4, 2, 5), "contiguous", "permuted"),
    Arrangement((6, 10), "contiguous", "one row expanded"),
    Arrangement((9,), "contiguous", "one row expanded"),
    Arrangement((6, 10), "every other column"),
    Arrangement((6, 10), "every other column", "every other column", "every other column"),
    Arrangement((6, 10), "every other row"),
    Arrangement((6, 10), "columns of a wider", "transposed"),
    Arrangement((3, 1100), "columns of a wider"),
    Arrangement((33,), "every other column"),
    Arrangement((5000,), "every other column"),
    Arrangement((6, 12), "unaligned"),
    Arrangement((6, 12), "contiguous", "unaligned"),
    Arrangement((6, 12), "contiguous", "contiguous", "unaligned"),
    Arrangement((6, 12), "contiguous", "contiguous", "transposed"),
    Arrangement((6, 12), "transposed", "unaligned", "columns of a wider"),
    Arrangement((5000,), "unaligned", "contiguous"),
]


# Rows projected, centred, both, neither; three to six tensors of a slot; two dtypes in one.
FEW = cases(
    {"rule": "SGD", "variant": 1, "max_row_norm": 0.3, "l1": 0.1},
    {"rule": "AdamW", "centralize": "gradient", "max_row_norm": 0.3, "dtypes": "bf16 fp32 state"},
    {"rule": "RMSprop", "variant": 3, "centralize": "update", "weight_decay": 0.2},
    {"rule": "Adan", "centralize": "update", "max_row_norm": 0.3, "l1": 0.1},
    {"rule": "Adam", "dtypes": "fp64"},
)
MORE = FEW | cases(
    {"rule": "Adam", "variant": 1, "weight_decay": 0.2, "centralize": "gradient"},
    {"rule": "Lion", "max_row_norm": 0.3, "dtypes": "fp16"},
    {"rule": "ADOPT", "weight_decay": 0.2, "centralize": "gradient", "max_row_norm": 0.3},
)
TWO = dict([*FEW.items()][:2])


@pytest.mark.parametrize(("backend", "case"), matrix(ALL, LOOPS, COVERING))
def test_every_recipe_follows_its_oracle(backend: str, case: Case):
    """Where a loop knows of rows, vectors have another one: FEW have both, at their edges."""
    by_rows = case.options["centralize"] or case.options["max_row_norm"]
    only_rows = backend == "numba" and by_rows
    Trial(backend, case, [a for a in SMALL if len(a.shape) > 1 or not only_rows]).step(3)


# Interpreted a rule takes ten seconds and more: the two of which most rows are held, and fewest.
INTERPRETED_EDGES = {name: case for name, case in FEW.items() if case.rule in ("AdamW", "Adan")}
REST = {name: case for name, case in FEW.items() if name not in INTERPRETED_EDGES}
EDGE_CASES = [
    *matrix(FEW, FEW, INTERPRETED_EDGES),
    *(
        pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
        for case in matrix({}, {}, REST)
    ),
]


@pytest.mark.parametrize(("backend", "case"), EDGE_CASES)
def test_tile_edges(backend: str, case: Case):
    Trial(backend, case, EDGES).step(2)


@pytest.mark.parametrize(("backend", "case"), matrix(MORE, TWO, MORE))
def test_arrangements_in_memory(backend: str, case: Case):
    """Tensors are paired by index, whatever their strides; nothing around a view is written."""
    Trial(backend, case, STRIDED).step(3)


@pytest.mark.parametrize("rule", ["Adam", "Adamax"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_outside_of_a_row_has_no_part_in_it(backend: str, rule: str):
    """There p, g and state are 0; without eps the update of that is 0 / 0, in no mean and no norm."""
    shapes = [*SMALL, *(Arrangement((2, n)) for n in (8193, 32769))]
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 0.0, "centralize": "update", "max_row_norm": 0.3}
    Trial(backend, Case(rule, options), shapes).step(2)


@pytest.mark.parametrize("backend", [TRITON])
def test_a_row_of_more_pieces_than_are_added_up_at_a_time(backend: str, monkeypatch: pytest.MonkeyPatch):
    """130 of them; with the tiles that there are it would have half a million elements and more."""
    monkeypatch.setattr("fusedcalib.kernels.spec.ROW_CLASSES", ())
    monkeypatch.setattr("fusedcalib.kernels.spec.FLAT", (1, 64, 4))
    (case,) = cases({"rule": "SGD", "centralize": "gradient", "max_row_norm": 0.3}).values()
    Trial(backend, case, [Arrangement((2, 64 * 129 + 4))]).step(2)
