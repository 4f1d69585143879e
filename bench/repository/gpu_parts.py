"""What bench/gpu.sh runs on a GPU: the tests in their order, the measurements, the tools that explain.

What is likeliest to break, and says most when it does, comes first.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..bootstrap import ROOT
from .pool import Job

GROUP_SECONDS = 150.0  # a share of a file's tests; one that is stopped goes on behind the test that hung
PLUGIN = "outcomes_plugin"
CLI = ("fusedcalib.bench.cli",)
HANGS = 60  # seconds after which pytest writes where a test is


# Files of tests, each in so many processes. First those of kernels, which are interpreted where there is no
# GPU, what says most before the others; then those around them.
KERNELS = """
    kernels_rows 2, kernels 12, control 6, kernels_limits 5, row_totals 2, kernels_exact 6, kernels_noise 3,
    kernels_special 8, nn_branch 2, nn_virtual_kernel 2, nn_virtual_step 1
"""
AROUND = """
    faults 4, plans 2, resident 1, chain 3, chain_skips 2, chain_states 3, chain_rounding 2, noise 3,
    contract 4, contract_step 4, contract_dtypes 3, contract_gradients 1, contract_checkpoints 3,
    contract_changes 3, contract_options 3, contract_rules 1, contract_schedulers 2, contract_errors 2,
    contract_arguments 3
"""
# With the other executors alone the tests are no news on a GPU; those of no executor may need one.
HERE = "triton or not (numba or eager)"
MARKS = re.compile(r"^from kernel_cases import .*\b(TRITON|FUSED|BACKENDS|matrix)\b", re.M)


def shares(table: str) -> dict[str, int]:
    """How many processes each file of a table has."""
    return {f"test_{name}": int(count) for name, count in map(str.split, table.split(","))}


def kernel_files() -> dict[str, int]:
    """Every file that has the marks of such tests."""
    tests, known = ROOT / "tests", shares(KERNELS)
    marked = [path.stem for path in sorted(tests.glob("test_*.py")) if MARKS.search(path.read_text("utf-8"))]
    return {name: known.get(name, 2) for name in dict.fromkeys([*known, *marked]) if name in marked}


CHECKERS = ("memcheck", "racecheck")
CASE_SECONDS = 90.0  # of the suite: what takes longer hangs, or compiles too long
LAST_SECONDS = 40.0  # before its end the suite begins no case
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
    files = list(kernel_files().items())
    first, kernels = (list(_shares(part, python, folder, HERE)) for part in (files[:2], files[2:]))
    if interpreted:
        return [*first, *kernels]
    step = Job("first-step", (*_started(python), *CLI, "steps", "small"), 120)
    return [step, *first, *_checkers(python), *kernels, *_shares(shares(AROUND).items(), python, folder)]


def _started(python: str) -> tuple[str, ...]:
    """A module of Python, whose traceback is in the log when it is stopped."""
    return (python, "-X", "faulthandler", "-m")


def _shares(files: Iterable[tuple[str, int]], python: str, folder: Path, chosen: str = "") -> Iterator[Job]:
    """The processes of these files; `chosen`: by pytest's -k."""
    options = ["-q", "--tb=short", "--maxfail=40", "-o", f"faulthandler_timeout={HANGS}"]
    # Without those options in pyproject.toml that need a plugin.
    options += ["-o", "addopts=--strict-markers -p no:cacheprovider", *(["-k", chosen] if chosen else [])]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "tests")]))
    # As many processes as cores: each has one thread, unless the user knows better.
    threads = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    for file, count in files:
        for share in (f"{number}/{count}" for number in range(1, count + 1)):
            name = f"{file} {share}"
            plugin = ("-p", PLUGIN, "--outcomes", str(outcomes_of(folder, name)), "--share", share)
            command = (*_started(python), "pytest", *plugin, *options, str(ROOT / "tests" / f"{file}.py"))
            yield Job(name, command, GROUP_SECONDS, {"PYTHONPATH": path, **threads})


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
