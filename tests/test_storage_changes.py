"""How states and weights are kept may change between steps: converted once, taken back where a step fails."""

import copy
import math

import pytest
import torch
from cases import assert_identical, prepared, snapshot
from storage_runs import BYTES, KINDS, LEAST, adamw, state_value, step, weight_value, weights

import fusedcalib
from fusedcalib.executors.eager import EagerExecutor

NONE = {"state_dtype": None, "master_weights": None}
# Names, and what a state may differ by: in bytes a signed one by 1/17 of itself or 2^-18 of its block's
# largest, one that is not negative by 1/24, or raised to 4.2e-7 of the largest; in bf16 by 2^-8.
STATES = {
    "parameter": ({"state_dtype": None}, 0.0),
    "float32": ({"state_dtype": "float32"}, 0.0),
    "bfloat16": ({"state_dtype": torch.bfloat16}, 2**-8),
    "bfloat16_stochastic": ({"state_dtype": "bfloat16_stochastic"}, 2**-8),
    "8bit": (BYTES, 1 / 17),
    "of each": ({"state_dtype": {"exp_avg": "8bit", "exp_avg_sq": "float32"}, **LEAST}, 1 / 17),
}
# Of states that are not in bytes; without one that is asked for it is their own.
BF16, F32 = {torch.bfloat16}, {torch.float32}
DTYPES = {"float32": F32, "bfloat16": BF16, "bfloat16_stochastic": BF16, "8bit": F32}
# What a weight may differ by, as a share of itself.
MASTERS = {"none": 2**-8, "split16": 0.0, "split8": 2**-16, "float32": 0.0}


def states_of(optimizer):
    params = optimizer.param_groups[0]["params"]
    return [{name: state_value(optimizer.state[p], name).clone() for name in KINDS} for p in params]


def weights_of(optimizer):
    return [weight_value(p, optimizer.state[p]) for p in optimizer.param_groups[0]["params"]]


def tensors_of(optimizer):
    return [id(t) for entry in optimizer.state.values() for key, t in entry.items() if key != "step"]


def change(optimizer, **options):
    """Has the coming step laid out with other options; returns whether tensors were exchanged by that."""
    before = tensors_of(optimizer)
    optimizer.param_groups[0].update(options)
    prepared(optimizer)
    return tensors_of(optimizer) != before


@pytest.mark.parametrize("after", STATES)
@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_are_converted_once(before, after, dtype):
    optimizer = adamw(weights(dtype), **STATES[before][0])
    step(optimizer, 1, 2)
    values, (options, limit) = states_of(optimizer), STATES[after]
    if after == "parameter" and dtype == torch.bfloat16:
        limit = 2**-8
    change(optimizer, **options)
    for was, now in zip(values, states_of(optimizer), strict=True):
        for name in KINDS:
            top = was[name].abs().max() if was[name].numel() else 0.0
            assert ((now[name] - was[name]).abs() <= limit * (was[name].abs() + 2**-14 * top)).all()
    assert not change(optimizer)
    kept = {entry[name].dtype for entry in optimizer.state.values() for name in KINDS if name in entry}
    assert kept == DTYPES.get(after, kept)
    if (before, after) == ("of each", "8bit"):
        assert_identical([v["exp_avg"] for v in states_of(optimizer)], [v["exp_avg"] for v in values])
    step(optimizer, 3)
    optimizer.param_groups[0]["maximize"] = True  # all is looked at again
    step(optimizer, 4)
    own = prepared(optimizer)._slots[0].recipe.keys
    assert {*optimizer.state[optimizer.param_groups[0]["params"][0]]} == {"step", *own}


def test_back_and_forth_keeps_bytes():
    """What was decoded is encoded to the same codes and scales."""
    optimizer = adamw(weights(), **BYTES)
    step(optimizer, 1, 2)
    before = snapshot(optimizer)
    assert change(optimizer, state_dtype="float32")
    assert not any("codes" in key for entry in optimizer.state.values() for key in entry)
    change(optimizer, state_dtype="8bit")
    assert_identical(snapshot(optimizer), before)


def test_a_dict_that_is_changed_in_place_is_seen():
    forms = {"exp_avg": "8bit"}
    optimizer = adamw(weights(), state_dtype=forms, **LEAST)
    step(optimizer, 1)
    optimizer.param_groups[0]["state_dtype"]["exp_avg_sq"] = "8bit"
    step(optimizer, 2)
    assert "exp_avg_sq_codes" in optimizer.state[optimizer.param_groups[0]["params"][0]]


@pytest.mark.parametrize("after", MASTERS)
@pytest.mark.parametrize("before", MASTERS)
def test_weights_are_converted_once(before, after):
    optimizer = adamw(weights(), master_weights=before)
    step(optimizer, 1, 2, 3)
    values = weights_of(optimizer)
    params = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    change(optimizer, master_weights=after)
    for was, now in zip(values, weights_of(optimizer), strict=True):
        assert ((now - was).abs() <= MASTERS[after] * was.abs()).all()
    if after == "none":
        assert_identical([p.detach() for p in optimizer.param_groups[0]["params"]], params)
    assert not change(optimizer)
    step(optimizer, 4)


@pytest.mark.parametrize("said", [True, 32, 24, None, False])
def test_groups_may_say_it_in_other_words(said):
    optimizer = adamw(weights(), master_weights="split16" if said in (None, False) else None)
    step(optimizer, 1)
    optimizer.param_groups[0]["master_weights"] = said
    step(optimizer, 2)
    assert not change(optimizer)
    shapes = [tuple(getattr(e.get("param_remainder"), "shape", ())) for e in optimizer.state.values()]
    assert shapes[0] == ((20, 100, 2) if said in (True, 32) else (20, 100) if said else ())


def test_bf16_parameters_of_an_fp32_run_begin_as_they_are():
    """fp32 -> split16 is exact: parameters and what is beside them make the very step of a copy."""
    runs = [adamw(params, master_weights=None) for params in [weights()]]
    step(runs[0], 1)
    runs.append(copy.deepcopy(runs[0]))
    for run, master in zip(runs, ("float32", "split16"), strict=True):
        run.param_groups[0]["master_weights"] = master
        step(run, 2, 3)
    assert_identical(weights_of(runs[1]), weights_of(runs[0]))


def test_nothing_stays_beside_the_parameters_of_a_rule_without_states():
    """Else it would be joined to other parameters later on."""
    optimizer = fusedcalib.SGD(weights(), lr=0.01, backend="eager", master_weights="split16")
    step(optimizer, 1)
    change(optimizer, master_weights="none")
    step(optimizer, 2)
    assert not any("param_remainder" in entry for entry in optimizer.state.values())
    values = [p.detach().float() for p in optimizer.param_groups[0]["params"]]
    change(optimizer, master_weights="split16")
    assert_identical(weights_of(optimizer), values)


BEFORE = {
    "float32": {"state_dtype": "float32", "master_weights": "float32"},
    "split16": {"state_dtype": "bfloat16", "master_weights": "split16"},
    "bytes": {**BYTES, "master_weights": "split8"},
}
each_before = pytest.mark.parametrize("before", BEFORE)
each_after = pytest.mark.parametrize("after", [{**NONE, "state_dtype": "float32"}, *BEFORE.values()], ids=str)


def ties(optimizer):
    """Weights half way between two bf16 numbers, which a copy and a remainder round otherwise."""
    for p, entry in optimizer.state.items():
        if "master_param" in entry:
            middle = (p.detach().float().view(torch.int32) | 0x8000).view(torch.float32)
            entry["master_param"].copy_(middle)
            p.detach().copy_(middle)
        elif entry["param_remainder"].ndim > p.ndim:
            entry["param_remainder"][..., 0::2], entry["param_remainder"][..., 1::2] = 255, 127
        else:
            entry["param_remainder"].fill_(128)


@each_after
@each_before
def test_a_step_that_fails_takes_conversions_back(before, after, monkeypatch):
    optimizer = adamw(weights(), **BEFORE[before])
    step(optimizer, 1, 2)
    ties(optimizer)
    kept, order = snapshot(optimizer), [list(entry) for entry in optimizer.state.values()]
    optimizer.param_groups[0].update(after)

    def fail(*_):
        raise MemoryError("no room for tables")

    with monkeypatch.context() as patch:
        patch.setattr(EagerExecutor, "prepare", fail)
        with pytest.raises(MemoryError):
            step(optimizer, 3)
    assert_identical(snapshot(optimizer), kept)
    assert [list(entry) for entry in optimizer.state.values()] == order
    step(optimizer, 3)
    assert optimizer._engine.undo is None  # which would keep what was converted


@each_after
@each_before
def test_a_step_that_is_left_out_takes_conversions_back(before, after):
    optimizer = adamw(weights(), skip_nonfinite=True, **BEFORE[before])
    step(optimizer, 1, 2)
    ties(optimizer)
    kept = snapshot(optimizer)
    optimizer.param_groups[0].update(after)
    params = optimizer.param_groups[0]["params"]
    params[1].grad = torch.full_like(params[1], math.inf)
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    assert_identical(snapshot(optimizer), kept)
    step(optimizer, 3)


@pytest.mark.parametrize(
    "wrong", [{"l1": -1.0}, {"state_dtype": "fp8"}, {"master_weights": "split"}], ids=str
)
@each_before
def test_a_wrong_option_leaves_state_as_it_was(before, wrong):
    optimizer = adamw(weights(), **BEFORE[before])
    step(optimizer, 1)
    kept = snapshot(optimizer)
    optimizer.param_groups[0].update({**BYTES, "master_weights": "split16", **wrong})
    with pytest.raises(ValueError, match=f"Invalid {next(iter(wrong))}"):
        step(optimizer, 2)
    assert_identical(snapshot(optimizer), kept)
