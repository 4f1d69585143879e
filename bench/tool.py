"""Times the step of any rule with any options on any parameter list, beside torch.optim's and others'.

python -m fusedcalib bench --quick
python -m fusedcalib bench --optimizer SGD --set momentum=0.9 --with clip,ema --model resnet50 --json out.json
python -m fusedcalib bench compare before.json after.json

docs/benchmarks.md says how to read the numbers.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import choose, compare, machine, progress, tables, timing
from .case import DTYPES, Case
from .clocks import Effort
from .runner import INTERRUPTED, Log, Run

DEFAULT_LISTS = {"cpu": "gpt2-small-cpu", "cuda": "gpt2-124m"}
ROUNDS, SECONDS = 40, 180.0
QUICK_ROUNDS, QUICK_SECONDS = 12, 40.0


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["compare"]:
        return compare.main(given[1:])
    options = _options(given)
    try:
        device = _device(options.device)
        cases = _cases(options, device)
        _check_files(options)
        _check_memory(cases, device)
    except (ValueError, OSError) as error:
        print(f"fusedcalib bench: {error}", file=sys.stderr)
        return 2
    try:
        return _measure(cases, device, options)
    except KeyboardInterrupt:  # while a table was made, say: what was measured before is written
        return INTERRUPTED


def _measure(cases: list[Case], device: torch.device, options: argparse.Namespace) -> int:
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    budget = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    log = Log()
    head = machine.describe(device)
    print(f"{machine.short_name(head)}; torch {torch.__version__}; {len(cases)} cases, {budget:g} s")
    with progress.showing() as tell:
        work = Run(head, device, options.json, print, tell)
        work.ceilings()
        for index, case in enumerate(cases):
            left = budget - log.seconds
            if work.interrupted or (index and left <= 0):
                work.more["left_out"].append(case.title)
                continue
            # Half for building, compiling and the gate; a GPU has two clocks.
            share = left / (len(cases) - index) / (4 if timing.on_gpu(device) else 2)
            measured = work.measure(case, Effort(rounds, max(1.0, share)))
            if measured is not None:
                _show(measured)
    return _finish(work, options)


def _show(measured: dict[str, Any]) -> None:
    tables.show(tables.full_table(measured), tables.case_title(measured))
    for line in tables.not_measured(measured):
        print(f"not measured: {line}")


def _finish(work: Run, options: argparse.Namespace) -> int:
    whole = work.save()
    if any(tables.was_disturbed(case) for case in work.done):
        print(f"{tables.DISTURBED} other programs were running: do not rely on such a number")
    for title in work.more["left_out"]:
        print(f"left out{'' if work.interrupted else ', the time was over (--seconds)'}: {title}")
    if work.interrupted:
        print("interrupted: incomplete")
    if options.plot and any(tables.base_of(case) for case in work.done):
        from . import plot_steps

        print(f"wrote {plot_steps.compared(whole, options.plot)}")
    if options.json:
        print(f"wrote {options.json}")
    for line in work.wrong():
        print(f"FAILED: {line}", file=sys.stderr)
    return work.status()


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU; use --device cpu, or a build of torch with CUDA")
    return machine.pick_device(name)


def _cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    """What is asked for.

    Raises:
        ValueError: something is asked for that there is not.
    """
    given = choose.options_from(options.set)
    features = choose.features_from(options.features, given)
    subjects = choose.subjects_from(options.optimizer or ["AdamW"], given)
    named = options.model or ([] if options.shapes or options.hf_config else [DEFAULT_LISTS[device.type]])
    lists = choose.lists_from(named, options.shapes, options.hf_config)
    against = options.against or list(choose.AGAINST)
    return choose.cases_from(subjects, lists, options.dtype or ["fp32"], features, against)


def _check_files(options: argparse.Namespace) -> None:
    """Before anything is measured, that what is measured can be written.

    Raises:
        ValueError: it cannot.
    """
    for flag, path in (("--json", options.json), ("--plot", options.plot)):
        if path and not path.resolve().parent.is_dir():
            raise ValueError(f"{flag} {path}: there is no folder {path.resolve().parent}; make it first")
        if path and not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
            raise ValueError(f"{flag} {path} cannot be written")
    if options.plot and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")


def _check_memory(cases: list[Case], device: torch.device) -> None:
    """Raises ValueError where a case is larger than the memory that is free."""
    free = machine.free_bytes(device)
    for case in cases:
        needed = choose.needed_bytes(case)
        if free is not None and needed > free:
            raise ValueError(
                f"{case.title} needs {needed / 1e9:.3g} GB for {len(case.methods)} methods, "
                f"{free / 1e9:.3g} GB are free: take a smaller --model, or fewer of them with --against"
            )


def _options(arguments: list[str]) -> argparse.Namespace:
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="fusedcalib bench",
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, about: str, **more: Any) -> None:
        parser.add_argument(name, help=about, **more)

    each: dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME"}
    file: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    add("--optimizer", "a rule, or several by --optimizer again (AdamW)", **each)
    add(
        "--set",
        "options of it, for all methods",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
    )
    add(
        "--with",
        f"also {', '.join(choose.FEATURES)}",
        type=_words,
        default=[],
        dest="features",
        metavar="A,B",
    )
    add("--model", "a parameter list, or several by --model again", **each)
    add("--shapes", 'another: JSON, [{"name", "shape"}, ...]', action="append", default=[], **file)
    add("--hf-config", "another: config.json of a llama-like model", action="append", default=[], **file)
    add("--dtype", "of parameters, gradients, states (fp32)", action="append", choices=list(DTYPES))
    add("--device", "(auto)", default="auto", choices=("auto", "cpu", "cuda"))
    add("--against", f"of {', '.join(choose.AGAINST)} (all)", type=_words, metavar="A,B")
    add("--quick", "few rounds, under two minutes on two cores", action="store_true")
    add("--seconds", f"for everything; begins no case after ({SECONDS:g})", type=_seconds)
    add("--rounds", f"of each case, at most ({ROUNDS})", type=_count)
    add("--json", "writes everything as data, after each case", **file)
    add("--plot", "draws the ratios", **file)
    return parser.parse_args(arguments)


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
