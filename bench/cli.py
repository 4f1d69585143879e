"""The commands of `python -m fusedcalib` and `python3 bench/run.py`, with all options of each.

Read also by a Python that has nothing installed: what a command needs is imported when it is asked for, and
`python3 bench/cli.py env` needs nothing at all. A command's function takes its options and returns the exit
status; where something is asked for that there is not, it raises a ValueError whose message is for the user.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = __package__ or "bench"
FILE: dict[str, Any] = {"type": Path, "metavar": "FILE"}
EACH: dict[str, Any] = {"action": "append", "default": []}
FLAG: dict[str, Any] = {"action": "store_true"}
DEVICE: dict[str, Any] = {"default": "auto", "choices": ("auto", "cpu", "cuda")}
Parser = argparse.ArgumentParser
Command = tuple[str, str, Callable[[Parser], None]]
Commands = Mapping[str, Command]
RESULTS = ROOT / "bench" / "results"


def words(text: str) -> list[str]:
    """Names between commas."""
    return [word for word in text.split(",") if word]


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def counts(text: str) -> list[int]:
    """Whole numbers above 0, between commas."""
    return [count(one) for one in text.split(",")]


def between(most: float, what: str) -> Callable[[str], float]:
    """A parser of numbers above 0 and up to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


seconds = between(sys.float_info.max, "a number of seconds above 0")
share = between(1.0, "a share above 0 and up to 1")


def named(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of names between commas, of which all are known."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(words(text)))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse


def _model(parser: Parser, default: str) -> None:
    """Which model a command is about: architectures.chosen reads it."""
    from .models.architectures import NAMES

    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default=default, help=f"{', '.join(NAMES)} ({default})")
    which.add_argument("--hf-config", help="config.json of a llama-like model", **FILE)
    which.add_argument("--shapes", help='JSON: [{"name", "shape"}, ...]', **FILE)


def _bench(parser: Parser) -> None:
    from .measure import choose, tool
    from .models.traffic import DTYPES

    each, add = {**EACH, "metavar": "NAME"}, parser.add_argument
    add("--optimizer", help="a rule, or several by --optimizer again (AdamW)", **each)
    pairs: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "NAME=VALUE"}
    add("--set", help="options of it, for all methods", **pairs)
    features: dict[str, Any] = {"type": words, "default": [], "dest": "features", "metavar": "A,B"}
    add("--with", help=f"also {', '.join(choose.FEATURES)}", **features)
    add("--model", help="a parameter list, or several by --model again", **each)
    add("--shapes", help='another: JSON, [{"name", "shape"}, ...]', **EACH, **FILE)
    add("--hf-config", help="another: config.json of a llama-like model", **EACH, **FILE)
    add("--dtype", help="of parameters, gradients, states (fp32)", action="append", choices=list(DTYPES))
    add("--device", help="(auto)", **DEVICE)
    add("--against", help=f"of {', '.join(choose.AGAINST)} (all)", type=words, metavar="A,B")
    add("--quick", help="few rounds, under two minutes on two cores", **FLAG)
    add("--seconds", help=f"for everything; begins no case after ({tool.SECONDS:g})", type=seconds)
    add("--rounds", help=f"of each case, at most ({tool.ROUNDS})", type=count)
    add("--json", help="writes everything as data, after each case", **FILE)
    add("--plot", help="draws the ratios", **FILE)


def _compare(parser: Parser) -> None:
    from .measure.compare import LEAST

    add = parser.add_argument
    add("before", type=Path, help="results file of `bench --json` or of the suite")
    add("after", type=Path, help="the same after a change")
    add("--least", type=float, default=LEAST, help=f"smallest change that counts ({LEAST})")
    add("--force", help="also where machine or torch differ", **FLAG)


def _plan(parser: Parser) -> None:
    from .measure.method import SUBJECTS
    from .models.traffic import DTYPES
    from .predict.gpus import GPUS, HOST_LINK

    _model(parser, "llama3-8b")
    add = parser.add_argument
    add("--gpus", type=counts, default=[8], help="how many, or several: 8,64,512 (8)")
    add("--fsdp", type=count, help="GPUs that share a copy's parts (what the others leave)")
    add("--tp", type=count, default=1, help="GPUs of tensor parallel (1)")
    add("--replicate", type=count, help="copies of the model, HSDP (1, or what --fsdp leaves)")
    add("--gpu", default="h100", choices=list(GPUS), help="(h100)")
    add("--efficiency", type=share, default=1.0, help="share of the published bandwidth (1)")
    add("--optimizer", default="AdamW", choices=list(SUBJECTS), help="(AdamW)")
    add("--dtypes", default="fp32", choices=list(DTYPES), help="(fp32)")
    add("--offload", help="our states in the host's memory", **FLAG)
    add("--link", type=between(1e6, "GB/s above 0"), default=HOST_LINK / 1e9, help="to the host (50 assumed)")
    add("--json", help="writes everything as data", **FILE)
    add("--plot", help="draws time over the number of GPUs", **FILE)


def _profile(parser: Parser) -> None:
    from .models.traffic import DTYPES
    from .predict.compiled import TARGETS
    from .predict.gpus import GPUS
    from .predict.profile import DEFAULT
    from .predict.profile_steps import OPTIONS

    _model(parser, "gpt2")
    add = parser.add_argument
    add("--arch", choices=list(TARGETS), help=f"compile for it ({DEFAULT}, if no GPU is here)")
    add("--gpu", choices=list(GPUS), help="whose bandwidth (the first of the architecture)")
    add("--optimizer", nargs="+", default=["AdamW"], help="names, or all (AdamW)")
    add("--options", type=named(OPTIONS), default=(), help=f"of {', '.join(OPTIONS)}")
    add("--everything", help="each once more with all that goes together", **FLAG)
    add("--dtypes", type=named(DTYPES), default=("fp32",), help=f"of {', '.join(DTYPES)}")
    add("--json", help="writes everything as data", **FILE)
    add("--plot", help="draws what binds each kernel", **FILE)
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--check", help="compare with the profile that is kept", **FLAG)
    kept.add_argument("--accept", help="write the profile that is kept anew", **FLAG)


def _storages(parser: Parser) -> None:
    from .predict.gpus import GPUS

    _model(parser, "gpt2")
    add = parser.add_argument
    add("--gpu", default="h200", choices=list(GPUS), help="(h200)")
    add("--plot", help="draws the figure of docs/memory.md", **FILE)


def _env(parser: Parser) -> None:
    parser.add_argument("--json", help="as data", **FLAG)


def _job(parser: Parser) -> None:
    add = parser.add_argument
    add("--seeds", type=count, help="trainings of each optimizer (8)")
    add("--out", type=Path, default=Path("out"), help="folder for the results")
    add("--quick", help="2 seeds and few rounds: a smoke test", **FLAG)
    add("--device", **DEVICE)


def _suite(parser: Parser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=RESULTS)
    add("--device", **DEVICE)
    add("--seconds", type=seconds, default=480.0, help="start no case after this")
    add("--limit", type=seconds, help="seconds for each case, in a process beside this one")
    add("--only", default="", help="regular expression for `list rule dtypes [with extras]`")


def _readme(parser: Parser) -> None:
    parser.add_argument("source", type=Path, nargs="?", help="a results file of the suite")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")


def _host(parser: Parser) -> None:
    parser.add_argument("--out", help="a file for the results, as JSON", **FILE)
    parser.add_argument("--each", help="only what it does for each tensor, as gpus.py has it", **FLAG)


def _steps(parser: Parser) -> None:
    from .repository.gpu_steps import WATCHED

    parser.add_argument("name", choices=("small", *WATCHED, "trace"))
    parser.add_argument("--out", type=Path, default=Path("trace.json.gz"), help="the trace")


def _variants(parser: Parser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where variants.json goes")
    add("--seconds", type=seconds, default=240.0, help="for all rows together (240)")
    add("--only", default="", metavar="REGEX", help="rows with such a name")


def _gpu(parser: Parser) -> None:
    from .repository.gpu import PARTS

    parser.prog = "bench/gpu.sh"
    add = parser.add_argument
    add("part", nargs="*", help=f"of {', '.join(PARTS)}; all three without")
    add("--only", default="", metavar="REGEX", help="of the groups of tests")
    add("--interpreted", help="a trial of check without a GPU", **FLAG)


# name: (module and function, what it does, its options)
USERS: Commands = {
    "plan": ("predict.plan.main", "what a step costs on so many GPUs, on paper", _plan),
    "bench": ("measure.tool.main", "times the step of any rule, beside torch.optim's and others'", _bench),
    "profile": ("predict.profile.main", "what its kernels take of a GPU, on paper or measured", _profile),
    "env": ("env.env.main", "versions, devices and what is missing here", _env),
}
OWN: Commands = {  # of the repository alone, by bench/run.py
    "job": ("repository.job.main", "trains on real digits, times the step, writes a report", _job),
    "suite": ("repository.suite.main", "every list that has a goal, as one file of results", _suite),
    "readme": ("repository.readme.main", "the README's benchmarks from such a file", _readme),
    "host": ("measure.host.main", "what the host does in a step of 1000 tensors", _host),
    "steps": ("repository.gpu_steps.main", "few steps on a GPU, for other tools to look at", _steps),
    "storages": ("predict.storages.main", "bytes and time of each way to keep AdamW", _storages),
    "variants": ("repository.variants.main", "kernels with other constants, on a GPU", _variants),
    "gpu": ("repository.gpu.main", "all that a machine with a GPU can tell: bench/gpu.sh", _gpu),
}
COMMANDS: Commands = {**USERS, **OWN}
COMPARE: Command = ("measure.compare.main", "what became slower or faster from one file to another", _compare)
SCRIPTS = {
    "papers": "what the papers claim, in miniature",
    "cifar": "trains their networks on CIFAR",
}


def overview(called: str, commands: Commands, more: Mapping[str, str] | None = None) -> str:
    """The commands, a line each."""
    known = {name: about for name, (_, about, _) in commands.items()}
    lines = [f"  {name:<9}{about}" for name, about in {**known, **(more or {})}.items()]
    return "\n".join([f"{called} COMMAND [arguments]; each has --help", *lines])


def main(arguments: Sequence[str] | None = None, commands: Commands | None = None) -> int:
    """Runs a command; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = COMMANDS if commands is None else commands
    if given[:1] in (["-h"], ["--help"]):
        print(overview("python -m fusedcalib", commands))
        return 0
    if not given or given[0] not in commands:
        said = f"there is no command {given[0]!r}" if given else "a command is missing"
        print(f"fusedcalib: {said}; the commands are {', '.join(commands)}", file=sys.stderr)
        return 2
    name, rest = given[0], given[1:]
    function, _, options = commands[name]
    if given[:2] == ["bench", "compare"]:
        name, rest, (function, _, options) = "bench compare", given[2:], COMPARE
    path, _, work = function.rpartition(".")
    try:
        module = import_module(f"{PACKAGE}.{path}")
        shown: dict[str, Any] = {
            "description": module.__doc__,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
        }
        parser = argparse.ArgumentParser(prog=f"fusedcalib {name}", **shown)
        options(parser)
        code: int = getattr(module, work)(parser.parse_args(rest))
        return code
    except ImportError as error:
        package = (error.name or "").partition(".")[0].replace("sklearn", "scikit-learn")
        print(f"fusedcalib {name}: this needs {package}: pip install {package}", file=sys.stderr)
    except (OSError, ValueError) as error:  # of what was asked for
        print(f"fusedcalib {name}: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    if __package__:
        sys.exit(main())
    sys.path.insert(0, str(ROOT))  # as a file: bench/gpu.sh, or python3 bench/cli.py env
    from bench import bootstrap, cli

    bootstrap.main(cli.main)
