"""Executed instructions are those of the machine code but for what divisions and roots seldom need."""

import pytest
from kernel_cases import INTERPRETED

from fusedcalib.bench.models.architectures import Model, Param
from fusedcalib.bench.predict import executed, profile_static, profile_steps
from fusedcalib.bench.predict.compiled import instructions
from fusedcalib.bench.predict.profile_steps import ProfileCase

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")

MODEL = Model("m", (Param("w.weight", (64, 4096)),))
LISTING = """
.text.step_kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P2 BRA `(.L_x_1) ;
        /*0020*/                   MOV R18, 0x40 ;
        /*0030*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath) ;
        /*0040*/                   IMAD.MOV.U32 R1, RZ, RZ, R8 ;
        /*0050*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0060*/                   FMUL.FTZ R8, R7, R8 ;
.L_x_2:
        /*0070*/                   CALL.REL.NOINC `($__internal_1_$__cuda_sm20_rem_s64) ;
        /*0080*/               @P0 EXIT ;
        /*0090*/                   STG.E R8, R9 ;
        /*00a0*/                   EXIT ;
        .weak           $__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath
$__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath:
        /*00b0*/                   LOP3.LUT P2, RZ, R17, 0x7fffffff, RZ, 0xc0, !PT ;
        /*00c0*/               @P2 BRA `(.L_x_3) ;
        /*00d0*/                   FADD R1, R2, R3 ;
.L_x_3:
        /*00e0*/                   RET.REL.NODEC R104 `(step_kernel) ;
$__internal_1_$__cuda_sm20_rem_s64:
        /*00f0*/                   IADD3 R1, R2, R3, R4 ;
        /*0100*/                   RET.REL.NODEC R104 `(step_kernel) ;
        /*0110*/                   NOP ;
"""


def test_blocks_that_call_a_slow_path_and_the_path_are_left_out():
    found = executed.blocks(LISTING)
    kept = [name for block in found if not block.rare for name in block.names]
    assert kept == [
        *("MOV", "BRA", "FMUL.FTZ", "CALL.REL.NOINC", "EXIT", "STG.E", "EXIT"),
        *("IADD3", "RET.REL.NODEC", "NOP"),  # a remainder has no other path
    ]
    assert sum(len(block.names) for block in found) == 18


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_each_division_and_root_has_a_block_that_is_seldom_executed(target):
    (variant,) = profile_steps.variants(ProfileCase(), MODEL)
    built = profile_static.built_for(variant, target)
    if target == "gfx942":
        assert executed.executed(built) == instructions(built)
        return
    places = sum(n for name, n in built.ptx.items() if name in ("div.rn.f32", "sqrt.rn.f32"))
    assert places == 2 * built.elements
    assert sum(block.calls for block in executed.listed(built)) == places
    assert 2 * places < len(instructions(built)) - len(executed.executed(built))


def test_a_kernel_without_divisions_executes_all_that_is_compiled():
    (variant,) = profile_steps.variants(ProfileCase("Lion"), MODEL)
    built = profile_static.built_for(variant, "sm_90")
    assert executed.executed(built) == instructions(built)
