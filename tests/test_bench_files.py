"""What the benchmark writes: results, report, README, figures; and the job that writes them."""

import copy
import json
import sys
from dataclasses import asdict, replace

import pytest
import torch
from bench_subjects import CPU

from fusedcalib.bench import cli
from fusedcalib.bench.bootstrap import ROOT
from fusedcalib.bench.env import machine
from fusedcalib.bench.measure import case, host
from fusedcalib.bench.report import results, tables
from fusedcalib.bench.repository import digits, goals, job, readme, report

# -- files ------------------------------------------------------------------------------------


SPREAD = results.Spread(0.9, 0.8, 1.1, 7)


def spread(median):
    return replace(SPREAD, median=median)


def method_row(name, ratios, **changed):
    numbers = {"wall_ms": 2.0, "kept": 7, "dropped": 1, "ratio_to": ratios, "wall_ratio_to": ratios}
    return replace(case.empty_row(name), **{**numbers, **changed})


@pytest.fixture
def data():
    """A run as data, as small as can be."""
    methods = [
        method_row("torch_fused", {}),
        method_row("own_plain", {"torch_fused": spread(1.25)}),
        method_row("own_gc", {"torch_fused": spread(0.9), "eager_gc_fused": spread(0.5)}),
        method_row("own_gc_eager", {"torch_fused": spread(9.0)}),
        replace(case.empty_row("apex"), reason="apex is not installed"),
    ]
    one = results.Measured("small-1000", 1000, 10_739_200, "fp32", 28, "none", "wall", methods)
    losses = [2.3 - 0.1 * i for i in range(20)]
    runs = {
        name: [digits.Run(losses, [40.0 + i + end for i in range(20)]) for _ in range(3)]
        for name, end in (("torch", 0.0), ("plain", 0.0), ("gc", 2.5))
    }
    ceil = {"copy_gbs": 10.0, "stream_4r3w_gbs": None, "how": "by hand"}
    return results.assemble(machine.describe(CPU), ceil, [one], e1=digits.summary(runs), seconds=1.0)


def checked(data):
    return results.read(json.loads(json.dumps(asdict(data))))


@pytest.fixture
def data_of_rules(data):
    """The same with a case of another rule on the same list."""
    methods = [
        method_row("torch_fused", {}, reason="torch.optim has no Lion", wall_ms=None, wall_ratio_to={}),
        method_row("own_plain", {"stream_3r2w": spread(1.07)}),
        method_row("own_gc", {"stream_3r2w": spread(1.3)}),
        case.empty_row("stream_3r2w"),
    ]
    data.cases.append(replace(data.cases[0], subject="Lion", bytes_per_param=20, methods=methods))
    return checked(data)


def test_rules_have_a_table_and_a_figure(data_of_rules, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "README.md"
    page.write_text(f"{readme.BEGIN}{readme.END}")
    readme.write(results.save(data_of_rules, tmp_path / "r.json"), page)
    text = page.read_text()
    assert "| Lion | 20 | - | - | 1.07 (0.80-1.10) | 1.30 (0.80-1.10) |" in text
    assert "| AdamW | 28 | 1.25 (0.80-1.10) | - | - | - |" in text
    (figure,) = tmp_path.glob("rules-*.png")
    assert f"({figure.name})" in text
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def data_of_chain(data):
    """The same with a step with extras, whose ratios are all others."""
    methods = [
        method_row("torch_fused", {}),
        method_row("own_plain", {"torch_fused": spread(7.0)}),
        method_row("eager_chain", {"torch_fused": spread(4.0), "own_plain": SPREAD}),
        method_row("own_chain", {"eager_chain": spread(0.25), "own_plain": SPREAD}),
    ]
    changed = {"list": "gpt2-124m", "extras": "chain", "bytes_per_param": 40, "methods": methods}
    one = replace(data.cases[0], **changed)
    data.cases[:0] = [replace(copy.deepcopy(one), subject="SGD", dtypes="bf16"), one]
    return checked(data)


def test_a_chain_has_a_table_and_a_figure(data_of_chain, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "README.md"
    page.write_text(f"{readme.BEGIN}{readme.END}")
    readme.write(results.save(data_of_chain, tmp_path / "r.json"), page)
    text = page.read_text()
    cells = "40 | 0.25 (0.80-1.10) | 0.90 (0.80-1.10) | 4.00 (0.80-1.10) |"
    row = f"clip, noise, GC, EMA | clip, noise, eager GC, EMA + torch fused | {cells}"
    assert f"\n| {row}" in text
    assert f"\n| SGD bf16: {row}" in text
    assert "7.00" not in text
    (figure,) = tmp_path.glob("chain-*.png")
    assert f"({figure.name})" in text
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_goals_know_a_chain_from_a_step(data_of_chain):
    values = {row.goal: row for row in goals.judge(data_of_chain)}
    assert values["C8"].value == 0.25
    assert values["C8"].met == "stretch"
    assert values["C6"].met == "not measured"
    assert data_of_chain.find("gpt2-124m", "own_plain") is None
    one = replace(data_of_chain, device={"name": "x"})
    values = {row.what: row.value for row in goals.judge(one)}
    assert values["clip, noise, GC, EMA / plain"] == 0.9
    assert values["EMA / plain"] is None
    assert values["plain / torch fused, gpt2-124m"] is None


def test_goals_are_of_adamw(data_of_rules):
    """A second case on the same list must not be taken for it."""
    data_of_rules.cases.reverse()
    assert data_of_rules.ratio("small-1000", "own_plain", "torch_fused").median == 1.25


def test_schema_holds_and_survives_the_file(data, tmp_path):
    path = results.save(data, tmp_path / "sub" / data.file_name)
    assert path.name.endswith("Z-cpu.json")
    assert results.load(path) == checked(data)
    assert data.device is None


def breakages():
    yield "no 'ceil'", lambda d: d.pop("ceil")
    yield "schema 2", lambda d: d.update(schema=2)
    yield "no 'title'", lambda d: d["cases"][0]["methods"][0].pop("title")
    yield "'host_us'", lambda d: d["cases"][0]["methods"][0].update(host_us="fast")
    yield "has a speed", lambda d: d["cases"][0]["methods"][1].update(reason="wrong")
    yield "no 'p90'", lambda d: d["cases"][0]["methods"][1]["ratio_to"]["torch_fused"].pop("p90")


@pytest.mark.parametrize(("message", "break_it"), list(breakages()))
def test_schema_refuses(data, message, break_it):
    broken = json.loads(json.dumps(asdict(data)))
    break_it(broken)
    with pytest.raises(ValueError, match=message):
        results.read(broken)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench" / "results").glob("**/*-cpu.json")), ids=lambda p: p.name
)
def test_files_that_are_kept_can_be_read(path):
    found = results.load(path)
    assert found.cases
    assert not found.disturbed


def test_trainings_and_host_times_that_are_kept_can_be_read():
    e1 = results.load(ROOT / "bench" / "results" / "digits" / "cpu.json").e1
    assert e1.gain.wins <= len(e1.seeds) == len(e1.curves["gc"].final)
    assert len(host.lines(host.kept("cpu").host)) == len(host.VARIANTS)


def test_nan_is_never_written(data, tmp_path):
    data.cases[0].methods[0].wall_ms = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        results.save(data, tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_report_tells_numbers_device_and_what_is_missing(data):
    text = report.text(data)
    assert "| fusedcalib with GC | 2 | 0.90 (0.80-1.10) | 7 | - |" in text
    assert "apex FusedAdam: apex is not installed" in text
    assert f"torch {torch.__version__}" in text
    assert "No GPU was used" in text
    assert "+2.5 points" in text
    assert "better on 3 of 3 seeds" in text


def test_readme_section_replaces_itself_only(data, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "README.md"
    page.write_text(f"top\n{readme.BEGIN}\nold\n{readme.END}\nbottom\n")
    source = results.save(data, tmp_path / "results" / "r.json")
    figure = readme.write(source, page)
    text = page.read_text()
    assert text.startswith("top\n")
    assert text.endswith("\nbottom\n")
    assert "old" not in text
    assert "1.25 (0.80-1.10) | 0.90 (0.80-1.10) | 0.50 (0.80-1.10) |" in text
    assert "Slower than torch's plain fused step: small-1000 fp32 without GC (1.25)" in text
    assert f"(results/{figure.name})" in text
    assert figure.read_bytes().startswith(b"\x89PNG")
    readme.write(source, page)
    assert page.read_text() == text


def test_readme_is_made_of_the_newest_run_of_the_suite(data, tmp_path, monkeypatch, capsys):
    """And of no other file that lies there, as bench/gpu.sh leaves some."""
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    assert cli.main(["readme"]) == 2
    assert "run the suite first" in capsys.readouterr().err
    for day in (1, 2):
        name = replace(data, utc=f"2030-01-0{day}T10:00:00Z").file_name
        results.save(data, tmp_path / "results" / name)
    (tmp_path / "results" / "profile.json").write_text("{}")
    chosen = []
    monkeypatch.setattr(readme, "write", lambda source, page: chosen.append(source.name))
    assert cli.main(["readme"]) == 0
    assert chosen == ["20300102T100000Z-cpu.json"]


@pytest.mark.parametrize("page", ["", readme.BEGIN, f"{readme.END}{readme.BEGIN}"])
def test_readme_without_markers_is_left_alone(data, tmp_path, page, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "README.md"
    file.write_text(page)
    source = results.save(data, tmp_path / "r.json")
    assert cli.main(["readme", str(source), "--readme", str(file)]) == 2
    assert "once each, in this order" in capsys.readouterr().err
    assert file.read_text() == page


def test_disturbed_numbers_are_marked_and_reach_no_goal(data):
    own = data.cases[0].methods[1].ratio_to["torch_fused"]
    own.median = 0.5
    met = {row.what: row.met for row in goals.judge(data)}
    assert met["plain / torch fused, small-1000"] == "stretch"
    assert met["% of stream, GC, gpt2-small-cpu"] == "not measured"
    own.disturbed = True
    met = {row.what: row.met for row in goals.judge(data)}
    assert met["plain / torch fused, small-1000"] == "not measured"
    assert tables.spread_text(own) == "~0.50 (0.80-1.10)"
    assert data.cases[0].disturbed


def test_goal_marks_are_ordered():
    for goal in (*goals.GPU, *goals.CPU):
        must, target, stretch = goal.marks
        assert must <= target <= stretch if goal.higher else must >= target >= stretch, goal.what
        assert goal.verdict(stretch) == "stretch"
        assert goal.verdict(must * (0.9 if goal.higher else 1.1)) == "missed"


# -- the job ----------------------------------------------------------------------------------


def test_job_without_its_libraries_says_one_sentence(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fusedcalib.bench.repository.job", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["job"]) == 2
    error = capsys.readouterr().err
    assert error == "fusedcalib job: this needs rich: pip install rich\n"


def test_job_writes_everything(data, monkeypatch, tmp_path):
    for name in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(name)
    monkeypatch.setattr(job, "_measure", lambda *given: data)
    assert cli.main(["job", "--out", str(tmp_path / "o"), "--device", "cpu"]) == 0
    files = sorted(file.name for file in (tmp_path / "o").iterdir())
    assert files == ["report.md", "results.json", "steps.png", "training.png"]
    data.cases[0].methods[2] = replace(case.empty_row("own_gc"), reason="wrong result")
    assert cli.main(["job", "--out", str(tmp_path / "o"), "--device", "cpu"]) == 1
