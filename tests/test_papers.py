"""The papers in miniature: that they run and judge; what they find takes minutes and is not run here."""

import importlib.util
import json
import re
import subprocess
import sys
import types

import pytest

pytest.importorskip("sklearn")
import hilbert
import papers
import papers_page

from fusedcalib.bench.bootstrap import ROOT
from fusedcalib.bench.repository import readme

PAIR = ((5.0, 6.0, 7.0, 8.0), (4.0, 5.0, 5.0, 8.5))


@pytest.fixture
def short(monkeypatch):
    """One epoch of a few images, the test of a few more."""
    whole, load = papers.error_of, papers.digits.load
    monkeypatch.setattr(papers.digits, "load", lambda device: tuple(part[:100] for part in load(device)))
    monkeypatch.setattr(papers, "TRAIN", 40)
    monkeypatch.setattr(
        papers,
        "error_of",
        lambda make, seed, data, epochs, schedule=papers.constant, train=40: whole(
            make, seed, data, 1, schedule, min(train, 40)
        ),
    )


@pytest.fixture
def given(monkeypatch):
    """`given(...)`: these results in place of the experiments, in this process."""

    def put(*results):
        monkeypatch.setattr(papers, "EXPERIMENTS", {"one": lambda seeds=5: iter(results), "two": iter})

    return put


def run(folder, *arguments):
    code = papers.main([*arguments, "--out", str(folder), "--workers", "1"])
    return code, json.loads((folder / "papers.json").read_text())


# -- experiments ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in papers.EXPERIMENTS if name != "hilbert"])
def test_runs(name, short):
    found = papers.records_of(name, 2)
    assert len({record["title"] for record in found}) == len(found) > 0
    for record in found:
        assert record["experiment"] == name
        assert len(record["base"]) == len(record["other"]) == 2
        assert all(0 <= error <= 100 for error in (*record["base"], *record["other"]))


def test_runs_again_as_before(short):
    assert papers.records_of("svgd", 2) == papers.records_of("svgd", 2)


def test_both_sides_start_alike_and_part(short):
    """The same seed makes the same first weights; what is compared is what differs."""
    sides = [
        papers.centring("SGD", norm=True, centralize=on, lr=0.1, momentum=0.9)[1].param_groups[0][
            "centralize"
        ]
        for on in (False, True)
    ]
    assert sides == [False, True]
    norms = [
        sum(type(layer).__name__ == "BatchNorm2d" for layer in papers.centring("Adam", 0.1, norm, True)[0])
        for norm in (False, True)
    ]
    assert norms == [0, 3]
    for scale, layer in ((None, "Linear"), (0.1, "VirtualLinear")):
        model, optimizer = papers.virtual(scale, 0.1, norm=True, l1=1e-4)
        names = [type(part).__name__ for part in model]
        assert names == ["Flatten", *[layer, "BatchNorm1d", "ReLU"] * 4, layer]
        assert optimizer.param_groups[0]["l1"] == 1e-4
    model, optimizer = papers.zeros(None)
    assert not any(p.any() for p in model.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_published_losses_are_retraced():
    found = list(papers.retraces())
    assert [trace.title.split()[0] for trace in found] == list(hilbert.RUNS)
    assert all(trace.holds and trace.largest < 5e-7 for trace in found)
    off = papers.Retrace("x", (1.0, 2.0), (1.0, 2.0 + 4e-6))
    assert off.largest == pytest.approx(2e-6)
    assert not off.holds


def test_schedule():
    assert [papers.falling(part) for part in (0, 0.26, 0.3, 0.59, 0.6, 1)] == [1, 1, 0.5, 0.5, 0.1, 0.1]


# -- judgement --------------------------------------------------------------------------------


def test_a_comparison():
    one = papers.Comparison("a, b", *PAIR, papers.better(0.5, 0.75))
    assert one.differences == [1.0, 1.0, 2.0, -0.5]
    assert one.won == 3
    text = "a, b: 6.50 -> 5.62 % error, by 0.88 (se 0.52), not worse in 3 of 4: as expected"
    assert papers_page.line(one.record()) == text
    other = papers.Comparison("a, b", *PAIR, papers.worse())
    assert papers_page.line(other.record()).endswith("NOT AS EXPECTED")


@pytest.mark.parametrize(
    ("expected", "holds"),
    [
        (papers.better(), True),
        (papers.better(0.5, 0.75), True),
        (papers.better(0.9), False),
        (papers.better(wins=0.9), False),
        (papers.same(1.0), True),
        (papers.same(0.8), False),
        (papers.worse(), False),
        (papers.learns(4.5, 9.0), True),
        (papers.learns(5.5, 9.0), False),
        (papers.learns(4.5, 8.0), False),
    ],
    ids=lambda value: getattr(value, "words", str(value)),
)
def test_judgement(expected, holds):
    assert papers.Comparison("a, b", *PAIR, expected).holds is holds
    if expected.direction == "same":  # in both directions
        assert papers.Comparison("b, a", *PAIR[::-1], expected).holds is holds
    if expected.direction == "worse":
        assert papers.Comparison("b, a", *PAIR[::-1], expected).holds


# -- command ----------------------------------------------------------------------------------


def test_command(given, tmp_path, capsys):
    given(papers.Comparison("x", (2.0, 3.0), (1.0, 1.5)), papers.Retrace("y", (1.0,), (1.0,)))
    code, results = run(tmp_path, "one")
    assert code == 0
    assert capsys.readouterr().out.count("as expected") == 2
    assert {"versions", "utc", "commit", "cpu", "seconds"} < set(results)
    error, curve = results["comparisons"]
    assert (error["title"], error["base"], error["other"]) == ("x", [2.0, 3.0], [1.0, 1.5])
    assert error["holds"]
    assert error["expected"].startswith("better")
    assert curve["largest"] == 0
    assert (tmp_path / "papers.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_as_expected_fails(given, tmp_path, capsys):
    given(papers.Comparison("x", (1.0, 1.0), (2.0, 3.0)))
    code, results = run(tmp_path, "one")
    assert code == 1
    assert not results["comparisons"][0]["holds"]
    assert "NOT AS EXPECTED: x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["three"], "no experiment three"), (["gc", "--seeds", "1"], "at least 2"), (["--workers", "0"], "1")],
)
def test_arguments_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        papers.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_seeds_are_handed_on(monkeypatch):
    asked = []
    monkeypatch.setattr(papers, "EXPERIMENTS", {"a": lambda *seeds: asked.append(seeds) or iter(())})
    list(papers.in_turn(["a", "a"], 3, 1))
    list(papers.in_turn(["a"], None, 1))
    assert asked == [(3,), (3,), ()]


def test_workers_find_the_same():
    (alone,), (apart,) = (list(papers.in_turn(["hilbert"], None, workers)) for workers in (1, 2))
    assert alone == apart


# -- the page ---------------------------------------------------------------------------------


def test_page_and_results_agree():
    results, text = papers_page.load(papers_page.RESULTS), papers_page.PAGE.read_text()
    assert papers_page.page(results, text) == text
    assert {record["experiment"] for record in results["comparisons"]} == set(papers.EXPERIMENTS)


def test_what_differs_shows_on_the_page():
    results, text = papers_page.load(papers_page.RESULTS), papers_page.PAGE.read_text()
    results["comparisons"][0]["difference"] += 1
    assert papers_page.page(results, text) != text
    results["comparisons"][0]["holds"] = False
    assert f"Not as expected: {results['comparisons'][0]['title']}." in papers_page.page(results, text)


def test_title_says_what_was_found():
    results = papers_page.load(papers_page.RESULTS)
    counts = {"better": 0, "same": 0, "worse": 0}
    for record in results["comparisons"]:
        if record["kind"] == "errors":
            counts[record["direction"].replace("learns", "better")] += 1
    found = [int(n) for n in re.findall(r" in (\d+)", papers_page.title(results))]
    assert found == list(counts.values())
    results["comparisons"][0]["holds"] = False
    assert "1 NOT as expected" in papers_page.title(results)


def test_page_without_markers_is_left_alone(tmp_path, capsys):
    page = tmp_path / "nn.md"
    page.write_text("nothing")
    assert papers_page.main([str(papers_page.RESULTS), "--page", str(page)]) == 1
    assert page.read_text() == "nothing"
    assert papers_page.BEGIN in capsys.readouterr().err
    assert readme.insert("aXbYc", "new", ("X", "Y")) == "aX\n\nnew\n\nYc"


# -- bench/run.py -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["job"]),
        (["--quick"], ["job", "--quick"]),
        (["papers", "gc", "--seeds", "2"], ["papers", "gc", "--seeds", "2"]),
        (["cifar", "--data", "x"], ["cifar", "--data", "x"]),
        (["plan", "--gpus", "8"], ["plan", "--gpus", "8"]),
        (["--out", "papers"], ["job", "--out", "papers"]),
    ],
)
def test_run_py_passes_on(arguments, expected, monkeypatch):
    commands = []
    setup = types.SimpleNamespace(prepare=lambda *needed: ("python", {}), ROOT=ROOT)
    monkeypatch.setitem(sys.modules, "bootstrap", setup)
    monkeypatch.delitem(sys.modules, "cli", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda command, env: commands.append(command) or types.SimpleNamespace(wait=lambda: 3),
    )
    spec = importlib.util.spec_from_file_location("bench_run", ROOT / "bench" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.work(arguments) == 3
    script = str(ROOT / "examples" / "papers" / f"{expected[0]}.py")
    own = [script] if expected[0] in ("papers", "cifar") else ["-m", "fusedcalib.bench.cli", expected[0]]
    assert commands == [["python", *own, *expected[1:]]]
