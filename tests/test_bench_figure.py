"""The figure of how AdamW is kept: its rows are counted and computed, and drawn as they are."""

from argparse import Namespace
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from matplotlib.colors import to_hex

from fusedcalib.bench.models import architectures
from fusedcalib.bench.models.architectures import Model, Param
from fusedcalib.bench.models.traffic import DTYPES, PUBLISHED
from fusedcalib.bench.predict import storages
from fusedcalib.bench.predict.gpus import GPUS
from fusedcalib.bench.predict.storages import Row
from fusedcalib.bench.report import style

MODEL = Model("m", (Param("w.weight", (64, 64)),))
H200 = GPUS["h200"]
ROWS = [
    Row("by bytes", True, 8.0, 14.0, 1.0, 0.5),
    Row("by instructions", True, 7.0, 12.0, 0.75, 1.25),
    Row("of others", False, 16.0, 28.0, 2.0),
]


@pytest.fixture
def drawn(monkeypatch):
    """The panels of what is drawn."""
    panels = []

    @contextmanager
    def recorded(*args, **options):
        with style.figure(*args, **options) as axes:
            panels.extend(axes)
            yield axes

    monkeypatch.setattr(storages, "figure", recorded)
    return panels


@pytest.fixture
def profiled(monkeypatch):
    """A profile without compiling: all move 7 bytes a parameter, and instructions take a millisecond."""

    def profile(cases, model, gpu_name):
        seconds = SimpleNamespace(issue=1e-3)
        found = [SimpleNamespace(dtypes=case.dtypes, seconds=seconds, moved_per_param=7.0) for case in cases]
        return SimpleNamespace(gpu=GPUS[gpu_name], cases=found)

    monkeypatch.setattr(storages.profile_static, "profile", profile)


def test_rows_are_multiples_of_an_all_bf16_step(profiled):
    found = storages.rows(MODEL, "h200")
    ours = [row for row in found if row.own]
    assert [row.title for row in ours] == list(storages.OURS.values())
    assert {row.by_bytes for row in ours} == {0.5}  # 7 of 14
    assert [row.by_instructions for row in ours] == pytest.approx([1e-3 / (14 * 4096 / 4.8e12)] * len(ours))
    assert [(row.kept, row.moved) for row in ours] == [
        (DTYPES[name].kept(2), DTYPES[name].moved(2)) for name in storages.OURS
    ]
    others = {row.title: row for row in found if not row.own}
    assert others.keys() == PUBLISHED.keys()
    for title, storage in PUBLISHED.items():
        row = others[title]
        assert (row.kept, row.moved) == (storage.kept(2), storage.moved(2))
        assert (row.by_bytes, row.by_instructions) == (storage.moved(2) / 14, None)


def test_bars_and_dots_are_where_the_rows_are(drawn, tmp_path):
    path = storages.draw(ROWS, MODEL, H200, tmp_path / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    left, right = drawn
    bars = [
        (round(bar.get_y() + bar.get_height() / 2), bar.get_width(), to_hex(bar.get_facecolor()))
        for bar in left.patches
    ]
    blue, grey = style.BLUE.lower(), style.SOFT
    assert bars == [  # the first row is the highest
        *((0, 16.0, grey), (0, 28.0, grey), (1, 7.0, blue), (1, 12.0, blue), (2, 8.0, blue), (2, 14.0, blue)),
    ]
    assert [label.get_text() for label in left.get_yticklabels()] == [row.title for row in ROWS[::-1]]
    assert [text.get_text() for text in left.texts] == ["16", "28", "7", "12", "8", "14"]
    assert [text.get_text() for text in right.texts] == ["2.00", "1.25", "0.75", "1.00"]


def test_only_where_instructions_take_longer_is_there_a_bar(drawn, tmp_path):
    storages.draw(ROWS, MODEL, H200, tmp_path / "figure.png")
    orange = [line for line in drawn[1].lines if to_hex(line.get_color()) == style.ORANGE.lower()]
    assert [[*line.get_xdata()] for line in orange] == [[0.75, 1.25]]
    dots = {
        (line.get_xdata()[0], to_hex(line.get_markerfacecolor()))
        for line in drawn[1].lines
        if line.get_marker() == "o"
    }
    green = style.GREEN.lower()
    assert dots == {(1.0, green), (0.75, green), (2.0, style.SOFT)}


def test_the_table_and_the_figure_are_of_the_model_that_is_asked_for(profiled, drawn, tmp_path, capsys):
    options = Namespace(
        model="gpt2", hf_config=None, shapes=None, gpu="h100", plot=tmp_path / "new" / "f.png"
    )
    assert storages.main(options) == 0
    assert options.plot.exists()
    said = capsys.readouterr().out
    assert "gpt2, AdamW, h100: computed, no GPU was measured" in said
    count = architectures.get("gpt2").count
    assert f"{1e-3 / (14 * count / 3.35e12):.2f}" in said
