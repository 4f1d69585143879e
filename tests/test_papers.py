"""The papers in miniature: that they run and judge; what they find takes minutes and is not run here."""

import pytest

pytest.importorskip("sklearn")
from fusedcalib.bench import papers


@pytest.fixture
def short(monkeypatch):
    """One epoch of a few images."""
    whole = papers.error_of
    monkeypatch.setattr(papers, "TRAIN", 40)
    monkeypatch.setattr(
        papers, "error_of", lambda make, seed, data, epochs, *rest: whole(make, seed, data, 1)
    )


@pytest.mark.parametrize("name", papers.EXPERIMENTS)
def test_runs(name, short):
    comparisons = papers.EXPERIMENTS[name](2)
    for comparison in comparisons:
        assert len(comparison.base) == len(comparison.other) == 2
        assert all(0 <= error <= 100 for error in (*comparison.base, *comparison.other))
        assert "expected" in str(comparison).lower()


def test_runs_again_as_before(short):
    assert papers.svgd(2) == papers.svgd(2)


def test_judgement():
    better = papers.Comparison("a, b", (5.0, 6.0, 7.0, 8.0), (4.0, 5.0, 5.0, 8.5), gain=0.5, wins=0.75)
    assert better.differences == [1.0, 1.0, 2.0, -0.5]
    assert better.won == 3
    assert better.holds
    assert str(better).startswith("a, b: 6.50 -> 5.62 % error, by 0.88 (se 0.52), not worse in 3 of 4: as")
    assert not papers.Comparison("a, b", better.base, better.other, gain=0.9).holds
    assert not papers.Comparison("a, b", better.base, better.other, wins=0.9).holds


def test_schedule():
    assert [papers.falling(part) for part in (0, 0.26, 0.3, 0.59, 0.6, 1)] == [1, 1, 0.5, 0.5, 0.1, 0.1]


def test_command(short, monkeypatch, capsys):
    found = [papers.Comparison("x", (2.0, 3.0), (1.0, 1.5))]
    monkeypatch.setattr(papers, "EXPERIMENTS", {"one": lambda: found})
    assert papers.main([]) == papers.main(["one"]) == 0
    assert capsys.readouterr().out.count("as expected") == 2
    found[:] = [papers.Comparison("x", (1.0, 1.0), (2.0, 3.0))]
    assert papers.main([]) == 1
    assert "NOT AS EXPECTED" in capsys.readouterr().out
    assert papers.main(["two"]) == 2
