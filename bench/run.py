"""Do all set-up, then run the main job: python3 bench/run.py [arguments of the job].

`python3 bench/run.py papers` does what the papers claim in miniature, `python3 bench/run.py cifar` trains
their networks on CIFAR. `python3 bench/run.py bench` times the step of any rule, `python3 bench/run.py plan`
says on paper what it costs on so many GPUs, `python3 bench/run.py profile` what its kernels take of one,
`python3 bench/run.py env` what is installed. Each has --help, and is `python -m fusedcalib ...` where all is
installed.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bootstrap
from commands import COMMANDS


def work(arguments: list[str]) -> int:
    python, variables = bootstrap.prepare("rich", "matplotlib", "scikit-learn")
    # Or else -m would put the current folder, which may be this one, before the standard library.
    variables["PYTHONSAFEPATH"] = "1"
    named = bool(arguments) and arguments[0] in COMMANDS
    module = COMMANDS[arguments[0]][0] if named else "bench.job"
    return run([python, "-m", f"fusedcalib.{module}", *arguments[named:]], variables)


def run(command: list[str], variables: dict[str, str]) -> int:
    """The exit status of a command, which Ctrl-C reaches too, and which may then have something to save."""
    process = subprocess.Popen(command, env=variables)
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            continue
        return code if code >= 0 else 128 - code


if __name__ == "__main__":
    bootstrap.main(work)
