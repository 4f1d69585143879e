"""The benchmark: its lists and its statistics. No speed is asserted anywhere."""

import time
from pathlib import Path

import pytest
import torch
from bench_subjects import CPU, quiet_machine, sampler_of

from fusedcalib.bench.measure import baselines, load, method, timing
from fusedcalib.bench.models import shapes, traffic
from fusedcalib.bench.repository import suite

# -- parameter lists --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "params"),
    [
        ("gpt2-124m", 148, 124_439_808),
        ("llama3-8b-layer-x1", 9, 218_112_000),
        ("llama3-8b-layer-x4", 36, 872_448_000),
        ("resnet50", 161, 25_557_032),
        ("small-1000", 1000, 10_739_200),
        ("1000x1024", 1000, 1_024_000),
        ("10000x64", 10_000, 640_000),
        ("split-10", 10, 100_000_000),
        ("split-1000", 1000, 100_000_000),
        ("split-10000", 10_000, 100_000_000),
        ("single-2^28", 1, 2**28),
    ],
)
def test_list_has_the_published_counts(name, tensors, params):
    spec = shapes.get(name)
    assert (spec.tensors, spec.params) == (tensors, params)


def test_cpu_list_is_large_enough_to_measure():
    assert shapes.get("gpt2-small-cpu").params >= 25_000_000


def test_unknown_list_is_named():
    with pytest.raises(KeyError, match="no-such-list"):
        shapes.get("no-such-list")


def test_build_offsets_views_and_separates_groups():
    spec = shapes.ParamList("views", ((4, 4), (4, 4)), group_each=True, offset=1)
    params = shapes.build(spec, CPU)
    for param in params:
        assert param.data_ptr() % 16 == 4
        assert param.grad.data_ptr() % 16 == 4
        assert param.is_leaf
    assert len(torch.optim.SGD(baselines.groups_of(spec, params)).param_groups) == 2


def test_every_case_of_the_suite_names_what_exists():
    for one in (*suite.cases_of(CPU), *suite.cases_of(torch.device("cuda"))):
        assert shapes.get(one.list).tensors
        assert one.subject in method.SUBJECTS
        assert set(one.methods) <= set(baselines.METHODS)
        assert one.dtypes in traffic.DTYPES
        assert one.extras in ("", *method.EXTRAS)


# -- statistics -------------------------------------------------------------------------------


def test_ratio_is_taken_within_a_round_and_not_of_medians(monkeypatch):
    quiet_machine(monkeypatch)
    drift = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    rounds = timing.interleave(
        {"a": sampler_of([3 * d for d in drift]), "b": sampler_of(drift)}, rounds=6, seconds=60
    )
    spread = rounds.ratio("a", "b")
    assert (spread.median, spread.p10, spread.p90, spread.n) == (3, 3, 3, 6)
    assert rounds.ratio("b", "a").median == pytest.approx(1 / 3)
    assert rounds.ratio("a", "missing") is None


def test_percentiles_are_of_the_ratios():
    spread = timing.Spread.of([float(value) for value in range(11)])
    assert (spread.median, spread.p10, spread.p90, spread.n) == (5, 1, 9, 11)
    assert timing.Spread.of([]) is None


def test_order_rotates():
    order = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    timing.interleave(samplers, rounds=3, seconds=60)
    assert "".join(order) == "abcbcacab"


def test_disturbed_samples_are_dropped_and_counted(monkeypatch):
    quiet_machine(monkeypatch)
    # Two anchors a round: apart by 20 % in the second of seven rounds, which must not count.
    anchors = [1.0, 1.0, 1.0, 1.2, *[1.0] * 10]
    times = [2.0, 50.0, *[2.0] * 5]
    rounds = timing.interleave(
        {"T": sampler_of(anchors), "m": sampler_of(times)}, rounds=7, seconds=60, anchor="T"
    )
    spread = rounds.ratio("m", "T")
    assert (rounds.kept("m"), rounds.dropped("m")) == (6, 1)
    assert (spread.median, spread.p90, spread.n, spread.disturbed) == (2, 2, 6, False)


def test_a_busy_machine_is_said_to_be_one(monkeypatch):
    monkeypatch.setattr(timing.Load, "of_others", lambda self: 0.5)
    samplers = {"T": sampler_of([1.0] * 20), "m": sampler_of([2.0] * 10)}
    start = time.monotonic()
    rounds = timing.interleave(samplers, rounds=6, seconds=0.4, anchor="T")
    assert rounds.ratio("m", "T").disturbed
    assert rounds.kept("m") == 0
    assert 0.2 <= time.monotonic() - start < 5  # it waited for quiet, and not for ever


def test_a_round_begins_when_the_machine_is_quiet(monkeypatch):
    monkeypatch.setattr(timing.Load, "of_others", sampler_of([0.5, 0.5, *[0.0] * 10]))
    monkeypatch.setattr(load, "GLANCE", 0.0)
    samplers = {"T": sampler_of([1.0] * 4), "m": sampler_of([2.0] * 2)}
    rounds = timing.interleave(samplers, rounds=2, seconds=60, anchor="T")
    assert rounds.kept("m") == 2


def test_time_limit_ends_the_rounds():
    samplers = {"a": lambda: 1.0}
    assert timing.interleave(samplers, rounds=10**9, seconds=0.01).kept("a") < 10**7


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell its load")
def test_own_work_is_no_load_of_others(monkeypatch):
    monkeypatch.setattr(timing.Load, "_read", sampler_of([(10.0, 5.0, 20.0), (12.0, 6.5, 24.0)]))
    assert timing.Load().of_others() == pytest.approx((2.0 - 1.5) / 4.0, abs=0.01)
