"""Do all set-up, then run the main job: python3 bench/run.py [arguments of the job]."""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bootstrap


def work(arguments: list[str]) -> int:
    python, variables = bootstrap.prepare("rich", "matplotlib", "scikit-learn")
    # Or else -m would put the current folder, which may be this one, before the standard library.
    variables["PYTHONSAFEPATH"] = "1"
    command = [python, "-m", "fusedcalib.bench.job", *arguments]
    return subprocess.run(command, env=variables).returncode


if __name__ == "__main__":
    bootstrap.main(work)
