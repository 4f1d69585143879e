"""Plans of states that are offloaded: bytes that stay, go up and come down; time by the link."""

import json
import re
from pathlib import Path

import pytest
import torch
from plan_subjects import ALONE

from fusedcalib import __main__ as command
from fusedcalib.bench.measure import method
from fusedcalib.bench.models import architectures, shardings
from fusedcalib.bench.models.architectures import Model, Param
from fusedcalib.bench.models.traffic import DTYPES
from fusedcalib.bench.predict import gpus, plan, plan_results, plan_steps
from fusedcalib.rules.adam import AdamW

ADAMW = method.SUBJECTS["AdamW"]
MODEL = Model("m", (Param("0.fc.weight", (64, 128)), Param("1.fc.weight", (50, 100)), Param("2.bias", (9,))))
BESIDE = ("parameters", "gradients", "step", "total")


@pytest.mark.parametrize("dtypes", DTYPES)
def test_what_is_offloaded_is_what_a_real_optimizer_has_as_state(dtypes):
    """Each byte of it is read and written once; an fp32 copy beside a parameter too."""
    storage = DTYPES[dtypes]
    params = [torch.nn.Parameter(torch.randn(p.shape).to(storage.param)) for p in MODEL.params]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = AdamW(params, backend="eager", ema_decay=0.999, max_grad_norm=1.0, **storage.options)
    optimizer.step()
    states = sum(size for name, size in optimizer.state_bytes().items() if name not in BESIDE)
    step = plan_steps.step_of("own_chain", ADAMW, dtypes, shardings.shards(MODEL, ALONE), ALONE)
    assert (step.states_read, step.states_written, step.states_kept) == (states, states, states)
    weights = sum(p.numel() * p.element_size() for p in params)
    assert step.kept == states + 2 * weights
    assert step.moved == 2 * states + 4 * weights  # the gradient is read twice


def test_a_time_by_the_link():
    """1e9 parameters, fp32 states: 8 bytes up and 8 down."""
    kept = {"states_read": 8_000_000_000, "states_written": 6_000_000_000, "states_kept": 8_000_000_000}
    step = plan_steps.Step("own_plain", "", 28_000_000_000, 16_000_000_000, 1, (), **kept)
    h100 = gpus.GPUS["h100"]
    here, away = (gpus.time_of(step, 1, ALONE, h100, 1.0, link) for link in (None, 50e9))
    assert (here.link, here.bound) == (0, "memory")
    assert (away.link, away.bound) == (pytest.approx(0.16), "link")
    assert here.memory - away.memory == pytest.approx(14e9 / h100.bandwidth)
    assert away.total == away.link
    setting = plan_results.Setting(link=50e9)
    assert (setting.on_gpu(step), plan_results.Setting().on_gpu(step)) == (8_000_000_000, 16_000_000_000)


def test_a_figure_says_that_the_link_decides():
    pytest.importorskip("matplotlib")
    from fusedcalib.bench.predict import plots

    said = []
    for model, link in (
        (MODEL, 25e9),
        (architectures.get("llama3-8b"), None),
        (architectures.get("gpt2"), 25e9),
    ):
        found = plan.plan(model, [ALONE], plan_results.Setting(link=link), ["own_plain"])
        said.append(plots.plan_headline(found).partition(" is bound by the ")[2])
    assert said == ["host throughout", "memory throughout", "link to the host throughout"]


def test_torch_keeps_its_states_on_the_gpu():
    model = architectures.get("gpt2")
    settings = [plan_results.Setting(link=link) for link in (None, 25e9)]
    here, away = (plan.plan(model, [ALONE], setting).plans[0] for setting in settings)
    for name in plan_steps.ROWS:
        before, after = here.step(name).seconds, away.step(name).seconds
        assert (after == before) == (not name.startswith("own")), name
    own = away.step("own_plain")
    assert own.seconds.link == 8 * model.count / 25e9


PAGE = Path(__file__).resolve().parent.parent / "docs" / "memory.md"
NAMES = {  # of docs/memory.md
    "exact": "split16",
    "ten": "split16+bf16-state",
    "eight": "split16+8bit",
    "seven": "split8+8bit",
    "six": "bf16+8bit",
    "all bf16": "bf16",
    "all fp32": "fp32",
}


def test_the_page_has_the_bytes_and_times_that_are_computed():
    """Of 1e9 parameters of AdamW, all of whose rows are whole blocks."""
    section = PAGE.read_text().partition("## Keep states in host memory")[2].partition("\n## ")[0]
    rows = {}
    for line in re.findall(r"^\| (?!name|---)(.*) \|$", section, re.MULTILINE):
        title, *cells = line.replace("**", "").split(" | ")
        rows[title] = [float(number) for cell in cells for number in cell.split(", ")]
    assert [*rows] == [*NAMES]
    model = Model("m", (Param("0.fc.weight", (1_000_000, 960)),))
    for title, dtypes in NAMES.items():
        setting = plan_results.Setting(dtypes=dtypes, link=gpus.HOST_LINK)
        step = plan.plan(model, [ALONE], setting, ["own_plain"]).plans[0].step("own_plain")
        sizes = (setting.on_gpu(step), step.states_kept, step.states_read, step.states_written)
        expected = [*(size / model.count for size in sizes), 1e12 * step.seconds.link / model.count]
        assert rows[title] == pytest.approx(expected, abs=0.0051), title


def test_the_command(tmp_path, capsys):
    path = tmp_path / "plan.json"
    arguments = ["plan", "--model", "gpt2", "--gpus", "1", "--dtypes", "split8+8bit", "--offload"]
    assert command.main([*arguments, "--link", "20", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "our states on the host, 20 GB/s each way" in said
    assert "no GPU was measured" in said
    (step, *_) = json.loads(path.read_text())["plans"][0]["steps"]
    assert step["seconds"]["link"] == step["states_read"] / 20e9
    assert command.main(["plan", "--model", "gpt2", "--gpus", "1"]) == 0
    assert "on the host" not in capsys.readouterr().out
    assert command.main([*arguments[:4], "1,2", "--offload"]) == 0
    assert "0.996" in capsys.readouterr().out  # 8 bytes of each of 124 million
    with pytest.raises(SystemExit):
        command.main([*arguments, "--link", "0"])
    assert "is not GB/s above 0" in capsys.readouterr().err
