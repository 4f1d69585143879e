"""Compressed states and split weights in benchmarks, plans and profiles: bytes, launches, rivals, gate."""

from dataclasses import replace
from math import prod

import pytest
import torch
from bench_subjects import CPU
from plan_subjects import ALONE

import fusedcalib
from fusedcalib.bench.measure import case, choose, formats, gate, method
from fusedcalib.bench.models import architectures, shapes, shardings
from fusedcalib.bench.models.architectures import Model, Param
from fusedcalib.bench.models.shardings import Sharding
from fusedcalib.bench.models.traffic import DTYPES, PUBLISHED
from fusedcalib.bench.predict import plan_steps, profile_steps
from fusedcalib.rules.adam import AdamW

ADAMW = method.SUBJECTS["AdamW"]
PACKED = [name for name, storage in DTYPES.items() if storage.packed]
# Rows in blocks and not, too few columns, too few elements, a vector.
MIXED = Model(
    "mixed",
    tuple(
        Param(f"{i}.fc.weight", shape)
        for i, shape in enumerate(((64, 128), (50, 100), (300, 27), (8, 64), (9000,)))
    ),
)
SPEC = shapes.ParamList("mixed", ((64, 128), (50, 100), (40, 27), (300,)))


@pytest.mark.parametrize(
    ("storage", "adamw", "lion"),
    [
        (DTYPES["fp32"], (16, 28), (12, 20)),
        (DTYPES["bf16"], (8, 14), (6, 10)),
        (DTYPES["bf16+fp32-state"], (12, 22), (8, 14)),
        (DTYPES["split16"], (14, 26), (10, 18)),
        (DTYPES["split16+bf16-state"], (10, 18), (8, 14)),
        (DTYPES["split16+8bit"], (8.125, 14.25), (7.0625, 12.125)),
        (DTYPES["split8+8bit"], (7.125, 12.25), (6.0625, 10.125)),
        (DTYPES["bf16+8bit"], (6.125, 10.25), (5.0625, 8.125)),
        (DTYPES["fp32+8bit"], (10.125, 16.25), (9.0625, 14.125)),
        (PUBLISHED["TransformerEngine, apex: fp32 copy"], (16, 28), (12, 20)),
        (PUBLISHED["bitsandbytes, torchao: 8-bit AdamW"], (6.03125, 10.0625), (5.015625, 8.03125)),
        (PUBLISHED["FlashOptim, 24-bit weights"], (7.125, 12.25), (6.0625, 10.125)),
    ],
)
def test_bytes_of_each_storage(storage, adamw, lion):
    assert [(storage.kept(n), storage.moved(n)) for n in (2, 1)] == [adamw, lion]
    assert storage.moved(2, clips=True) == adamw[1] + storage.param.itemsize
    assert (storage.kept(2, averages=True), storage.moved(2, averages=True)) == (adamw[0] + 4, adamw[1] + 8)


@pytest.mark.parametrize("dtypes", PACKED)
@pytest.mark.parametrize("subject", ["AdamW", "Lion", "SGD momentum"])
def test_a_plan_moves_those_bytes(subject, dtypes):
    found = shardings.shards(Model("m", (Param("fc.weight", (64, 64)),)), ALONE)
    for name in ("own_plain", "own_clip", "own_chain"):
        step = plan_steps.step_of(name, method.SUBJECTS[subject], dtypes, found, ALONE)
        extras = plan_steps.METHODS[name].extras
        assert step.moved == 64 * 64 * extras.width(DTYPES[dtypes], method.SUBJECTS[subject].states())


@pytest.mark.parametrize("dtypes", PACKED)
def test_a_plan_keeps_the_bytes_of_a_real_optimizer(dtypes):
    storage = DTYPES[dtypes]
    params = [torch.nn.Parameter(torch.randn(p.shape).to(storage.param)) for p in MIXED.params]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = AdamW(params, backend="eager", **storage.options)
    optimizer.step()
    found = optimizer.state_bytes()
    step = plan_steps.step_of("own_plain", ADAMW, dtypes, shardings.shards(MIXED, ALONE), ALONE)
    assert step.kept == found["total"] - found["step"]
    weights = sum(prod(p.shape) for p in MIXED.params)
    assert step.moved == 2 * step.kept - storage.param.itemsize * weights  # gradients are only read


@pytest.mark.parametrize(("name", "launches"), [("own_plain", 2), ("own_clip", 3)])
def test_two_kinds_of_parameters_are_two_launches(name, launches):
    found = shardings.shards(architectures.get("gpt2"), ALONE)
    step = plan_steps.step_of(name, ADAMW, "split8+8bit", found, ALONE)
    assert step.launches == launches
    assert step.moved / 124_439_808 == pytest.approx(
        DTYPES["split8+8bit"].moved(2, name == "own_clip"), rel=2e-3
    )


def test_what_is_kept_in_bytes_depends_on_the_whole_parameter():
    """A part of it may have fewer elements than are kept so, and still is."""
    model = Model("m", (Param("fc.weight", (64, 64)),))
    alone, spread = (
        plan_steps.step_of("own_plain", ADAMW, "split8+8bit", shardings.shards(model, layout), layout)
        for layout in (ALONE, Sharding(1, 32, 1))
    )
    assert (spread.kept, spread.moved) == (alone.kept / 32, alone.moved / 32)


def test_rows_that_are_cut_within_a_block_are_said():
    model = Model("m", (Param("mlp.down_proj.weight", (64, 11008)),))
    layout = Sharding(1, 1, 8)
    with pytest.raises(ValueError, match=r"leaves 1376 columns of a row of 11008, .* smaller --tp"):
        plan_steps.step_of("own_plain", ADAMW, "split8+8bit", shardings.shards(model, layout), layout)


def test_rounding_at_random_is_switched_on_where_it_does_something():
    rounded = {name for name in DTYPES if "stochastic_rounding" in profile_steps.everything(name)}
    assert rounded == {"bf16", "bf16+fp32-state", "split8+8bit", "bf16+8bit"}


# -- what is compared


def prepared(dtypes, subject=ADAMW, against=()):
    (one,) = choose.cases_from([subject], [SPEC], [dtypes], choose.features_from([], {}), against)
    return case.Prepared(one, CPU, lambda *_: None)


@pytest.mark.parametrize(
    ("dtypes", "kept"),
    [("split8+8bit", (12.25, 28, 14, 10.0625, 12.25)), ("bf16+8bit", (10.25, 28, 14, 10.0625, 10.25))],
)
def test_beside_ours_stand_fp32_torch_and_libraries_with_bytes(dtypes, kept):
    work = prepared(dtypes, against=["fused", "bitsandbytes", "flashoptim", "optimi"])
    assert list(work.rows) == ["own_plain", "own_fp32", "torch_fused", "bitsandbytes_8bit", "flashoptim_8bit"]
    assert work.rows["torch_fused"].title == "torch fused, all bf16"
    assert tuple(work.width(row) for row in work.rows.values()) == kept
    asked = work.rows["flashoptim_8bit"].make.__self__.options
    assert asked == {"quantize": True, "master_weight_bits": {"split8+8bit": 24}.get(dtypes)}


def test_a_storage_without_bytes_has_none_of_those():
    assert list(prepared("split16", against=["fused", "torchao"]).rows) == [
        "own_plain",
        "own_fp32",
        "torch_fused",
    ]


@pytest.mark.parametrize(
    ("subject", "dtypes"),
    [("AdamW", name) for name in PACKED] + [pytest.param("Lion", n, marks=pytest.mark.slow) for n in PACKED],
)
def test_all_pass_the_gate(subject, dtypes):
    work = prepared(dtypes, method.SUBJECTS[subject], ["fused"])
    built = work.build()
    assert {row.params[0].dtype for row in built.values()} == {DTYPES[dtypes].param, torch.float32}
    verdicts = work.judge(built)
    assert all(verdict.passed for verdict in verdicts.values()), work.reasons
    assert work.reasons.keys() <= {"torch_fused"}


@pytest.mark.parametrize(
    ("form", "scale", "passes"), [("fusedcalib", 1.0, True), ("", 1.0, False), ("fusedcalib", 1.5, False)]
)
def test_the_bound_is_what_the_format_is_off_by(form, scale, passes):
    params = shapes.build(SPEC, CPU)
    options = {**ADAMW.options, "lr": scale * ADAMW.options["lr"]}
    optimizer = fusedcalib.AdamW(params, state_dtype="8bit", backend="eager", **options)
    entry = gate.Entry(gate.Kind(form=form), params, optimizer.step)
    assert gate.check(SPEC, {"it": entry}, ADAMW)["it"].passed is passes


def test_a_state_is_moved_outwards_and_inwards_and_never_below_nothing():
    x = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)
    form = formats.Format((0.1, 0.01), (0.2, 0.5))
    assert form.off(x, "exp_avg", 1).tolist() == pytest.approx([-1.11, 0.01, 0.56])
    assert form.off(x, "exp_avg", -1).tolist() == pytest.approx([-0.89, -0.01, 0.44])
    assert form.off(x.abs(), "exp_avg_sq", -1).tolist() == pytest.approx([0.3, 0.0, 0.0])
    names = {name for cls in fusedcalib.optimizers().values() for name in cls.rule.nonnegative}
    assert names == formats.NONNEGATIVE


def test_features_are_judged_where_states_can_be_read():
    extras = choose.features_from(["clip", "noise"], {})
    (one,) = choose.cases_from([ADAMW], [SPEC], ["split8+8bit"], extras, [])
    work = case.Prepared(replace(one, methods=tuple(m for m in one.methods if m.own)), CPU, lambda *_: None)
    verdicts = work.judge(work.build())
    assert verdicts
    assert not work.reasons
