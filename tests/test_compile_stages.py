"""What the compiler makes of the stages, of sums over launches and of hostile memory."""

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from kernel_cases import INTERPRETED
from kernel_compiled import TARGETS, compiled, compiled_for, sass, spec_of, spilled
from kernel_kinds import ALL_STAGES, KINDS, Config, config, slow_unless

import fusedcalib
from fusedcalib import GradientNoise, WeightNoise
from fusedcalib.kernels import launch
from fusedcalib.kernels.branch import branch_kernel
from fusedcalib.kernels.decide import control_kernel, norm_kernel
from fusedcalib.kernels.virtual import virtual_kernel

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")

ALL_KERNELS = (*launch.KERNELS.values(), norm_kernel, control_kernel, branch_kernel, virtual_kernel)
KERNELS = Path(launch.__file__).parent
RULES = Path(fusedcalib.__file__).parent / "rules"
OFF = {"weight_decay": 0.0, "l1": 0.0, "centralize": False, "max_row_norm": None}
ARITHMETIC = r"f32|shfl|bar|shared"


def more(kind: str, row_class: str = "flat", **options: Any) -> dict[str, int]:
    """Arithmetic that options add, in instructions a thread."""
    base, built = (
        compiled(config(kind, row_class, weight_decay=0)),
        compiled(config(kind, row_class, **options)),
    )
    assert base.elements == built.elements
    names = {n for n in built.ptx | base.ptx if re.search(ARITHMETIC, n)}
    return {n: built.ptx[n] - base.ptx[n] for n in names if built.ptx[n] != base.ptx[n]}


MUL, ADD, SUB = "mul.rn.f32", "add.rn.f32", "sub.rn.f32"
SIGN = {"setp.gt.f32": 1, "setp.lt.f32": 1, "selp.f32": 2, SUB: 1}


@pytest.mark.parametrize(
    ("kind", "options", "added"),
    [
        ("AdamW plain", {"weight_decay": 0.1}, {MUL: 1}),
        ("SGDW momentum", {"weight_decay": 0.1}, {MUL: 1}),
        ("Adan plain", {"weight_decay": 0.1}, {MUL: 1}),
        ("Adan plain", {"weight_decay": 0.1, "no_prox": True}, {MUL: 1}),
        ("SGD momentum", {"weight_decay": 0.1}, {MUL: 1, ADD: 1, "selp.f32": 1}),
        ("AdamW plain", {"weight_decay": 0, "maximize": True}, {"neg.f32": 1}),
        ("SGD momentum", {"nesterov": True}, {MUL: 1, ADD: 1}),
        ("Lion plain", {"l1": 0.1}, {**SIGN, MUL: 1, ADD: 1, "selp.f32": 3}),
        ("AdamW plain", {"weight_decay": 0, "eps_inside_sqrt": True}, {}),
    ],
)
def test_a_stage_costs_its_own_arithmetic(kind: str, options: dict[str, Any], added: dict[str, int]):
    """Of each element; what is less is once a program."""
    elements = compiled(config(kind)).elements
    found = {name: count / elements for name, count in more(kind, **options).items()}
    assert {name: count for name, count in found.items() if abs(count) >= 1} == added


@pytest.mark.parametrize("kind", ["SGD plain", "AdamW plain"])
def test_projection_in_a_tile_costs_a_sum_and_a_multiplication(kind: str):
    """Root and division are one a row. A thread sums its elements, then rows are summed across threads."""
    found = more(kind, "longest rows", weight_decay=0, max_row_norm=1.0)
    elements = compiled(config(kind, "longest rows")).elements
    assert found.pop(MUL) == 2 * elements
    assert found.pop("div.rn.f32") == found.pop("sqrt.rn.f32") == 1
    assert found.pop(ADD) <= elements + 10
    assert found.pop("selp.f32") <= 2 * elements
    assert not any(re.search(r"\.f32", name) and count > 1 for name, count in found.items())


def test_plain_sgd_is_one_multiplication_and_one_subtraction():
    """So a stage that is off leaves no instruction."""
    built = compiled(config("SGD plain", **OFF))
    found = {
        n: c / built.elements for n, c in built.ptx.items() if re.search(r"\.f(32|64)|selp|shfl|bar\.", n)
    }
    assert found == {MUL: 1, SUB: 1}


@pytest.mark.parametrize(
    ("kind", "options", "read"),
    [
        ("AdamW plain", {}, 4),
        ("AdamW bf16, fp32 state", {}, 2),
        ("SGD momentum", {}, 4),
        ("SGD momentum", {"weight_decay": 0.1}, 8),
        ("Lion plain", {"l1": 0.1}, 8),
        ("AdamW plain", {"centralize": "update"}, 12),
        ("Adan plain", {"centralize": "update"}, 20),
    ],
)
def test_row_sums_read_only_what_the_mean_is_of(kind: str, options: dict[str, Any], read: int):
    """The gradient; with a penalty on it the parameter too, before the update what moves it."""
    built = compiled(config(kind, "pieces", **options), kernel="sums")
    assert (built.bytes_moved("ld"), built.bytes_moved("st")) == (read, 0)
    assert built.narrow("st") == 1
    assert spilled(built) == 0


PROJECTED = [
    (kind, target) for kind in ("AdamW plain", "AdamW bf16, fp32 state", "Adan plain") for target in TARGETS
]


@pytest.mark.parametrize(
    ("kind", "target"),
    slow_unless(lambda kind, target: target == "sm_90" or kind == "Adan plain", PROJECTED),
)
def test_projection_of_pieces_touches_only_the_parameter(kind: str, target: str):
    """Its launch; that of the step stores one number more, the sum of squares of its piece."""
    asked = config(kind, "pieces", **ALL_STAGES)
    project, step = (compiled(asked, target, kernel) for kernel in ("finish", "step"))
    assert spilled(project) == spilled(step) == 0
    if target == "gfx942":
        return
    size = KINDS[kind].dtypes[0].itemsize
    assert (project.bytes_moved("ld"), project.bytes_moved("st"), project.narrow("st")) == (size, size, 0)
    assert step.narrow("st") == 1
    for built in (project, step):
        assert built.narrow("ld") <= 3 + built.spec.COUNT + 2 * built.spec.FIELDS
        assert not built.inexact


@pytest.mark.parametrize(
    ("kind", "slicing", "shape", "inner"),
    [
        ("AdamW plain", "unaligned", (8, 1024), 0),
        ("AdamW plain", "transposed", (8, 1024), 1),
        ("AdamW plain", "permuted", (8, 4, 16, 4), 2),
        ("Adan plain", "unaligned", (8, 1024), 0),
        ("Adan plain", "transposed", (8, 1024), 1),
    ],
)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_hostile_memory_compiles_without_spilling(
    target: str, kind: str, slicing: str, shape: tuple[int, ...], inner: int
):
    hostile = config(kind, "rows of 1024", **ALL_STAGES)._replace(shape=shape, slicing=slicing)
    built = compiled(hostile, target)
    dimensions, vector = built.spec.D, built.spec.VECTOR
    assert (dimensions, vector) == (inner, 1)
    assert spilled(built) == 0


NOISE = {"centralize": "update", "noise": GradientNoise(0.1)}


@pytest.mark.parametrize(
    ("row_class", "noise"),
    [("flat", WeightNoise(0.1)), ("longest rows", GradientNoise(0.1))],
    ids=["flat", "rows"],
)
def test_noise_costs_few_instructions(row_class: str, noise: Any):
    """A counter serves four elements: ten rounds of four multiplications; two of them share a root."""
    kind = "AdamW plain"
    without, built = compiled(config(kind, row_class)), compiled(config(kind, row_class, noise=noise))
    assert built.spec.QUADS
    assert without.elements == built.elements
    assert len(sass(built)) - len(sass(without)) <= 35 * built.elements
    assert spilled(built) == 0


@pytest.mark.parametrize(("kind", "row_class"), [("SGD plain", "flat"), ("AdamW plain", "longest rows")])
def test_noise_that_is_off_leaves_no_instruction(kind: str, row_class: str):
    """Nothing is read or computed for it, however its elements would be numbered."""
    spec = spec_of(config(kind, row_class, noise=None))
    assert spec == spec_of(config(kind, row_class))
    without, on = compiled_for(spec), compiled(config(kind, row_class, noise=GradientNoise(0.1)))
    assert sass(compiled_for(spec._replace(QUADS=True))) == sass(without)
    assert on.narrow("ld") - without.narrow("ld") == 7  # three words, a deviation, a step, where it begins
    assert not any(re.match(r"mul\.hi|xor|fma", name) for name in without.ptx)
    # To make a number takes one addition and three multiplications; to use it, one addition.
    assert (on.ptx - without.ptx)[ADD] == 2 * on.elements
    assert (on.ptx - without.ptx)[MUL] == 3 * on.elements


ODD = ((8, 63), (8, 255), (8, 1023), (8, 4095), (8, 8191), (8, 20001), (2, 40001))
WIDEST = [max(KINDS, key=lambda k: KINDS[k].tensors), "AdamW plain"]
HOSTILE = [(shape, "") for shape in ODD]
HOSTILE += [((8, 8192), "transposed"), ((8, 8192), "unaligned")]
OFTEN = ("SGD plain", "AdamW plain", "AdamW bf16, fp32 state")
UNEVEN = [("sm_90", kind, (8, n), "") for kind in KINDS if kind not in WIDEST for n in (4095, 8191)]
UNEVEN += [(t, kind, *how) for t in ("sm_80", "sm_90", "gfx942") for kind in WIDEST for how in HOSTILE]
UNEVEN += [("sm_90", "AdamW plain", (8, 1023), "transposed")]


def says_most(target: str, kind: str, shape: tuple[int, ...], slicing: str) -> bool:
    """Most tensors where rows are longest or lie worst in memory; of other rules the longest held."""
    if target != "sm_90":
        return kind == WIDEST[0] and slicing == "transposed"
    return (shape[1] == 8191 and kind in OFTEN) or (kind == WIDEST[0] and (bool(slicing) or shape[1] > 4095))


@pytest.mark.parametrize(("target", "kind", "shape", "slicing"), slow_unless(says_most, UNEVEN))
def test_noise_on_hostile_rows_spills_no_register(
    target: str, kind: str, shape: tuple[int, ...], slicing: str
):
    """Centred updates hold most. Where rows begin within a counter noise costs at most 75 instructions."""
    asked = config(kind, **NOISE)._replace(shape=shape, slicing=slicing)
    built = compiled(asked, target)
    assert built.spec.VECTOR == 1
    kernels = ["step", "sums"] if built.spec.REDUCTION == "pieces" else ["step"]
    assert [spilled(compiled(asked, target, kernel)) for kernel in kernels] == [0] * len(kernels)
    if target == "sm_90" and built.spec.REDUCTION == "tile":
        without = compiled(config(kind, centralize="update")._replace(shape=shape, slicing=slicing), target)
        assert len(sass(built)) - len(sass(without)) <= 75 * built.elements


@pytest.mark.parametrize("rule", fusedcalib.optimizers())
def test_no_hyperparameter_is_compiled_in(rule: str):
    """Whatever is a number may change; options that are words or switches are other kernels."""
    options = {k: p.default for k, p in inspect.signature(getattr(fusedcalib, rule)).parameters.items()}
    whole = ("centralize_min_ndim", "min_8bit_size", "seed")
    numbers = [k for k, v in options.items() if type(v) in (int, float) and k not in whole]
    assert {"lr", "l1", "weight_decay"} <= {*numbers}
    betas = options.get("betas", ())
    specs = [
        spec_of(
            Config(rule, (8, 64), options=(*{**dict.fromkeys([*numbers, "max_row_norm"], x), **own}.items(),))
        )
        for x in (0.25, 0.5)
        for own in [{"betas": (x,) * len(betas)} if betas else {}]
    ]
    assert specs[0] == specs[1]


@pytest.mark.parametrize("kernel", ALL_KERNELS, ids=lambda kernel: kernel.__name__)
def test_a_kernel_has_one_compile_time_argument(kernel: Any):
    """What is compiled is one value; more than six arguments would be a table that no one reads."""
    arguments = inspect.signature(kernel.fn).parameters.values()
    assert [a.name for a in arguments if "constexpr" in str(a.annotation)] == ["SPEC"]
    assert len(arguments) <= 6


def device_functions() -> dict[str, Any]:
    """Every function of kernels/ and of the rules that Triton compiles."""
    modules = [import_module(f"fusedcalib.kernels.{path.stem}") for path in KERNELS.glob("*.py")]
    modules += [import_module(f"fusedcalib.rules.{path.stem}") for path in RULES.glob("*.py")]
    return {
        f"{module.__name__.partition('.')[2]}.{name}": found
        for module in modules
        for name, found in vars(module).items()
        if hasattr(found, "fn") and found.__module__ == module.__name__
    }


def test_device_functions_have_few_arguments():
    found = device_functions()
    assert len(found) > 50
    counts = {name: len(inspect.signature(function.fn).parameters) for name, function in found.items()}
    assert max(counts.values()) <= 6, {name for name, count in counts.items() if count > 6}


def test_a_rule_of_another_source_is_another_kernel_on_disk(monkeypatch: pytest.MonkeyPatch):
    """Triton asks what constants print; a function prints its name, whatever is in it."""
    from triton.compiler import ASTSource

    def hash_of(spec: launch.Spec) -> str:
        signature = {"table": "*i64", "grads": "*i64", "tiles": "*i32", "scalars": "*fp32", "sums": "*fp32"}
        constants = {"SPEC": spec}
        return ASTSource(launch.KERNELS["step"], {**signature, "SPEC": "constexpr"}, constants).hash()

    spec = spec_of(config("AdamW plain"))
    rule = spec.RULE
    other = type(rule)(rule.fn)
    other._unsafe_update_src(rule.src.replace("sqrt", "divide"))
    assert str(other) == str(rule)
    assert hash_of(spec.of_rule(rule, spec.FLAGS)) == hash_of(spec)
    assert hash_of(spec.of_rule(other, spec.FLAGS)) != hash_of(spec)
