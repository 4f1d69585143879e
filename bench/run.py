"""Do all set-up, then run the main job: python3 bench/run.py [arguments of the job].

`python3 bench/run.py papers` does what the papers claim in miniature, `python3 bench/run.py cifar` trains
their networks on CIFAR; each has --help.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bootstrap

OTHERS = ("papers", "cifar")


def work(arguments: list[str]) -> int:
    python, variables = bootstrap.prepare("rich", "matplotlib", "scikit-learn")
    # Or else -m would put the current folder, which may be this one, before the standard library.
    variables["PYTHONSAFEPATH"] = "1"
    name = arguments[0] if arguments[:1] and arguments[0] in OTHERS else "job"
    command = [python, "-m", f"fusedcalib.bench.{name}", *arguments[name != "job" :]]
    return subprocess.run(command, env=variables).returncode


if __name__ == "__main__":
    bootstrap.main(work)
