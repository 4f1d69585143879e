"""Kernels of compressed states and split parameters, compiled for GPUs that need not be there."""

import functools
from typing import Any, NamedTuple

import pytest
import torch
from kernel_compiled import spilled

import fusedcalib
from fusedcalib.bench.predict.compiled import TARGETS, Compiled, compiled_for, instructions
from fusedcalib.bench.predict.executed import executed
from fusedcalib.engine.state import make_state, scales_of, states_of
from fusedcalib.engine.versions import VersionCounters
from fusedcalib.executors.triton import run as gpu
from fusedcalib.executors.triton.executor import EXECUTOR
from fusedcalib.layout.buckets import Slot
from fusedcalib.layout.recipe import recipe_of
from fusedcalib.layout.scalars import Scalars, scalars_of
from fusedcalib.layout.tables import build_buckets

BF16, F32 = torch.bfloat16, torch.float32


class Form(NamedTuple):
    """How AdamW keeps what it steps; bytes that a step reads and writes of an element, but for scales."""

    reads: int
    writes: int
    compiled: float  # instructions an element for sm_90
    executed: float  # of them, where no division or root takes its slow path
    options: dict[str, Any]
    dtype: torch.dtype = BF16


EIGHT: dict[str, Any] = {"state_dtype": "8bit"}
# The last numbers are what was compiled when they were written: a kernel may not become heavier unseen.
FORMS = {
    "exact": Form(14, 12, 74.1, 56.2, {"master_weights": "split16", "state_dtype": "float32"}),
    "eight": Form(8, 6, 113.6, 95.1, {"master_weights": "split16", **EIGHT}),
    "seven": Form(7, 5, 119.2, 100.8, {"master_weights": "split8", **EIGHT}),
    "six": Form(6, 4, 126.8, 108.4, {"stochastic_rounding": True, **EIGHT}),
    "fp32": Form(10, 6, 105.8, 87.6, EIGHT, F32),
}


def spec_of(options: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...], rule: str = "AdamW") -> Any:
    """What the package compiles for a parameter on a GPU, found out without one."""
    p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    p.grad = torch.zeros_like(p)
    optimizer = getattr(fusedcalib, rule)([p], **options)
    (group,) = optimizer.param_groups
    recipe = recipe_of(optimizer.rule, group)
    make_state(optimizer.state, VersionCounters(), p, recipe, group)
    scalars = Scalars()
    scalars.set([scalars_of(recipe, group, 1.0)])
    states, scales = states_of(optimizer.state, p, recipe), scales_of(optimizer.state, p, recipe)
    (bucket,) = build_buckets([Slot(p, states, 0, recipe, EXECUTOR, scales=scales)], scalars)
    return gpu.spec_of(bucket)


@functools.cache
def built(form: str, target: str) -> Compiled:
    return compiled_for(spec_of(FORMS[form].options, FORMS[form].dtype, (1024, 4096)), target)


# Every form for one target, one form for the others; all of all where time does not matter.
HERE = [
    pytest.param(form, target, marks=[] if target == "sm_90" or form == "seven" else pytest.mark.slow)
    for form in FORMS
    for target in TARGETS
]


@pytest.mark.parametrize(("form", "target"), HERE)
def test_nothing_is_spilled_and_accesses_are_wide(form, target):
    """64 bits of bytes, 128 of all else: eight elements a thread."""
    found = built(form, target)
    assert spilled(found) == 0
    for kind, moved in (("ld", FORMS[form].reads), ("st", FORMS[form].writes)):
        widths = found.widths(kind, moved)
        assert min(widths) >= 8, (kind, widths)
        assert 16 in widths
    assert found.shared <= (16384 if form in ("exact", "fp32") else 512)  # scales; layouts of fp32 and bf16


@pytest.mark.parametrize("form", FORMS)
def test_no_kernel_is_heavier_than_it_was(form):
    found = built(form, "sm_90")
    assert len(instructions(found)) / found.elements <= 1.05 * FORMS[form].compiled
    assert len(executed(found)) / found.elements <= 1.05 * FORMS[form].executed


@pytest.mark.parametrize("columns", [100, 27])
def test_rows_that_end_within_a_block_are_not_spilled(columns):
    spec = spec_of({**FORMS["seven"].options, "min_8bit_size": 0, "centralize": True}, BF16, (4096, columns))
    assert spilled(compiled_for(spec)) == 0


def test_a_slot_without_such_forms_compiles_what_it_did():
    """Nothing of them is in what is compiled for a cast, so that kernels on disk and profiles stay."""
    spec = spec_of({}, BF16, (1024, 4096))
    assert spec.KEPT == ()
    assert (spec.FLAGS.master, spec.FLAGS.dithered) == ("none", False)
