"""Do all set-up, then run the main job: python3 bench/run.py [arguments of the job].

`python3 bench/run.py bench` times the step of any rule, `python3 bench/run.py plan` says on paper what it
costs on so many GPUs, `python3 bench/run.py profile` what its kernels take of one, `python3 bench/run.py env`
what is installed: as `python -m fusedcalib ...` where all is installed. `python3 bench/run.py papers` does
what the papers claim in miniature, `python3 bench/run.py cifar` trains their networks. Each has --help.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bootstrap
import cli


def work(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        print(cli.overview("python3 bench/run.py", cli.COMMANDS, cli.SCRIPTS))
        print("Without a command the job is run.")
        return 0
    python, variables = bootstrap.prepare("rich", "matplotlib", "scikit-learn")
    if arguments and arguments[0] in cli.SCRIPTS:
        file = bootstrap.ROOT / "examples" / "papers" / f"{arguments[0]}.py"
        return run([python, str(file), *arguments[1:]], variables)
    # Or else -m would put the current folder before the standard library.
    variables["PYTHONSAFEPATH"] = "1"
    job = [] if arguments and arguments[0] in cli.COMMANDS else ["job"]
    return run([python, "-m", "fusedcalib.bench.cli", *job, *arguments], variables)


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
