"""What the compiler makes of the kernels: bytes, registers, instructions. Needs Triton, not a GPU."""

import inspect
import re
from typing import NamedTuple

import pytest
import torch
from kernel_cases import INTERPRETED
from kernel_compiled import KERNELS, TARGETS, Config, compiled, sass, spec_of, spilled

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")

F32, BF16 = torch.float32, torch.bfloat16
# Instructions of a lane in the time in which a byte is moved: 132 SMs x 128 lanes x 1.7 GHz
# at 4.3 TB/s. More of them, and memory waits for arithmetic.
ISSUES_PER_BYTE = 132 * 128 * 1.7e9 / 4.3e12


class Kind(NamedTuple):
    """A rule and its storage, and the bytes that a step must read and write for each element."""

    rule: str
    dtypes: tuple[torch.dtype, ...]
    read: int
    written: int
    options: tuple[tuple[str, object], ...] = ()


KINDS = {
    "AdamW fp32": Kind("AdamW", (F32,) * 4, 16, 12),
    "AdamW bf16, fp32 state": Kind("AdamW", (BF16, BF16, F32, F32), 12, 10),
    "AdamW bf16": Kind("AdamW", (BF16,) * 4, 8, 6),
    "AMSGrad fp32": Kind("AdamW", (F32,) * 5, 20, 16, (("amsgrad", True),)),
    "SGD fp32": Kind("SGD", (F32,) * 2, 8, 4),
    "SGD bf16": Kind("SGD", (BF16,) * 2, 4, 2),
    "momentum fp32": Kind("SGD", (F32,) * 3, 12, 8, (("momentum", 0.9),)),
}
UNCENTRED = (("centralize", False),)
CENTRED = (("centralize", True),)
# A parameter of each row class, and how often its step kernel reads the gradient.
CLASSES = {
    "flat": ((4096,), UNCENTRED, 1),
    **{f"rows of {n}": ((8, n), CENTRED, 1) for n in (64, 256, 1024, 4096, 8192)},
    "loop": ((8, 32768), CENTRED, 2),
    "pieces": ((2, 40000), CENTRED, 1),
}
HARD = ("flat", "rows of 8192", "loop")  # no reduction, most registers, two passes
ALL_CLASSES = ("AdamW fp32", "AdamW bf16, fp32 state")
STEPS = [(k, c) for k in KINDS for c in CLASSES if k in ALL_CLASSES or c in HARD]
ELSEWHERE = [(k, c, t) for k in ALL_CLASSES for c in HARD for t in TARGETS if t != "sm_90"]

steps = pytest.mark.parametrize(("kind", "row_class"), STEPS)


def config(kind: str, row_class: str = "flat", **options: object) -> Config:
    rule, dtypes, *_, chosen = KINDS[kind]
    shape, centring, _ = CLASSES[row_class]
    return Config(rule, shape, dtypes, (*centring, *chosen, *options.items()))


@steps
def test_no_register_is_spilled(kind: str, row_class: str):
    assert spilled(compiled(config(kind, row_class))) == 0


@steps
def test_bytes_moved(kind: str, row_class: str):
    """All of them by 128-bit accesses; centring adds none, but where a row is walked twice."""
    built = compiled(config(kind, row_class))
    again = (CLASSES[row_class][2] - 1) * KINDS[kind].dtypes[1].itemsize
    assert built.bytes_moved("ld") == KINDS[kind].read + again
    assert built.bytes_moved("st") == KINDS[kind].written
    assert built.narrow("st") == 0
    # Read otherwise: the tile [3], scalars, the slot's row of the table and the sums of pieces; the
    # compiler repeats some of them rather than keep a register. Once a program, not once an element.
    assert built.narrow("ld") <= 3 + built.spec.scalars + 2 * built.spec.fields


@steps
def test_instructions_fit_into_the_time_that_memory_takes(kind: str, row_class: str):
    built = compiled(config(kind, row_class))
    budget = ISSUES_PER_BYTE * (KINDS[kind].read + KINDS[kind].written)
    assert len(sass(built)) / built.elements < budget


@steps
def test_every_operation_is_rounded_once(kind: str, row_class: str):
    """Neither fused nor approximate, as on the CPU; storage to nearest even."""
    names = " ".join(compiled(config(kind, row_class)).ptx)
    assert not re.search(r"fma|approx|div\.full|\.ftz|\.rz\.bf16", names)
    if BF16 in KINDS[kind].dtypes:
        assert "cvt.rn.bf16" in names


@pytest.mark.parametrize(("kind", "row_class", "target"), ELSEWHERE)
def test_other_gpus(kind: str, row_class: str, target: str):
    built = compiled(config(kind, row_class), target)
    assert spilled(built) == 0
    again = (CLASSES[row_class][2] - 1) * KINDS[kind].dtypes[1].itemsize
    expected = KINDS[kind].read + again, KINDS[kind].written
    if target != "gfx942":
        assert (built.bytes_moved("ld"), built.bytes_moved("st")) == expected
        return
    found = [len(re.findall(rf"global_{k}_dwordx4", built.asm["amdgcn"])) for k in ("load", "store")]
    assert tuple(16 * n / built.elements for n in found) == expected
    assert not re.search(r"(global|buffer|flat)_store_(?!dwordx4)", built.asm["amdgcn"])


@pytest.mark.parametrize(
    ("kind", "options", "read"),
    [
        ("AdamW fp32", {}, 4),
        ("AdamW bf16, fp32 state", {}, 2),
        ("momentum fp32", {}, 4),
        ("momentum fp32", {"weight_decay": 0.1}, 8),
        ("AdamW fp32", {"centralize": "update"}, 12),
    ],
)
def test_row_sums_read_only_what_the_mean_is_of(kind: str, options: dict[str, object], read: int):
    """The gradient; with coupled decay the parameter too, before the update its moments."""
    built = compiled(config(kind, "pieces", **options), kernel="sums")
    assert (built.bytes_moved("ld"), built.bytes_moved("st")) == (read, 0)
    assert built.narrow("st") == 1
    assert spilled(built) == 0


def _more(kind: str, **options: object) -> dict[str, float]:
    """Arithmetic that an option adds, in instructions for each element."""
    base, built = compiled(config(kind, weight_decay=0)), compiled(config(kind, **options))
    names = {n for n in built.ptx | base.ptx if re.search(r"f32|shfl|bar|shared", n)}
    change = {n: (built.ptx[n] - base.ptx[n]) / built.elements for n in names}
    return {n: c for n, c in change.items() if abs(c) >= 1}  # what is less is once a program


@pytest.mark.parametrize(
    ("kind", "options", "added"),
    [
        ("AdamW fp32", {"weight_decay": 0.1}, {"mul.rn.f32": 1}),
        ("momentum fp32", {"weight_decay": 0.1}, {"mul.rn.f32": 1, "add.rn.f32": 1, "selp.f32": 1}),
        ("AdamW fp32", {"weight_decay": 0, "maximize": True}, {"sub.rn.f32": 1}),
        ("momentum fp32", {"nesterov": True}, {"mul.rn.f32": 1, "add.rn.f32": 1}),
    ],
)
def test_a_stage_costs_its_own_arithmetic_and_nothing_when_off(
    kind: str, options: dict[str, object], added: dict[str, float]
):
    assert _more(kind, **options) == added


def test_plain_sgd_is_one_multiplication_and_one_subtraction():
    built = compiled(config("SGD fp32"))
    arithmetic = {n: c / built.elements for n, c in built.ptx.items() if re.search(r"\.f(32|64)", n)}
    assert arithmetic == {"mul.rn.f32": 1, "sub.rn.f32": 1}


@pytest.mark.parametrize("kind", [k for k in KINDS if len(set(KINDS[k].dtypes)) == 1])
def test_without_centring_no_lane_waits_for_another(kind: str):
    assert not re.search(r"shfl|bar\.|shared", " ".join(compiled(config(kind)).ptx))


@pytest.mark.parametrize(
    ("slicing", "shape", "inner"),
    [("unaligned", (8, 1024), 0), ("transposed", (8, 1024), 1), ("permuted", (8, 4, 16, 4), 2)],
)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_hostile_memory_compiles_without_spilling(
    target: str, slicing: str, shape: tuple[int, ...], inner: int
):
    hostile = config("AdamW fp32", "rows of 1024")._replace(shape=shape, slicing=slicing)
    built = compiled(hostile, target)
    assert (built.spec.inner, built.spec.vector) == (inner, 1)
    assert spilled(built) == 0


HYPERPARAMETERS = {
    "AdamW": {"lr": 0.5, "betas": (0.1, 0.2), "eps": 0.25, "weight_decay": 0.75},
    "SGD": {"lr": 0.5, "momentum": 0.25, "dampening": 0.5, "weight_decay": 0.75},
}


@pytest.mark.parametrize("rule", HYPERPARAMETERS)
def test_no_hyperparameter_is_compiled_in(rule: str):
    usual = {"lr": 0.1, "weight_decay": 0.1} | ({"momentum": 0.9} if rule == "SGD" else {})
    specs = [
        spec_of(Config(rule, (8, 64), options=(*CENTRED, *options.items())))
        for options in (usual, HYPERPARAMETERS[rule])
    ]
    assert specs[0] == specs[1]


@pytest.mark.parametrize("name", KERNELS)
def test_compile_time_arguments_are_those_of_the_spec(name: str):
    """None may be missing, and none may sneak in beside them."""
    spec = spec_of(config("AdamW fp32"))
    arguments = inspect.signature(KERNELS[name].fn).parameters.values()
    constants = {a.name for a in arguments if "constexpr" in str(a.annotation)}
    assert constants == spec.constants().keys()
