"""Do all set-up, then pass the tests: python3 tests/run.py [--all | --quick] [arguments of pytest].

  --all     also what is marked "slow": whole trainings, papers, frameworks, every rank of a large mesh, of
            which the rest has one short run each. Without it the run takes some nine minutes of two cores.
  --quick   a smoke test in less than a minute: the contract of a step, the layout in memory, the
            references, the kernel with two rules. It says that nothing is badly broken, no more.
  --help    this.

All other arguments are pytest's (`python -m pytest --help`), as -x, -k, --durations=10, a file or a test.
Triton reads TRITON_INTERPRET when a kernel is decorated, so one process has one mode: where there
is no GPU, the tests marked "interpreted" run in processes of their own. That is done with -m, which
the arguments can therefore not use. Paths in them start at the root of the repository.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import bootstrap

OPTIONAL = ("numba", "scikit-learn", "hypothesis", "expecttest", "pytest-timeout", "pytest-benchmark")
OPTIONAL += ("accelerate", "pytorch-lightning", "pytest-xdist", "matplotlib")
SELECTED = {"plain": "not interpreted", "interpreted": "interpreted"}
# What --quick passes to pytest in each mode.
QUICK = {
    "plain": [
        *("tests/test_contract_step.py", "tests/test_plans.py", "tests/test_layout.py"),
        *("tests/test_reference.py", "tests/test_eager.py", "tests/test_scalars.py", "tests/test_groups.py"),
    ],
    "interpreted": ["tests/test_kernels.py", "-k", "recipe and (AdamW or Lion)"],
}
# Over two processes each. What one test of a file compiles serves the others; interpreted none does.
SPREAD = {
    "plain": ["-n2", "--dist=loadfile", "--no-loadscope-reorder"],
    "interpreted": ["-n2", "--dist=worksteal"],
}
NONE_COLLECTED = 5  # pytest's exit code


def work(arguments: list[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(__doc__)
        return 0
    whole, quick = "--all" in arguments, "--quick" in arguments
    arguments = [argument for argument in arguments if argument not in ("--all", "--quick")]
    python, variables = bootstrap.prepare("pytest")
    lacking = bootstrap.missing(*OPTIONAL) if python == sys.executable else []
    if lacking:
        print(f"{python} lacks {', '.join(lacking)}: tests that need one of them are skipped")
    environment = Path(python).parents[1]
    if (environment / bootstrap.STAMP).is_file():  # what one process compiles serves others and the next run
        variables = {"NUMBA_CACHE_DIR": str(environment / "cache")} | variables
    color = ["--color=yes"] if sys.stdout.isatty() else []
    # A file that cannot be imported is one failure, and keeps no other from running.
    command = [python, "-m", "pytest", *color, "--continue-on-collection-errors", *arguments]
    modes = list(SELECTED)
    if sys.platform != "linux" or bootstrap.gpu():
        print("no interpreted run: on a GPU the kernels run compiled, and only Linux has Triton")
        modes.remove("interpreted")
    commands = {}
    for mode in modes:
        marks = SELECTED[mode] if whole else f"{SELECTED[mode]} and not slow"
        commands[mode] = [*command, *(QUICK[mode] if quick else []), "-m", marks]
    spread = not (quick or arguments or "pytest-xdist" in lacking)
    with tempfile.TemporaryDirectory() as folder:
        codes = run(commands, variables, Path(folder), spread)
        outcomes = [outcome for mode in modes for outcome in read(Path(folder, f"{mode}.xml"))]
    code, line = verdict(codes, outcomes)
    print(line, flush=True)
    return code


def run(commands: dict[str, list[str]], variables: dict[str, str], folder: Path, spread: bool) -> list[int]:
    """The exit codes of pytest in each mode; both modes at the same time if there are two cores.

    With `spread` each mode has two processes: both cores have work until the last test, whichever mode
    takes longer.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    together = 1 < len(commands) <= cores
    processes = {}
    try:
        for mode, command in commands.items():
            # The interpreter is NumPy and Python, and has no use for more than one thread.
            threads = 1 if mode == "interpreted" else cores - together
            more = SPREAD[mode] if spread and together else []
            processes[mode] = start(mode, [*command, *more], threaded(variables, threads), folder)
            if not together:
                show(mode, processes[mode], folder)
        for mode in commands if together else []:
            show(mode, processes[mode], folder)
        return [process.wait() for process in processes.values()]
    finally:
        for process in processes.values():
            process.terminate()  # does nothing to one that has ended


def threaded(variables: dict[str, str], threads: int) -> dict[str, str]:
    """Processes that run at the same time must share the cores; who sets these knows better."""
    return {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)} | variables


def start(mode: str, command: list[str], variables: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    """pytest in one mode, which writes what it has to say into a file until its turn comes."""
    command = [*command, f"--junitxml={folder / mode}.xml"]
    variables = variables | ({"TRITON_INTERPRET": "1"} if mode == "interpreted" else {})
    with Path(folder, f"{mode}.txt").open("wb") as output:
        return subprocess.Popen(
            command, cwd=bootstrap.ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT
        )


def show(mode: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Print what the process wrote and goes on writing, until it has ended."""
    print(f"\n{mode} run:", flush=True)
    with Path(folder, f"{mode}.txt").open(encoding="utf-8", errors="replace") as output:
        ended = False
        while not ended:
            ended = process.poll() is not None  # before reading, or the last words could be missed
            print(output.read(), end="", flush=True)
            time.sleep(0 if ended else 0.1)


def read(report: Path) -> list[str]:
    """The outcome of each test in a JUnit report: "passed", "failed" or "skipped"."""
    from xml.etree import ElementTree

    outcome = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    cases = ElementTree.parse(report).iter("testcase") if report.exists() else []
    tags = ([child.tag for child in case if child.tag in outcome] for case in cases)
    return [outcome[found[0]] if found else "passed" for found in tags]


def verdict(codes: list[int], outcomes: list[str]) -> tuple[int, str]:
    """The exit code and the last line. It is fine if one mode of two had no test to run."""
    bad = [code for code in codes if code not in (0, NONE_COLLECTED)]
    code = bad[0] if bad else min(codes)
    count = Counter(outcomes)
    if bad and not count["failed"]:
        count["failed"] = 1  # a process that ended before it could report
    return code, ", ".join(f"{count[name]} {name}" for name in ("passed", "failed", "skipped"))


if __name__ == "__main__":
    bootstrap.main(work)
