"""Variants of the kernels: each is another kernel, judged and timed; without a GPU by stand-ins."""

import json
import re
from dataclasses import asdict

import pytest
import torch
from kernel_cases import INTERPRETED, TRITON
from test_launch import Compiled, Driver, driver

import fusedcalib.executors.choose
from fusedcalib.bench import cli
from fusedcalib.bench.env import machine
from fusedcalib.bench.measure import timing
from fusedcalib.bench.measure.timing import Rounds, Sample, Spread
from fusedcalib.bench.measure.worker import LostError, Worker, WorkError
from fusedcalib.bench.repository import variants, variants_run
from fusedcalib.bench.repository.variants import VARIANTS
from fusedcalib.bench.repository.variants_run import Side, VariantRow, launch_with
from fusedcalib.executors.triton import decide as gpu_control
from fusedcalib.executors.triton import run as gpu
from fusedcalib.kernels import launch

pytest.importorskip("triton")
plain = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")
CPU = torch.device("cpu")
BY_NAME = {variant.name: variant for variant in VARIANTS}


def small(variant):
    """The same on few elements: as many columns, a row or two."""
    shapes = tuple((min(shape[0], 2), *shape[1:]) for shape in variant.shapes)
    return variant._replace(shapes=shapes)


def timed(steps, device, flush, seconds):
    """A timer of the CPU: one round."""
    samplers = {name: timing.wall_sampler(step, device) for name, step in steps.items()}
    return timing.interleave(samplers, rounds=1, seconds=seconds)


# -- each is another kernel


@pytest.fixture
def engine(monkeypatch):
    """Launches on the CPU in place of a GPU, which a kernel put in place of Triton's takes."""
    monkeypatch.setattr(gpu, "interpreted", lambda: True)
    monkeypatch.setattr(gpu_control, "backend", lambda: "cuda")
    fusedcalib.executors.choose.choose.cache_clear()
    yield monkeypatch
    fusedcalib.executors.choose.choose.cache_clear()


def stepped(variant, copy, kernel):
    """Takes a step whose kernels are `kernel(name, the kernel)`."""
    for part, found in copy.KERNELS.items():
        copy.KERNELS[part] = kernel(part, found)
    copy.norm_kernel = kernel("norm", copy.norm_kernel)
    Side(variant, copy, CPU).step()


def launches(variant, changes):
    """What a step launches: kernels with their grids and all that is compiled in."""
    found = []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **constants: found.append((self.name, grid, constants))

    stepped(variant, launch_with(changes), lambda name, kernel: Recorded(name))
    return found


def exchanged(variant):
    return [
        (module, name, value) for module, names in variant.changes.items() for name, value in names.items()
    ]


@plain
@pytest.mark.parametrize("name", BY_NAME)
def test_every_variant_differs_in_one_constant(name, engine):
    """Which it takes over, and which shows in what is launched, unless it is within the kernels."""
    variant = BY_NAME[name]
    ((module, constant, value),) = exchanged(variant)
    present = getattr(__import__(f"fusedcalib.kernels.{module}", fromlist=[constant]), constant)
    within = type(present).__name__ == "constexpr"
    assert (present.value if within else present) != value
    if not within:
        shapes = ((5000, 4096),) if module == "decide" else small(variant).shapes  # more tiles than programs
        fewer = variant._replace(shapes=shapes)
        assert launches(fewer, variant.changes) != launches(fewer, {})


CHANGED = {constant: v for v in reversed(VARIANTS) for _, constant, _ in exchanged(v)}
OFTEN = ("FLAT", "GRID", "NORM_BYTES")  # each compiles for a second and more


@plain
@pytest.mark.parametrize(
    "constant", [c if c in OFTEN else pytest.param(c, marks=pytest.mark.slow) for c in CHANGED]
)
def test_variants_compile_to_other_code(constant, engine):
    """For an H100; also where only a constant within the kernels has changed."""
    variant = small(CHANGED[constant])
    codes = []
    engine.setattr(driver, "_active", Driver())
    for changes in (variant.changes, {}):
        built = []

        class Kept(Compiled):
            def __getitem__(self, grid, built=built):
                call = super().__getitem__(grid)
                return lambda *args, **constants: built.append(call(*args, **constants))

        stepped(variant, launch_with(changes), lambda name, kernel, kept=Kept: kept(kernel, []))
        codes.append([kernel.asm["ptx"].partition(".entry")[2] for kernel in built])
    if constant == "GRID":  # more programs of the same kernel
        assert codes[0] == codes[1]
    else:
        assert codes[0] != codes[1]


def test_a_constant_that_is_not_there_is_refused():
    with pytest.raises(AttributeError, match="HINT"):
        launch_with({"rows": {"HINT": False}})


def test_the_present_kernels_stay_as_they_are():
    copy = launch_with({"spec": {"FLAT": (1, 2048, 8)}, "decide": {"GRID": 7}})
    assert copy.tile_for(1, 5000, False, 4).columns == 2048
    assert copy.programs_for(100) == 7
    assert launch.tile_for(1, 5000, False, 4).columns == 4096
    assert launch.programs_for(100) == 100
    with variants_run.engine_of(copy):
        assert gpu.launch is copy
    assert gpu.launch is launch


# -- judged and timed


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize(
    "name",
    [
        "no eviction hints, rows of 9216",
        "norm: a tile at once, bf16",
        "norm and step: forwards, 4M parameters",
    ],
)
def test_a_variant_is_judged_and_timed(backend, name, device):
    variant = BY_NAME[name]
    variant = variant._replace(shapes=((1, variant.shapes[0][1]), (3, 63)))
    row = variants_run.measured(variant, torch.device(device), 0.1, timed)
    assert row.reason is None
    assert row.ratio.n == 1
    assert row.flush == "write"
    assert all(row.ms.values())


PLAIN = variants_run.Variant("flat", {}, ((4, 5),), exact=True)


@pytest.fixture
def eager(monkeypatch):
    """Sides without kernels, and times that are made up: of the variant so much of the present one's."""
    monkeypatch.setattr(Side, "backend", "eager")

    def measured(variant, *ratios):
        rounds = Rounds()
        for ratio in ratios:
            rounds.add("present", Sample(1.0, 1.0))
            rounds.add("variant", Sample(ratio, ratio))
        return variants_run.measured(variant, CPU, 1.0, lambda *_: rounds)

    return measured


@pytest.mark.parametrize(
    ("ratios", "kept"),
    [((0.9,) * 9, True), ((0.8, 0.9, 1.0), False), ((0.99,) * 9, True), ((1.1,) * 9, False)],
)
def test_what_is_better_by_more_than_its_spread_is_kept(eager, ratios, kept):
    assert eager(PLAIN, *ratios).kept == kept


@pytest.mark.parametrize("side", ["present", "variant"])
def test_wrong_results_are_not_timed(eager, side, monkeypatch):
    made = []

    def wrong(self):
        made.append(self)
        if list(dict.fromkeys(made)).index(self) == ["present", "variant"].index(side):
            self.optimizer.param_groups[0]["lr"] = 2e-3
        self.optimizer.step()

    monkeypatch.setattr(Side, "step", wrong)
    row = eager(PLAIN, 0.5)
    assert row.kept is False
    assert row.reason.startswith(f"wrong result of the {side} kernels: ")


def test_other_bits_are_not_timed_where_sums_are_made_alike(eager, monkeypatch):
    def nudged(self, step=Side.step):
        step(self)
        if self._launch is not launch:
            with torch.no_grad():
                self.params[0][0, 0] = torch.nextafter(self.params[0][0, 0], torch.tensor(9.0))

    monkeypatch.setattr(Side, "step", nudged)
    assert eager(PLAIN, 0.5).reason == "1 tensors differ from those of the present kernels"
    assert eager(PLAIN._replace(exact=False), 0.5).kept


def test_few_bytes_are_flushed():
    assert BY_NAME["no eviction hints, rows of 9216"].moved == pytest.approx(28 * 2**25, rel=1e-3)
    assert Spread.of([1.0]) is not None


# -- the command


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["variants", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "fusedcalib variants: no GPU is here to measure on\n"
    assert not (tmp_path / "out").exists()


HEAD = machine.Head(1, "", None, None, None, {}, {})


def row(name, median=0.9):
    return VariantRow(name, median < 0.98, None, Spread(median, median - 0.01, median + 0.01, 9))


def test_what_breaks_costs_its_row_only(tmp_path):
    """Every row stands in the file as soon as it is there."""
    path = tmp_path / "variants.json"
    breaks = {
        "c": LostError("its process crashed, exit status -6"),
        "e": WorkError("E: out of registers\nmore"),
    }

    def call(work, name, seconds):
        if name in breaks:
            raise breaks[name]
        return row(name)

    rows = variants.collected(list("abcdef"), 100.0, path, HEAD, call)
    assert [r.name for r in rows] == list("abcdef")
    reasons = ["its process crashed, exit status -6", "E: out of registers"]
    assert [r.reason for r in rows if r.reason] == reasons
    assert json.loads(path.read_text()) == {**vars(HEAD), "rows": [asdict(r) for r in rows]}


def test_rows_without_time_say_so(monkeypatch, tmp_path):
    clock = iter([0.0, *[50.0] * 4, *[101.0] * 99])
    monkeypatch.setattr(variants.time, "monotonic", lambda: next(clock))
    rows = variants.collected(
        list("abcdef"), 100.0, tmp_path / "v.json", HEAD, lambda work, name, each: row(name)
    )
    assert [r.reason for r in rows] == [None] * 4 + ["no time was left"] * 2


def test_a_process_of_its_own_measures(tmp_path):
    """Where there is no GPU that is said of the row, and of the next one too."""
    worker = Worker(60.0)
    rows = variants.collected(list(BY_NAME)[:2], 100.0, tmp_path / "v.json", HEAD, worker.call)
    worker.close()
    assert all(re.match(r"(RuntimeError|AssertionError): ", r.reason) for r in rows)


def test_what_to_keep_is_said(capsys):
    variants.show([row("a"), row("b", 1.2), VariantRow("c", reason="crashed")])
    said = capsys.readouterr().out
    assert "to be kept: a\n" in said
    assert "crashed" in said
    variants.show([row("b", 1.2)])
    assert "no variant is better by more than its spread" in capsys.readouterr().out


def test_rows_are_chosen_by_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(machine, "describe", lambda device: HEAD)
    monkeypatch.setattr(Worker, "call", lambda self, work, name, each: row(name))
    assert cli.main(["variants", "--out", str(tmp_path), "--only", "^Adan"]) == 0
    names = [r["name"] for r in json.loads((tmp_path / "variants.json").read_text())["rows"]]
    assert names == [name for name in BY_NAME if name.startswith("Adan")] != []
    assert cli.main(["variants", "--out", str(tmp_path), "--only", "nothing"]) == 2
