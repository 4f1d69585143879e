"""The static profile: what is compiled is what the engine launches, and what became heavier is told."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import INTERPRETED
from profile_subjects import SMALL, launched

from fusedcalib import __main__ as command
from fusedcalib.bench.models import architectures
from fusedcalib.bench.models.architectures import Model, Param
from fusedcalib.bench.models.traffic import traffic
from fusedcalib.bench.predict import (
    compiled,
    profile,
    profile_gpu,
    profile_static,
    profile_steps,
    static_costs,
)
from fusedcalib.bench.predict.gpus import GPUS
from fusedcalib.bench.predict.profile_steps import ProfileCase, everything
from fusedcalib.kernels import launch

triton = pytest.importorskip("triton")
__all__ = ["launched"]  # a fixture
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")

H100 = GPUS["h100"]
ALL = everything("fp32")
CHOICES = ((), ("centralize", "max_grad_norm"), ("capturable",), ALL)


# -- what is compiled


def constants_of(variant):
    """As kernels/launch.py hands them over."""
    spec, warps = variant.decider, launch.WARPS
    if variant.kernel == "norm":
        spec = launch.norm_spec(variant.spec, variant.decider)
        warps = spec.SLOTS.WARPS
    elif variant.kernel != "control":
        spec = variant.spec._replace(COUNT=0) if variant.as_arguments else variant.spec
        warps = spec.WARPS
    return {"SPEC": spec, "num_warps": warps, **launch.OPTIONS}


@pytest.mark.parametrize("dtypes", ["fp32", "bf16+fp32-state", "split8+8bit"])
@pytest.mark.parametrize("options", CHOICES, ids=["plain", "clip", "capturable", "everything"])
def test_what_is_compiled_is_what_the_engine_launches(options, dtypes, launched):
    """Kernel by kernel, with every compile-time argument."""
    case = ProfileCase("AdamW", options, dtypes)
    optimizer = profile_gpu.made(case, SMALL, torch.device("cpu"))
    launched.clear()
    optimizer.step()
    variants = profile_steps.variants(case, SMALL)
    assert [(variant.kernel, constants_of(variant)) for variant in variants] == launched
    steps = [variant for variant in variants if variant.kernel == "step"]
    assert sum(variant.elements for variant in steps) == SMALL.count
    assert sum(variant.tensors for variant in steps) == len(SMALL.params)


def test_lanes_are_those_of_all_tiles():
    """96 columns in tiles of [16, 256], 9000 by a loop of 4096 at a time, 63 in [64, 64]."""
    variants = profile_steps.variants(ProfileCase("AdamW", ("centralize",)), SMALL)
    lanes = {variant.spec.tile: variant.lanes for variant in variants if variant.kernel == "step"}
    assert lanes[launch.Tile(16, 256, 8, "tile")] == 2 * 16 * 256
    assert lanes[launch.Tile(1, 4096, 8, "loop")] == 2 * 3 * 4096
    assert lanes[launch.Tile(64, 64, 16, "tile")] == 64 * 64
    assert lanes[launch.Tile(1, 4096, 8, "none")] == 2 * 4096  # 1536 and 96 elements
    assert lanes[launch.Tile(1, 4096, 8, "pieces")] == 2 * 10 * 4096


def test_every_kernel_moves_what_is_counted():
    """Everything on, pieces: the average is finished with the parameter."""
    model = Model("m", (Param("long.weight", (2, 40_000)),))
    variants = profile_steps.variants(ProfileCase("AdamW", ALL), model)
    assert [variant.kernel for variant in variants] == ["norm", "sums", "step", "finish"]
    for variant in variants:
        built = profile_static.built_for(variant, "sm_90")
        moves = profile_steps.traffic_of(variant)
        assert (built.bytes_moved("ld"), built.bytes_moved("st")) == moves.accessed, variant.kernel


# -- what is read


def test_registers_and_widths_are_read():
    (variant,) = profile_steps.variants(ProfileCase(), architectures.get("gpt2"))
    row = profile_static.measured(variant, H100)
    assert row.elements == 124_439_808
    assert (row.bytes, row.widest, row.narrowest, row.spilled) == (28, 16, 16, 0)
    assert 32 < row.registers <= 128
    assert row.moved == 28 * row.elements
    assert row.seconds.memory == pytest.approx(row.moved / 3.35e12)
    issued = row.executed * row.lanes / (132 * 128 * 1.98e9)
    assert row.seconds.issue == pytest.approx(issued, rel=1e-3)
    assert (row.bound, row.seconds.bound) == ("memory", row.seconds.memory)
    # 104 registers at most leave 16 warps, each of which asks for 16 B of 4 tensors 4 times a thread.
    assert row.in_flight == row.occupancy.warps * 32 * 256


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "held", "limit"),
    [
        ("sm_90", 60, 16, 0, 32, "registers"),
        ("sm_90", 128, 8, 0, 16, "registers"),
        ("sm_90", 244, 8, 0, 8, "registers"),
        ("sm_90", 32, 8, 0, 64, "warps"),
        ("sm_90", 33, 8, 0, 48, "registers"),
        ("sm_90", 16, 1, 0, 32, "warps"),  # 32 programs
        ("sm_80", 32, 8, 50 * 1024, 24, "shared memory"),
        ("gfx942", 128, 8, 0, 16, "registers"),
        ("gfx942", 64, 8, 0, 32, "warps"),
    ],
)
def test_occupancy(target, registers, warps, shared, held, limit):
    found = static_costs.occupancy(target, registers, warps, shared)
    assert (found.warps, found.limit) == (held, limit)


@pytest.mark.parametrize("options", [(), ("max_grad_norm",)])
def test_occupancy_on_amd_is_the_compilers(options):
    """Which tells waves of a SIMD, whether or not they make whole programs."""
    model = Model("m", (Param("bias", (4096,)),))
    for variant in profile_steps.variants(ProfileCase("AdamW", options), model):
        built = profile_static.built_for(variant, "gfx942")
        used = compiled.usage(built)
        found = static_costs.occupancy("gfx942", used.registers, built.built.warps, built.shared)
        told = 4 * int(re.search(r"; Occupancy: (\d+)", built.asm["amdgcn"])[1])
        warps = built.built.warps
        assert found.warps == told // warps * warps


def test_a_kernel_is_bound_by_what_takes_longer():
    assert static_costs.bound(H100, 3.35e9, 0) == static_costs.Bound(1e-3, 0, 1e-3)
    assert static_costs.bound(H100, 0, 132 * 128 * 1.98e9).bound == pytest.approx(1)
    assert static_costs.bound(H100, 3.35e9, 132 * 128 * 1.98e7).by == "issue"
    assert static_costs.bound(H100, 3.35e10, 132 * 128 * 1.98e6).by == "memory"


def test_published_rates_are_those_of_the_table():
    """Twice the lanes, the processors and the clock are the fp32 rate of the data sheet, to 2 %."""
    sheets = {"a100": (64, 19.5e12), "h100": (128, 67e12), "h200": (128, 67e12), "b200": (128, 75e12)}
    for name, (lanes, rate) in sheets.items():
        gpu_ = GPUS[name]
        assert 2 * lanes * gpu_.processors * gpu_.clock == pytest.approx(rate, rel=0.02)


def test_traffic_of_a_second_walk_is_no_traffic_of_the_memory():
    (variant,) = (
        v
        for v in profile_steps.variants(ProfileCase("AdamW", ("centralize",)), SMALL)
        if "loop" in v.spec.tile
    )
    moves = profile_steps.traffic_of(variant)
    assert (moves.memory, moves.accessed) == (28, (20, 12))
    flags = variant.spec.FLAGS
    assert traffic("step", flags, [4, 4, 4, 4]).accessed == (16, 12)


# -- the command


SHAPES = '[{"name": "fc.weight", "shape": [64, 96]}, {"name": "fc.bias", "shape": [64]}]'


def test_a_profile_is_printed_written_and_drawn(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(profile_gpu, "here", lambda: None)
    shapes, data, figure = (tmp_path / name for name in ("m.json", "p.json", "p.png"))
    shapes.write_text(SHAPES)
    arguments = ["profile", "--shapes", str(shapes), "--everything", "--optimizer", "SGD"]
    assert command.main([*arguments, "--json", str(data), "--plot", str(figure)]) == 0
    said = capsys.readouterr().out
    assert "No GPU is here to measure on: this is the static profile, compiled for sm_90" in said
    assert "SGD, fp32, everything" in said
    assert "no GPU was measured" in said
    assert figure.read_bytes().startswith(b"\x89PNG")
    results = json.loads(data.read_text())
    assert [case["launches"] for case in results["cases"]] == [1, 4]
    for case in results["cases"]:
        assert case["moved"] == sum(kernel["moved"] for kernel in case["kernels"])
        assert case["seconds"]["bound"] >= max(case["seconds"]["memory"], case["seconds"]["issue"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "llama9"], "no model is named 'llama9'"),
        (["--optimizer", "Adamx"], "--optimizer 'Adamx' is not known; there are all, AdamW"),
        (["--arch", "sm_80", "--gpu", "h100"], "--gpu h100 is no sm_80; of that are a100"),
        (["--shapes", "absent.json"], "absent.json cannot be read"),
    ],
)
def test_what_cannot_be_profiled_is_said_in_a_sentence(arguments, said, capsys):
    assert command.main(["profile", "--arch", "sm_80", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fusedcalib profile: ")
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--options", "'emma' is not one of l1, centralize"), ("--dtypes", "'emma' is not one of fp32")],
)
def test_an_unknown_option_is_told_the_known_ones(flag, said, capsys):
    with pytest.raises(SystemExit):
        command.main(["profile", flag, "emma"])
    assert said in capsys.readouterr().err


def test_a_named_gpu_says_what_is_compiled():
    assert profile._target(SimpleNamespace(arch=None, gpu="mi300x")) == "gfx942"
    assert profile._gpu(SimpleNamespace(gpu="h200"), "sm_90") == "h200"
    assert profile._gpu(SimpleNamespace(gpu=None), "sm_100") == "b200"
