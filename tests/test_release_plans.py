"""Buckets are laid out once, and ask nothing of the parameters of others."""

import gc
import weakref

import pytest
import torch
from cases import assert_identical
from release_cases import Run

import fusedcalib
import fusedcalib.nn
from fusedcalib.engine import plan, plans
from fusedcalib.layout import counts

BUCKET = 16_500  # bytes: a matrix here has 16,384 in fp32, its bias 256


@pytest.fixture
def laid_out(monkeypatch):
    """How many parameters each plan has that is laid out from now on."""
    found = []
    init = plan.Plan.__init__

    def made(self, work, *rest):
        init(self, work, *rest)
        found.append(len(work.slots))

    monkeypatch.setattr(plan.Plan, "__init__", made)
    return found


def test_a_bucket_is_laid_out_once(laid_out):
    """Also where others have come since, with states of their own."""
    run = Run("NAdam", BUCKET)
    run.step(6)
    kept = run.optimizer._engine._plans
    assert len(laid_out) == len(kept._parts) + len(kept._kept)
    laid_out.clear()
    run.step(6)
    assert laid_out == []


def test_what_was_replaced_is_not_kept_by_the_plans_of_other_buckets(laid_out):
    """As states whose tensors were exchanged; and all is laid out anew once, not twice."""
    run = Run("AdamW", 0).step(3)
    state = weakref.ref(run.optimizer.state[run.model.seldom.weight]["exp_avg"])
    for entry in run.optimizer.state.values():
        entry["exp_avg"] = entry["exp_avg"].clone()
    run.step()
    gc.collect()
    assert state() is None
    laid_out.clear()
    run.step()
    assert laid_out == []


def test_so_many_plans_are_kept(monkeypatch, laid_out):
    monkeypatch.setattr(plans, "PARTS", 3)
    run = Run("AdamW", 0)
    run.step(4)
    assert len(run.optimizer._engine._plans._parts) == 3
    monkeypatch.setattr(plans, "PARTS", 100)
    run.step(3)
    laid_out.clear()
    run.step(3)
    assert laid_out == []
    assert_identical(run.left(), Run("AdamW", None).step(10).left())


def test_a_bucket_asks_nothing_of_the_others():
    """Once it is laid out, nothing walks over the parameters of a group."""
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(2)) for _ in range(200)])
    optimizer = fusedcalib.AdamW(model.parameters(), backend="eager")
    handle = fusedcalib.enable_gradient_release(model, optimizer, 0)
    looked = []

    class Watched(list):
        def __iter__(self):
            looked.append("all")
            return super().__iter__()

    optimizer.param_groups[0]["params"] = Watched(optimizer.param_groups[0]["params"])
    for often in (1, 0):
        looked.clear()
        model[7].sum().backward()
        assert model[7].grad is None
        assert bool(looked) == often
        optimizer.step()
    handle.remove()


def test_counters_take_free_places_before_they_move():
    """So that plans of other buckets go on with theirs."""
    kept = counts.Counters()
    entries = [{"step": torch.tensor(float(i))} for i in range(5)]
    buffer, places = kept.on_host("step", entries[:2], entries[:2], 4)
    views = [entry["step"] for entry in entries[:2]]
    again, more = kept.on_host("step", entries[1:4], entries, 4)
    assert again is buffer
    assert [*places, *more] == [0, 1, 1, 2, 3]
    assert [entry["step"] for entry in entries[:2]] == views
    assert buffer.tolist() == [0, 1, 2, 3]
    moved, _ = kept.on_host("step", entries[4:], entries, 4)
    assert moved is not buffer
    assert moved.tolist() == [0, 1, 2, 3, 4]
    assert all(entry["step"]._base is moved for entry in entries)
