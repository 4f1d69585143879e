"""What the compiler makes of every rule: bytes, registers, instructions. Needs Triton, not a GPU."""

import re

import pytest
from kernel_cases import INTERPRETED
from kernel_compiled import TARGETS, compiled, compiled_for, sass, spec_of, spilled, spilled_in_loops, traffic
from kernel_kinds import BF16, CLASSES, KINDS, config, slow_unless

import fusedcalib
from fusedcalib.bench.predict.compiled import usage
from fusedcalib.bench.predict.static_costs import occupancy
from fusedcalib.kernels import launch
from fusedcalib.kernels.spec import FLAT, MANY, ROW_CLASSES

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")

# Instructions of a lane in the time in which a byte is moved: 132 SMs x 128 lanes x 1.7 GHz
# at 4.3 TB/s. More of them, and memory waits for arithmetic.
ISSUES_PER_BYTE = 132 * 128 * 1.7e9 / 4.3e12

# No reduction, most registers, two passes and three.
HARD = ("flat", "longest rows, all stages", "loop")
USUAL = ("AdamW plain", "AdamW bf16, fp32 state")
HEAVY = ("Adan plain", "Adam amsgrad", "RMSprop centered momentum")
STEPS = [(k, c) for k in KINDS for c in CLASSES if k in USUAL or c in HARD]
STEPS += [(k, "loop, all stages") for k in HEAVY]
ELSEWHERE = [
    (kind, row_class, target)
    for target in TARGETS
    if target != "sm_90"
    for kind in (*HEAVY, *USUAL)
    for row_class in (*HARD[:2], *([*HARD[2:], "loop, all stages"] if kind in USUAL else []))
]


def says_most(kind: str, row_class: str, target: str = "sm_90") -> bool:
    """Elsewhere one kind of each; of most kinds the class that takes most registers."""
    if target != "sm_90":
        return kind in (HEAVY[0], USUAL[1])
    if kind in USUAL:
        return True
    return row_class not in ("flat", "loop") and kind in (*HEAVY, "SGD plain", "Lion bf16")


def is_compiled_anyway(kind: str, row_class: str) -> bool:
    """Every rule once: the last test of this file compiles the vectors of all."""
    return says_most(kind, row_class) or row_class == "flat"


steps = pytest.mark.parametrize(("kind", "row_class"), slow_unless(says_most, STEPS))


def spills(kind: str, row_class: str, target: str = "sm_90") -> int:
    """Of a row walked three times the compiler may put something of the row aside between two of them."""
    built = compiled(config(kind, row_class), target)
    return (spilled_in_loops if row_class == "loop, all stages" else spilled)(built)


@steps
def test_no_register_is_spilled(kind: str, row_class: str):
    assert spills(kind, row_class) == 0


@steps
def test_bytes_moved(kind: str, row_class: str):
    """All of them by 128-bit accesses; centring adds none, but where a row is walked again."""
    asked = config(kind, row_class)
    built = compiled(asked)
    assert len(built.spec.DTYPES) == KINDS[kind].tensors
    assert (built.bytes_moved("ld"), built.bytes_moved("st")) == traffic(asked)
    assert built.narrow("st") == 0
    # Read otherwise: the tile [3], scalars, the slot's row of the table and the sums of pieces; the
    # compiler repeats some of them rather than keep a register. Once a program, not once an element.
    assert built.narrow("ld") <= 3 + built.spec.COUNT + 2 * built.spec.FIELDS


@steps
def test_instructions_fit_into_the_time_that_memory_takes(kind: str, row_class: str):
    asked = config(kind, row_class)
    built = compiled(asked)
    assert len(sass(built)) / built.elements < ISSUES_PER_BYTE * sum(traffic(asked))


@pytest.mark.parametrize(("kind", "row_class"), slow_unless(is_compiled_anyway, STEPS))
def test_every_operation_is_rounded_once(kind: str, row_class: str):
    """Neither fused nor approximate, as on the CPU; storage to nearest even."""
    built = compiled(config(kind, row_class))
    assert not built.inexact
    if BF16 in KINDS[kind].dtypes:
        assert "cvt.rn.bf16" in " ".join(built.ptx)


@pytest.mark.parametrize(("kind", "row_class", "target"), slow_unless(says_most, ELSEWHERE))
def test_other_gpus(kind: str, row_class: str, target: str):
    asked = config(kind, row_class)
    built = compiled(asked, target)
    assert spills(kind, row_class, target) == 0
    assert (built.bytes_moved("ld"), built.bytes_moved("st")) == traffic(asked)
    assert built.narrow("st") == 0


@pytest.mark.parametrize(("kind", "longest"), [("Adan plain", 4096), ("Adam amsgrad", 8192)])
def test_rows_are_held_in_registers_as_long_as_they_fit(kind: str, longest: int):
    """Six tensors of 8192 columns would be spilled, see HELD in kernels/spec.py; five are not."""
    tensors = KINDS[kind].tensors
    tiles = {n: launch.tile_for(8, n, True, tensors) for n in (longest, longest + 1)}
    assert [tile.reduction for tile in tiles.values()] == ["tile", "loop"]
    spec = spec_of(config(kind, "longest rows, all stages"))
    assert spec.tile == tiles[longest]
    wide = compiled_for(spec.tiled(launch.tile_for(8, 8192, True, 0)))
    assert (spilled(wide) > 0) == (longest < 8192)


def test_a_thread_has_sixteen_elements():
    """Of every class, as long as a slot has few tensors."""
    classes = [FLAT, *(tile[1:4] for tile in ROW_CLASSES)]
    assert {rows * columns / (32 * warps) for rows, columns, warps in classes} == {16}


@pytest.mark.parametrize("row_class", ["flat", "rows of 64", "rows of 1024", "loop", "pieces"])
def test_many_tensors_leave_room_for_two_programs(row_class: str):
    """Sixteen elements a thread of six tensors leave room for one, see MANY in kernels/spec.py."""
    spec = spec_of(config("Adan plain", row_class))
    whole = launch.tile_for(*spec_rows(row_class), row_class != "flat", MANY - 1)
    for tile, programs in ((spec.tile, (2, 3)), (whole, (1,))):
        built = compiled_for(spec.tiled(tile))
        room = occupancy("sm_90", usage(built).registers, tile.warps, built.shared)
        assert room.warps // tile.warps in programs
    assert 2 * spec.tile.rows * spec.tile.columns == whole.rows * whole.columns


def spec_rows(row_class: str) -> tuple[int, int]:
    """Rows and columns of a class's parameter."""
    shape, _ = CLASSES[row_class]
    return (1, *shape) if len(shape) == 1 else (shape[0], shape[1])


ONE_ROW = [(k, c) for k in (*HEAVY, *USUAL, "SGD plain") for c in ("flat", "longest rows, all stages")]


def says_most_of_one_row(kind: str, row_class: str, target: str) -> bool:
    return (kind, row_class) in (ONE_ROW[1], ("AdamW plain", "flat"), ("SGD plain", "flat"))


@pytest.mark.parametrize(
    ("kind", "row_class", "target"),
    slow_unless(says_most_of_one_row, [(*one, target) for target in ("sm_80", "sm_90") for one in ONE_ROW]),
)
def test_scalars_as_arguments_cost_no_more(kind: str, row_class: str, target: str):
    """The form that most launches have: accesses and instructions as with a table or less, room enough."""
    spec = spec_of(config(kind, row_class))
    table, arguments = (compiled_for(spec, target, as_arguments=passed) for passed in (False, True))
    assert spilled(arguments) == 0
    assert len(sass(arguments)) <= len(sass(table))
    for kind_of_access in ("ld", "st"):
        assert arguments.bytes_moved(kind_of_access) == table.bytes_moved(kind_of_access)
        assert arguments.narrow(kind_of_access) <= table.narrow(kind_of_access)
    rooms = [occupancy(target, usage(b).registers, b.built.warps, b.shared).warps for b in (table, arguments)]
    # 32 warps that have asked for 64 bytes a lane keep 64 KB under way; 4.3 TB/s at 700 ns take 23 KB an SM.
    assert rooms[1] >= min(rooms[0], 32)


WITHOUT_ROWS = [
    name
    for name, kind in KINDS.items()
    if len(set(kind.dtypes)) == 1 and not fusedcalib.optimizers()[kind.rule].rule.row_state
]


@pytest.mark.parametrize("kind", WITHOUT_ROWS)
def test_without_centring_no_lane_waits_for_another(kind: str):
    assert not re.search(r"shfl|bar\.|shared", " ".join(compiled(config(kind)).ptx))
