"""The example trains alike in one process and in several, and goes on from one to the other."""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import fusedcalib

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "transformer"
LIMIT = 240  # seconds; a rank that waits for another for a minute gives up by itself
TINY = [
    *("--steps", "6", "--warmup", "2", "--log-every", "4", "--save-every", "3", "--noise", "0.01"),
    *("--layers", "2", "--width", "32", "--context", "32", "--batch", "8", "--dtype", "float64"),
    *("--backend", "eager", "--device", "cpu", "--data", str(ROOT / "fusedcalib")),
]
CENTRED = [*TINY, "--centralize"]

linux = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo"
)


def finished(commands):
    """The output of processes that run at the same time; none of them, nor any of theirs, outlives this."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": variables}
    processes = [subprocess.Popen(command, **options, start_new_session=True) for command in commands]
    try:
        outputs = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


def trained(ranks, folder, jobs):
    """The exit codes of trainings, one after the other, and what rank 0 has printed."""
    command = [sys.executable, str(Path(__file__).with_name("example_run.py"))]
    rest = [str(ranks), str(folder / f"store{ranks}"), json.dumps(jobs)]
    output = finished([[*command, str(rank), *rest] for rank in range(ranks)])[0]
    return json.loads(output.splitlines()[-1]), output


def launched(arguments):
    """By torchrun, as a user does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return finished([[*command, str(EXAMPLE / "train.py"), *arguments]])[0]


def out(folder, name):
    return ["--out", str(folder / name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of outputs, one for each training by one process or two."""
    folder = tmp_path_factory.mktemp("trainings")
    two = [
        [*CENTRED, *out(folder, "fsdp2-2"), "--parallel", "fsdp2"],
        [*CENTRED, *out(folder, "tp-2"), "--parallel", "tp"],
        [*TINY, *out(folder, "bad"), "--parallel", "fsdp2", "--batch", "7"],
        [*TINY, *out(folder, "bad"), "--parallel", "tp", "--heads", "1"],
        [*TINY, *out(folder, "bad"), "--parallel", "ddp", "--release", "--max-grad-norm", "0"],
    ]
    assert trained(2, folder, two)[0] == [0, 0, 2, 2, 2]
    one = [
        [*CENTRED, *out(folder, "1")],
        [*TINY, *out(folder, "1-plain")],
        [*TINY, *out(folder, "1-unclipped"), "--max-grad-norm", "0"],
        [*TINY, *out(folder, "1-released"), "--max-grad-norm", "0", "--release"],
        [*CENTRED, *out(folder, "fsdp2-2-resumed-1"), *after(folder, "fsdp2-2")],
        [*TINY, *out(folder, "bad"), "--resume", str(folder / "nowhere")],
        [*TINY, *out(folder, "bad"), *after(folder, "tp-2"), "--batch", "4"],
        [*TINY, *out(folder, "bad"), "--offload"],
    ]
    codes, output = trained(1, folder, one)
    assert codes == [0, 0, 0, 0, 0, 2, 2, 2]
    assert "train.py: AdamW: offload='states' needs kernels that reach the host's memory" in output
    assert f"--resume: no checkpoint in {folder / 'nowhere'}" in output
    assert "is of a training with --batch 8, not 4" in output
    return folder


@pytest.fixture(scope="module")
def more(folder):
    """The same folder with what torchrun starts, trainings by four processes, and what goes on from those."""
    launched([*CENTRED, *out(folder, "ddp-2")])
    four = [
        [*CENTRED, *out(folder, "fsdp2-tp-4"), "--parallel", "fsdp2-tp"],
        [*CENTRED, *out(folder, "tp-2-resumed-4"), "--parallel", "fsdp2-tp", *after(folder, "tp-2")],
    ]
    assert trained(4, folder, four)[0] == [0, 0]
    (folder / "store1").unlink(missing_ok=True)
    one = [[*CENTRED, *out(folder, "fsdp2-tp-4-resumed-1"), *after(folder, "fsdp2-tp-4")]]
    assert trained(1, folder, one)[0] == [0]
    return folder


def after(folder, name):
    return ["--resume", str(folder / name / "step-3")]


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@linux
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["fsdp2-2", "tp-2", "fsdp2-2-resumed-1"])
def test_ranks_train_as_one_process(folder, name):
    """In fp64 a gradient's elements, below 0.1, are off by 1e-17. AdamW divides that by 1e-8 at least, so a
    weight by 1e-9 of the learning rate, 3e-12, in each of 6 steps. 40,000 weights and a gradient of norm 4
    make of it at most 6 * 200 * 4 * 3e-12 = 1.4e-8 in the loss.
    """
    found, expected = rows(folder / name), rows(folder / "1")
    first = 4 if "resumed" in name else 1
    assert [row.get("step") for row in found] == [*range(first, 7), None]
    for row, of in zip(found, expected[first - 1 :], strict=True):
        assert row.keys() == of.keys()
        known = {key: value for key, value in of.items() if key != "tokens_per_s"}
        assert {key: row[key] for key in known} == pytest.approx(known, rel=0, abs=1.4e-8)
    assert found[-1]["held_out"] != found[-1]["held_out_average"]


@linux
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["ddp-2", "fsdp2-tp-4", "fsdp2-tp-4-resumed-1", "tp-2-resumed-4"])
def test_four_ranks_and_torchrun_train_as_one_process(more, name):
    test_ranks_train_as_one_process(more, name)


@linux
@pytest.mark.timeout(600)
def test_centring_changes_the_training(folder):
    """So that the curves above are not equal because it is off."""
    plain, centred = (rows(folder / name)[5]["loss"] for name in ("1-plain", "1"))
    assert abs(plain - centred) > 1e-5


@linux
@pytest.mark.timeout(600)
def test_gradients_that_are_released_train_alike(folder):
    """To the last bit; and unclipped it is another training than the clipped one."""
    names = ("step", "loss", "held_out", "held_out_average")
    released, kept, clipped = (
        [[row.get(name) for name in names] for row in rows(folder / name)]
        for name in ("1-released", "1-unclipped", "1-plain")
    )
    assert released == kept != clipped


def test_the_comparison_is_drawn_from_its_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("compare", EXAMPLE / "compare.py")
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    results = json.loads((EXAMPLE / "results" / "curves.json").read_text())
    assert results["curves"].keys() == {**compare.WAYS, **compare.EXACT}.keys()
    compare.draw(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.fixture
def memory(monkeypatch):
    """examples/transformer/memory.py, with two steps and one batch held out."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    module = importlib.import_module("memory")
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "HELD_OUT", 1)
    return module


@pytest.mark.parametrize("key", ["fp32", "seven", "sgd eight"])
def test_trainings_in_fewer_bytes_have_losses(memory, key):
    way = memory.WAYS[key]
    eager = way._replace(options={**way.options, "backend": "eager"})
    assert 4 < memory.train(eager, 0, memory.data.read(ROOT / "fusedcalib")) < 12


def test_the_page_has_the_table_of_the_results(memory):
    results = json.loads((memory.RESULTS / "memory.json").read_text())
    assert memory.with_table(memory.PAGE.read_text(), results) == memory.PAGE.read_text()
    assert {len(losses) for losses in results["held_out"].values()} == {len(results["held_out"]["fp32"])}
    assert results["held_out"].keys() == memory.WAYS.keys()


@pytest.fixture
def release(monkeypatch):
    """examples/transformer/release.py, with few steps of a smaller model."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    module = importlib.import_module("release")
    small = {
        "STEPS": 3,
        "ROUNDS": 2,
        "WARM": 1,
        "WIDTH": 64,
        "LAYERS": 2,
        "BUCKETS": (20_000, 1 << 20),
        "MANY": (20,),
    }
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "OPTIONS", {**module.OPTIONS, "backend": "eager"})
    monkeypatch.setattr(module.data, "read", lambda read=module.data.read: read(ROOT / "fusedcalib"))
    return module


def test_release_is_measured_and_told(release, monkeypatch, tmp_path):
    """Equal losses, fewer bytes, in the words of the page; what the repository has of it is no less so."""
    monkeypatch.setattr(release.fusedcalib, "AdamW", partial(fusedcalib.AdamW, backend="eager"))
    made = json.loads(json.dumps(release.run()))
    kept = json.loads((release.RESULTS / "release.json").read_text())
    assert release.with_words(release.PAGE.read_text(), kept) == release.PAGE.read_text()
    for results in (made, kept):
        runs = results["trainings"]
        assert len(runs["with"]["loss"]) == results["setting"]["steps"]
        assert runs["with"]["loss"] == runs["without"]["loss"]
    assert max(kept["trainings"]["with"]["live"]) < max(kept["trainings"]["without"]["live"])
    if importlib.util.find_spec("matplotlib"):
        release.draw(made, tmp_path / "release.png")
        assert (tmp_path / "release.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        importlib.import_module("train").parsed(["--release"])
