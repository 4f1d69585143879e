"""Two runs compared: a regression is told from noise."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from bench_subjects import CPU

from fusedcalib import __main__ as command
from fusedcalib.bench.env import machine
from fusedcalib.bench.measure import case, compare
from fusedcalib.bench.report import results


def spread(median, width=0.05, n=30, disturbed=False):
    """`width`: from the median to the 90th percentile, as a share."""
    return results.Spread(median, median / (1 + width), median * (1 + width), n, disturbed)


HEAD = cache(lambda: machine.describe(CPU))


def run_of(own, others=None):
    """A file with one case: our ratio to torch's fused step, and perhaps another's."""
    rows = {"torch_fused": {}, "own_plain": own, "torch_foreach": others or spread(5.0)}
    methods = []
    for name, ratio in rows.items():
        ratios = {"torch_fused": ratio} if ratio else {}
        changed = {"wall_ms": 2.0, "ratio_to": ratios, "wall_ratio_to": ratios}
        methods.append(replace(case.empty_row(name), **changed))
    return results.assemble(HEAD(), {}, [results.Measured("x", 1, 8, "fp32", 28, "none", "wall", methods)])


def verdict(before, after, **more):
    found = {change.method: change for change in compare.changes(run_of(before), run_of(after), **more)}
    assert set(found) == {"fusedcalib", "torch foreach"}
    return found["fusedcalib"].verdict


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (spread(1.0), spread(1.0), compare.SAME),
        (spread(1.0), spread(1.2), compare.SLOWER),
        (spread(1.2), spread(1.0), compare.FASTER),
        (spread(1.0), spread(1.2, width=0.8, n=8), compare.SAME),
        (spread(1.0, width=0.8, n=8), spread(1.2), compare.SAME),
        (spread(1.0, width=0.001), spread(1.01, width=0.001), compare.SAME),
        (spread(1.0), spread(1.2, n=4), compare.UNKNOWN),
        (spread(1.0, disturbed=True), spread(1.2), compare.UNKNOWN),
    ],
    ids=["same", "slower", "faster", "noise", "noise-before", "too-little", "few", "disturbed"],
)
def test_verdicts(before, after, expected):
    assert verdict(before, after) == expected


def drawn(draw, median, rounds=30):
    """What a run with rounds of 10 % deviation would have found."""
    return results.Spread.of(list(median * np.exp(0.1 * draw.standard_normal(rounds))))


def test_noise_is_seldom_taken_for_a_change_and_a_change_seldom_for_noise():
    """Three standard errors: 0.3 % of like runs may differ, 2 % of them would be another rule.

    A fifth is more than the 2 % that count, and 2 * 3 standard errors of the difference of two medians of 30.
    """
    draw = np.random.default_rng(0)
    like = [verdict(drawn(draw, 1.0), drawn(draw, 1.0)) for _ in range(300)]
    assert sum(found != compare.SAME for found in like) <= 6
    slower = [verdict(drawn(draw, 1.0), drawn(draw, 1.2)) for _ in range(100)]
    assert sum(found == compare.SLOWER for found in slower) >= 95


def compared(tmp_path, before, after, *more):
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, found in zip(paths, (before, after), strict=True):
        results.save(found, path)
    return command.main(["bench", "compare", *map(str, paths), *more])


def test_a_regression_is_the_exit_status(tmp_path, capsys):
    assert compared(tmp_path, run_of(spread(1.0)), run_of(spread(1.2))) == 1
    assert "slower: fusedcalib (1.20)" in capsys.readouterr().out
    assert compared(tmp_path, run_of(spread(1.2)), run_of(spread(1.0))) == 0
    assert compared(tmp_path, run_of(spread(1.0)), run_of(spread(1.2)), "--least", "0.3") == 0


def test_another_librarys_change_is_said_and_no_failure(tmp_path, capsys):
    before, after = run_of(spread(1.0)), run_of(spread(1.0), spread(8.0))
    assert compared(tmp_path, before, after) == 0
    assert "not of ours, and also slower: torch foreach" in capsys.readouterr().out


def test_nothing_to_tell_is_no_success(tmp_path, capsys):
    busy = run_of(spread(1.0, disturbed=True))
    assert compared(tmp_path, busy, busy) == 2
    assert "nothing can be told" in capsys.readouterr().err


def changed(found, key, *inner, value):
    """The same with another value of a field, or of a key of it."""
    return replace(found, **{key: {**getattr(found, key), inner[0]: value} if inner else value})


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("versions", "torch"), "1.0", "torch ("),
        (("cpu", "threads"), 64, "the number of threads ("),
        (("cpu", "name"), "an abacus", "the processor ("),
        (("device",), {"name": "a GPU"}, "the GPU (None and a GPU)"),
    ],
)
def test_other_machines_are_refused_and_named(tmp_path, capsys, keys, value, message):
    before = run_of(spread(1.0))
    after = changed(before, *keys, value=value)
    assert compared(tmp_path, before, after) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "--force" in error
    assert compared(tmp_path, before, after, "--force") == 0
    assert message in capsys.readouterr().out


def test_files_that_cannot_be_compared(tmp_path, capsys):
    before = run_of(spread(1.0))
    assert compared(tmp_path, before, changed(before, "cases", value=[])) == 2
    assert "measure both with the same options" in capsys.readouterr().err
    (tmp_path / "before.json").write_text(json.dumps({"schema": 1}))
    assert command.main(["bench", "compare", *[str(tmp_path / "before.json")] * 2]) == 2
    assert "has no 'utc'" in capsys.readouterr().err
    assert command.main(["bench", "compare", "no-such.json", "no-such.json"]) == 2
    assert "no-such.json" in capsys.readouterr().err
