"""The static profile that is kept: what became heavier is told."""

import re
from dataclasses import replace

import pytest
from kernel_cases import INTERPRETED

import fusedcalib
from fusedcalib.bench.models import architectures
from fusedcalib.bench.predict import profile_kept, profile_static, profile_steps
from fusedcalib.bench.predict.gpus import GPUS
from fusedcalib.bench.predict.profile_kept import Kept, KeptKernel
from fusedcalib.bench.predict.profile_steps import ProfileCase

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")

H100 = GPUS["h100"]


SUBSET = (
    ProfileCase("AdamW"),
    ProfileCase("SGD"),
    ProfileCase("Adan"),
    ProfileCase("AdamW", ("max_grad_norm",)),
    ProfileCase("AdamW", (), "bf16"),
)


def planted(**changes):
    """AdamW's step, and the same with a part of what is compiled exchanged, under one name."""
    variant = profile_steps.variants(ProfileCase(), architectures.get("gpt2"))[0]
    other = variant._replace(spec=variant.spec._replace(**changes))
    return [{"step": KeptKernel.of(profile_static.measured(v, H100))} for v in (variant, other)]


def test_no_kernel_became_heavier():
    before = profile_kept.read()
    if reason := profile_kept.incomparable(before, triton.__version__):
        pytest.skip(reason)
    found = profile_kept.heavier(before.kernels, profile_kept.profile(SUBSET, workers=1).kernels)
    assert not found, "\n".join([*found, profile_kept.MEND])


def test_scalar_accesses_are_heavier():
    before, now = planted(VECTOR=1)
    found = profile_kept.heavier(before, now)
    assert any("accesses of 4 bytes, none below 16 before" in line for line in found)
    assert any("instructions an element" in line for line in found)
    assert profile_kept.heavier(now, before) == []


def test_a_tile_that_spills_is_heavier():
    before, now = planted(R=1, C=16_384)
    found = profile_kept.heavier(before, now)
    assert any(re.search(r"step: \d+ bytes are spilled, 0 were", line) for line in found)
    assert any("leave room for fewer warps" in line for line in found)
    assert profile_kept.heavier(before, before) == []


ROW = KeptKernel(100, 0, 0, widest=16, narrowest=16, bytes=28, instructions=60.0, executed=40.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"instructions": 62.9}, None),
        ({"instructions": 63.1}, "63.1 instructions an element, 60.0 before"),
        ({"executed": 41.9}, None),
        ({"executed": 42.1}, "42.1 instructions an element are executed, 40.0 were"),
        ({"registers": 104}, None),
        ({"registers": 128}, None),  # still 16 warps
        ({"registers": 129}, "129 registers leave room for fewer warps than 100 did"),
        ({"bytes": 32}, "32 bytes an element, 28 before"),
        ({"spilled": 8}, "8 bytes are spilled, 0 were"),
        ({"narrowest": 8}, "accesses of 8 bytes, none below 16 before"),
        ({"registers": 32, "instructions": 10.0}, None),
    ],
)
def test_heavier_says_in_what(change, said):
    found = profile_kept.heavier({"k": ROW}, {"k": replace(ROW, **change)})
    assert found == ([f"k: {said}"] if said else [])


def test_a_kernel_that_was_not_there_is_named():
    assert profile_kept.heavier({}, {"k": ROW}) == ["k: is new, or was called otherwise"]


def test_every_kernel_is_kept():
    """No compiling: the names that the cases have now."""
    model = architectures.get(profile_kept.MODEL)
    names = {
        profile_kept.name_of(case, variant.kernel, profile_steps.tile_text(variant))
        for case in profile_kept.CASES
        for variant in profile_steps.variants(case, model)
    }
    assert names == set(profile_kept.read().kernels), "python -m fusedcalib profile --accept"
    assert {case.optimizer.split()[0] for case in profile_kept.CASES} == set(fusedcalib.optimizers())


def test_another_triton_is_not_compared():
    before = Kept(1, "sm_90", "3.6.0", {})
    assert profile_kept.incomparable(before, "3.6.0") is None
    assert "is of Triton 3.6.0, here is 3.7.1" in profile_kept.incomparable(before, "3.7.1")


def test_the_file_is_written_as_it_is_read(tmp_path):
    path = tmp_path / "new" / "kept.json"
    results = Kept(1, "sm_90", "1", {"a": ROW, "b": ROW})
    profile_kept.write(results, path)
    assert profile_kept.read(path) == results
    assert len(path.read_text().splitlines()) == 4
    path.write_text("{}")
    with pytest.raises(ValueError, match="another schema"):
        profile_kept.read(path)
    with pytest.raises(ValueError, match="--accept writes it"):
        profile_kept.read(tmp_path / "absent.json")
