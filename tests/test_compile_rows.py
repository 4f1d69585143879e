"""What the compiler makes of rows that are walked twice, that ranks share, and of rows with factors."""

import re
from typing import Any

import pytest
from kernel_cases import INTERPRETED
from kernel_compiled import TARGETS, compiled, compiled_control, spec_of, spilled
from kernel_kinds import Config

from fusedcalib import GradientNoise
from fusedcalib.kernels import launch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")

CENTRED: dict[str, Any] = {"centralize": True}
CHAIN = {**CENTRED, "max_row_norm": 1.0, "noise": GradientNoise(0.1), "ema_decay": 0.9, "weight_decay": 0.1}


def rows(slicing: str, columns: int, options: dict[str, Any]) -> Config:
    return Config("AdamW", (8, columns), options=(*options.items(),), slicing=slicing)


def hinted(built) -> dict[str, int]:
    """How many accesses tell the caches when to let go: "ld evict_first" and so on, all of 128 bits."""
    found: dict[str, int] = {}
    for name, count in built.ptx.items():
        if match := re.match(r"(ld|st)\.global\S*L1::(evict_\w+)\.L2::cache_hint\S*\.v4\.b32$", name):
            key = f"{match[1]} {match[2]}"
            found[key] = found.get(key, 0) + count
    assert sum(found.values()) == sum("cache_hint" in name and count for name, count in built.ptx.items())
    return found


COUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": False}
WALKED = [
    ({}, (4, 16, 12)),
    ({"centralize": "update"}, (12, 16, 12)),
    ({"max_row_norm": 1.0}, (4, 16, 0)),  # what is written may be read again
    (COUPLED, (8, 16, 12)),
]


@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in ("sm_80", "sm_100"))]
)
@pytest.mark.parametrize(("options", "widths"), WALKED, ids=["centred", "update", "projected", "coupled"])
def test_caches_keep_what_is_read_again(options: dict[str, Any], widths: tuple[int, ...], target: str):
    """Bytes of an element: read to be kept, in the first walk; read and written for the last time."""
    rule = "Adam" if "decoupled_weight_decay" in options else "AdamW"
    asked = Config(rule, (8, 20_000), options=(*{**CENTRED, **options}.items(),))
    built = compiled(asked, target)
    found = hinted(built)
    names = ("ld evict_last", "ld evict_first", "st evict_first")
    assert tuple(16 * found.pop(name, 0) / built.elements for name in names) == widths
    assert found == {}
    assert spilled(built) == 0


@pytest.mark.parametrize(
    "asked",
    [
        rows("", 8192, CENTRED),
        rows("", 20_000, {"max_row_norm": 1.0}),  # walked again only where it is too long
        rows("", 40_000, CENTRED),
        rows("ranks", 20_000, CENTRED),
        rows("", 20_000, {}),
    ],
    ids=["held", "projected", "pieces", "ranks", "flat"],
)
def test_other_kernels_tell_caches_nothing(asked: Config):
    assert "evict" not in compiled(asked).asm["ptx"]


@pytest.mark.parametrize("columns", [1024, 3584])
def test_shared_rows_cost_one_more_reading_of_the_gradient(columns: int):
    """28 bytes in the step as ever, 4 in the launch before it; all by 128-bit accesses."""
    asked = rows("ranks", columns, CENTRED)
    step, sums = (compiled(asked, kernel=kernel) for kernel in ("step", "sums"))
    assert (step.bytes_moved("ld"), step.bytes_moved("st")) == (16, 12)
    assert (sums.bytes_moved("ld"), sums.bytes_moved("st")) == (4, 0)
    assert step.narrow("st") == 0
    assert sums.narrow("st") == 1  # the row's sum


SPREAD = [
    ({"centred": CENTRED, "chain": CHAIN}[stages], stages, t)
    for stages in ("centred", "chain")
    for t in TARGETS
]


@pytest.mark.parametrize(
    ("options", "target"),
    [
        pytest.param(
            options,
            target,
            id=f"{stages}-{target}",
            marks=[] if target == "sm_90" or stages == "chain" else pytest.mark.slow,
        )
        for options, stages, target in SPREAD
    ],
)
def test_shared_rows_spill_no_register(options: dict[str, Any], target: str):
    asked = rows("ranks", 3584, options)
    for part in launch.parts_of(spec_of(asked).tile, spec_of(asked).FLAGS):
        assert spilled(compiled(asked, target, part)) == 0, part


@pytest.mark.parametrize(
    "target", [t if t in ("sm_90", "gfx942") else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS]
)
def test_factors_of_rows_cost_nothing(target: str):
    """Bytes of an element are those without; so is the norm's launch, which they go into too."""
    asked, without = (rows(slicing, 1024, {**CENTRED, "max_grad_norm": 1.0}) for slicing in ("factors", ""))
    assert spec_of(asked).FACTORED
    assert not spec_of(without).FACTORED
    built, plain = compiled(asked, target), compiled(without, target)
    assert spilled(built) == 0
    if "ptx" in built.asm:
        assert [built.bytes_moved(kind) for kind in ("ld", "st")] == [
            plain.bytes_moved(kind) for kind in ("ld", "st")
        ]
        norm, plain_norm = (compiled_control("AdamW", target, config) for config in (asked, without))
        assert norm.bytes_moved("ld") == plain_norm.bytes_moved("ld") == 4
        products = [
            sum(n for name, n in x.ptx.items() if re.match(r"mul\..*f32", name)) for x in (norm, plain_norm)
        ]
        assert products[0] >= products[1] + norm.elements // 2  # two in an instruction on sm_100
