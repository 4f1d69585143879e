"""What bench/gpu.py runs on a GPU: the tests in their order, the measurements, the tools that explain.

What is likeliest to break, and says most when it does, comes first.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..bootstrap import ROOT
from .pool import Job

GROUP_SECONDS = 150.0  # a share of a file's tests; one that is stopped goes on behind the test that hung
PLUGIN = "outcomes_plugin"
CLI = ("fusedcalib.bench.cli",)
HANGS = 60  # seconds after which pytest writes where a test is


@dataclass(frozen=True)
class File:
    """A file of tests, in so many processes; `chosen`: by pytest's -k."""

    file: str
    shares: int
    chosen: str = ""


# Tests of kernels, those that are interpreted where there is no GPU: what says most comes first.
SHARES = {
    "test_kernels_rows": 2,
    "test_kernels": 12,
    "test_control": 6,
    "test_kernels_limits": 5,
    "test_row_totals": 2,
    "test_kernels_exact": 6,
    "test_kernels_noise": 3,
    "test_kernels_special": 8,
    "test_nn_branch": 2,
    "test_nn_virtual_kernel": 2,
    "test_nn_virtual_step": 1,
}
# With the other executors alone the tests are no news on a GPU; those of no executor may need one.
HERE = "triton or not (numba or eager)"
MARKS = re.compile(r"^from kernel_cases import .*\b(TRITON|FUSED|BACKENDS|matrix)\b", re.M)


def kernel_files() -> list[File]:
    """Every file that has the marks of such tests."""
    tests = ROOT / "tests"
    others = [path.stem for path in sorted(tests.glob("test_*.py")) if MARKS.search(path.read_text("utf-8"))]
    found = dict.fromkeys([*SHARES, *others])
    return [File(name, SHARES.get(name, 2), HERE) for name in found if name in others]


AROUND = (
    File("test_faults", 4),
    File("test_plans", 2),
    File("test_chain", 3),
    File("test_chain_skips", 2),
    File("test_chain_states", 3),
    File("test_chain_rounding", 2),
    File("test_noise", 3),
    File("test_contract", 4),
    File("test_contract_step", 4),
    File("test_contract_dtypes", 3),
    File("test_contract_gradients", 1),
    File("test_contract_checkpoints", 3),
    File("test_contract_changes", 3),
    File("test_contract_options", 3),
    File("test_contract_rules", 1),
    File("test_contract_schedulers", 2),
    File("test_contract_errors", 2),
    File("test_contract_arguments", 3),
)
CHECKERS = ("memcheck", "racecheck")
CASE_SECONDS = 90.0  # of the suite: what takes longer hangs, or compiles too long
LAST_SECONDS = 40.0  # before its end the suite begins no case
VARIANTS = ROOT / "bench" / "repository" / "variants.py"
# What Nsight Compute looks at: which kernel in which of the steps of gpu_steps.py.
WATCHED = {"norm": "norm_kernel", "flat": "step_kernel", "8192": "step_kernel", "14336": "step_kernel"}
SECTIONS = (
    *("SpeedOfLight", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables", "Occupancy"),
    *("LaunchStats", "SchedulerStats", "WarpStateStats"),
)


def checks(python: str, folder: Path, interpreted: bool = False) -> list[Job]:
    """The tests and the memory checkers, in their order.

    Args:
        folder: gets a file of outcomes for each, of the name that `outcomes_of` says.
        interpreted: kernels run in Triton's interpreter, where there is no GPU: a trial.
    """
    files = kernel_files()
    first = list(_shares(files[:2], python, folder))
    kernels = list(_shares(files[2:], python, folder))
    if interpreted:
        return [*first, *kernels]
    step = Job("first-step", (*_started(python), *CLI, "steps", "small"), 120)
    return [step, *first, *_checkers(python), *kernels, *_shares(AROUND, python, folder)]


def _started(python: str) -> tuple[str, ...]:
    """A module of Python, whose traceback is in the log when it is stopped."""
    return (python, "-X", "faulthandler", "-m")


def _shares(files: Iterable[File], python: str, folder: Path) -> Iterator[Job]:
    options = ["-q", "--tb=short", "--maxfail=40", "-o", f"faulthandler_timeout={HANGS}"]
    # Without those options in pyproject.toml that need a plugin.
    options += ["-o", "addopts=--strict-markers -p no:cacheprovider"]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "tests")]))
    # As many processes as cores: each has one thread, unless the user knows better.
    threads = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    for one in files:
        for number in range(1, one.shares + 1):
            name = f"{one.file} {number}/{one.shares}"
            plugin = ("-p", PLUGIN, "--outcomes", str(outcomes_of(folder, name)), "--share", name.split()[1])
            chosen = ("-k", one.chosen) if one.chosen else ()
            command = (*_started(python), "pytest", *plugin, *options, *chosen)
            variables = {"PYTHONPATH": path, **threads}
            yield Job(name, (*command, str(ROOT / "tests" / f"{one.file}.py")), GROUP_SECONDS, variables)


def outcomes_of(folder: Path, name: str) -> Path:
    """The file with what became of the tests of a job."""
    return folder / f"{name.replace(' ', '-').replace('/', '-of-')}.jsonl"


def has_outcomes(job: Job) -> bool:
    """Whether a job is a run of pytest that leaves them."""
    return PLUGIN in job.command


def _checkers(python: str) -> Iterator[Job]:
    sanitizer = tool("compute-sanitizer", python)
    for check in CHECKERS if sanitizer else ():
        options = ("--tool", check, "--error-exitcode", "9", "--target-processes", "application-only")
        # Memory that torch keeps for later is one block: reaching outside of a tensor would pass.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = (sanitizer, *options, *_started(python), *CLI, "steps", "small")
        yield Job(check, command, 200, variables)


def profile(python: str, out: Path, seconds: float) -> Job:
    """The kernels of a step, one by one."""
    options = ("--optimizer", "AdamW", "SGD momentum", "--everything", "--dtypes", "fp32,bf16")
    command = (*_started(python), "fusedcalib", "profile", *options, "--json", str(out / "profile.json"))
    return Job("profile", command, seconds)


def suite(python: str, out: Path, seconds: float) -> Job:
    """The benchmark suite; a case that it has begun may end, as a rule."""
    begin = max(10.0, seconds - LAST_SECONDS)
    options = ("--device", "cuda", "--out", str(out), "--seconds", f"{begin:.0f}")
    command = (*_started(python), *CLI, "suite", *options, "--limit", f"{CASE_SECONDS:.0f}")
    return Job("suite", command, seconds)


def variants(python: str, out: Path, seconds: float) -> Job:
    """Times the kernels' variants beside the present ones."""
    begin = min(240.0, 0.52 * seconds)
    command = (*_started(python), *CLI, "variants", "--out", str(out))
    return Job("variants", (*command, "--seconds", f"{begin:.0f}"), begin + 25)


def trace(python: str, out: Path) -> Job:
    """Ten steps of 1000 tensors."""
    path = str(out / "trace.json.gz")
    return Job("trace", (*_started(python), *CLI, "steps", "trace", "--out", path), 60)


def counters(python: str) -> list[Job]:
    """A step of each kind under Nsight Compute; none where that is missing."""
    ncu = tool("ncu", python)
    # Clocks stay as they are: holding them needs rights that few have.
    options = ["--profile-from-start", "off", "--clock-control", "none", "--print-details", "all"]
    for section in SECTIONS:
        options += ["--section", section]
    jobs = []
    for name, kernel in WATCHED.items() if ncu else ():
        command = (ncu, *options, "--kernel-name", f"regex:{kernel}", *_started(python))
        jobs.append(Job(f"ncu {name}", (*command, *CLI, "steps", name), 60))
    return jobs


def tool(name: str, python: str) -> str:
    """The path of one of CUDA's tools, from wherever they are installed to; "" where it is not."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    packages = Path(python).parents[1] / "lib" / "python*" / "site-packages" / "nvidia"
    places = [f"{home}/bin", f"{home}/compute-sanitizer", "/usr/local/cuda*/bin"]
    places += ["/usr/local/cuda*/compute-sanitizer", "/opt/nvidia/nsight-compute/*"]
    places += [f"{packages}/*/bin", f"{packages}/**/bin"]
    if found := shutil.which(name):
        return found
    for place in places:
        for path in sorted(glob.glob(f"{place}/{name}", recursive=True), reverse=True):
            if os.access(path, os.X_OK) and os.path.isfile(path):
                return path
    return ""
