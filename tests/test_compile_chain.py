"""What the compiler makes of the whole chain: norm, clip, skip, centring, noise, rounding, average."""

from typing import Any

import pytest
from kernel_cases import INTERPRETED
from kernel_compiled import (
    TARGETS,
    compiled,
    compiled_control,
    compiled_for,
    sass,
    spec_of,
    spilled,
    spilled_in_loops,
    traffic,
)
from kernel_kinds import CLASSES, KINDS, config, slow_unless

import fusedcalib
from fusedcalib import GradientNoise
from fusedcalib.bench.predict.compiled import compiled_norm, usage
from fusedcalib.kernels.stages import Flags

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")

CHAIN: dict[str, Any] = {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9, "weight_decay": 0.1}
CHAIN |= {"noise": GradientNoise(0.1)}
MIXED = "AdamW bf16, fp32 state"
HELD = ("flat", "rows of 64", "rows of 1024", "longest rows", "pieces")
EVERYWHERE = [
    (kind, row_class, "sm_90") for kind in ("AdamW plain", MIXED, "Adan plain") for row_class in CLASSES
]
EVERYWHERE += [(MIXED, c, t) for c in ("flat", *HELD[3:], "loop") for t in TARGETS if t != "sm_90"]
# Instructions of a lane in the time in which a byte is moved, as in test_compile.py.
ISSUES_PER_BYTE = 132 * 128 * 1.7e9 / 4.3e12


@pytest.mark.parametrize(
    "row_class",
    [c if c in ("flat", "longest rows") else pytest.param(c, marks=pytest.mark.slow) for c in HELD],
)
def test_the_chain_moves_40_bytes(row_class: str):
    """AdamW in fp32 and its average: 28 + 8, and 4 for the norm; all by 128-bit accesses."""
    built = compiled(config("AdamW plain", row_class, **CHAIN))
    norm = compiled_control("AdamW", config=config("AdamW plain", row_class, **CHAIN))
    assert (built.bytes_moved("ld"), built.bytes_moved("st")) == (20, 16)
    assert norm.bytes_moved("ld") == 4
    assert norm.bytes_moved("st") == 0
    assert built.narrow("st") == 0


def says_most(kind: str, row_class: str, target: str) -> bool:
    """Most work in each kind of class; most states, and other GPUs, where rows are longest."""
    if target != "sm_90":
        return row_class == "longest rows, all stages"
    if kind == MIXED:
        return row_class in ("flat", "rows of 1024", "longest rows, all stages", "loop", "pieces")
    return kind == "Adan plain" and row_class in ("longest rows, all stages", "loop")


@pytest.mark.parametrize(("kind", "row_class", "target"), slow_unless(says_most, EVERYWHERE))
def test_the_chain_spills_no_register(kind: str, row_class: str, target: str):
    """With random rounding where that is done; in the time that memory takes."""
    asked = config(kind, row_class, **CHAIN, stochastic_rounding=kind == MIXED)
    built = compiled(asked, target)
    if row_class != "loop, all stages" or target != "sm_90":  # see test_compile.py
        assert spilled(built) == 0
    if target == "sm_90":
        assert (built.bytes_moved("ld"), built.bytes_moved("st")) == traffic(asked)
        if built.spec.REDUCTION != "loop":  # there the noise is made twice
            assert len(sass(built)) / built.elements < ISSUES_PER_BYTE * sum(traffic(asked))


@pytest.mark.parametrize(
    ("rule", "target"),
    slow_unless(
        lambda rule, target: (rule, target) in (("NAdam", "sm_90"), ("NAdam", "gfx942"), ("AdamW", "sm_90")),
        [(r, t) for r in fusedcalib.optimizers() for t in TARGETS if t == "sm_90" or r in ("NAdam", "RAdam")],
    ),
)
def test_scalars_are_computed_in_registers(rule: str, target: str):
    """In fp64. By one program of its own; by the last that measures, whose loop does not spill."""
    for row_class in (None, "longest rows"):
        built = compiled_control(rule, target, config("AdamW plain", row_class) if row_class else None)
        if row_class and target != "gfx942":  # many programs at once; the first loop reads gradients
            assert usage(built).registers <= 64
            assert spilled_in_loops(built, slice(1)) == 0
        else:
            assert spilled(built) == 0
        if target != "gfx942":
            assert not [name for name in built.ptx if "approx" in name and ".f32" in name]


NORMS = [
    (kind, row_class, target)
    for target in TARGETS
    if target != "gfx942"
    for kind in ("AdamW plain", "AdamW bf16")
    for row_class in ("flat", "rows of 64", "rows of 1024", "loop")
]


@pytest.mark.parametrize(
    ("kind", "row_class", "target"),
    slow_unless(
        lambda kind, row_class, target: (
            row_class == "rows of 1024" or (target == "sm_90" and kind == "AdamW plain")
        ),
        NORMS,
    ),
)
def test_the_norm_asks_for_many_bytes_before_it_waits(kind: str, row_class: str, target: str):
    """128 a thread by 128-bit accesses; then a conversion and a fused multiply-add of each, in fp64.

    For sm_80 the compiler saves registers: two to seven of the eight come before the first conversion.
    """
    built = compiled_norm(spec_of(config(kind, row_class)), None, target)
    size = KINDS[kind].dtypes[1].itemsize
    assert built.accesses("ld")[16] == 8
    assert built.elements * size == 128
    names = sass(built)
    loads = [i for i, name in enumerate(names) if name.startswith("LDG.E.128")]
    waits = [i for i, name in enumerate(names) if name.startswith("F2F.F64")]
    assert len(loads) == 8
    assert len(waits) == built.elements
    assert sum(load < waits[0] for load in loads) >= (2 if target == "sm_80" else 6)
    assert sum(name == "DFMA" for name in names) == built.elements
    assert sum(name == "DMUL" for name in names) == 0
    assert spilled(built) == 0


def test_the_last_program_sees_what_the_others_wrote():
    """Its count is taken with acquire and release, after a barrier."""
    built = compiled_control("AdamW", config=config("AdamW plain"))
    assert built.ptx["atom.global.gpu.acq_rel.add.u32"] == 1
    text = built.asm["ptx"]
    assert text.index("bar.sync") < text.index("atom.global") < text.index("ld.global.cg")


OPTIONS = {
    "scaled": {"max_grad_norm": 1.0},
    "skips": {"skip_nonfinite": True},
    "ema": {"ema_decay": 0.9},
    "rounding": {"stochastic_rounding": True},
}


@pytest.mark.parametrize(
    ("kind", "flag"), [*(("SGD bf16", flag) for flag in OPTIONS), ("AdamW plain", "rounding")]
)
def test_what_is_off_leaves_no_instruction(kind: str, flag: str):
    """Off is the very kernel that knows nothing of it; on is another one."""
    spec, on = spec_of(config(kind)), spec_of(config(kind, **OPTIONS[flag]))
    default = Flags._field_defaults[flag]
    assert getattr(spec.FLAGS, flag) == default
    assert getattr(on.FLAGS, flag) != default
    if kind == "AdamW plain" and flag == "rounding":  # fp32 is not rounded
        assert sass(compiled_for(on._replace(QUADS=False))) == sass(compiled_for(spec))
        return
    assert sass(compiled_for(on)) != sass(compiled_for(spec))


def test_a_factor_is_one_multiplication():
    without, scaled = (compiled(config("AdamW plain", **o)) for o in ({}, OPTIONS["scaled"]))
    added = scaled.ptx - without.ptx
    assert {name: n for name, n in added.items() if name.endswith(".f32")} == {"mul.rn.f32": scaled.elements}


def test_random_rounding_costs_few_instructions():
    """Words of one counter for four elements; an addition, a mask and a choice for NaN each."""
    without, rounded = (compiled(config("SGD bf16", **o)) for o in ({}, OPTIONS["rounding"]))
    assert len(sass(rounded)) - len(sass(without)) <= 25 * rounded.elements
    assert spilled(rounded) == 0
