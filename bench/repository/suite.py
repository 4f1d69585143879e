"""The full suite: every list with a goal, written as one JSON file a run.

python3 bench/run.py suite [--out DIR] [--device auto|cpu|cuda] [--seconds S] [--limit S] [--only REGEX]

What does not fit in the time is left out and said; a case that breaks costs that case only, and
makes the exit status non-zero. With --limit so does one that hangs or crashes: cases are then measured in
another process.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..env import machine
from ..measure.baselines import CORE, RIVALS
from ..measure.case import Case
from ..measure.clocks import Effort
from ..measure.method import SUBJECTS
from ..measure.runner import Log, Run
from ..measure.worker import Worker
from ..report import tables
from ..report.results import Results
from . import goals

OWN = ("torch_fused", "own_plain", "own_gc")
WITH_EAGER = (*OWN, "eager_gc_fused")
COMPILED = ("torch_fused", "own_gc", "compiled_gc")
OFFLOADED = ("torch_fused", "own_plain", "own_offload")

# In the order of their worth: what comes last is left out first.
GPU_FIRST = (
    Case("gpt2-124m", (*CORE, "eager_gc_foreach", *RIVALS)),
    Case("small-1000", CORE),
    Case("1000x1024", OWN),
    Case("llama3-8b-layer-x1", WITH_EAGER),
    Case("llama3-8b-layer-x1", OWN, "bf16"),
    Case("llama3-8b-layer-x1", OWN, "bf16+fp32-state"),
    Case("long-rows-128k", OWN),
    Case("long-rows-4m", OWN),
    Case("aligned", OWN),
    Case("unaligned", OWN),
)
GPU_MORE = (
    Case("single-2^20", OWN),
    Case("single-2^26", OWN),
    Case("resnet50", WITH_EAGER),
    Case("10000x64", OWN),
    Case("split-10", OWN),
    Case("split-1000", OWN),
    Case("split-10000", OWN),
    Case("llama3-8b-layer-x4", OWN),
    Case("even-columns", OWN),
    Case("odd-columns", OWN),
    Case("groups-200", OWN),
    Case("depthwise", OWN),
    *(Case(f"single-2^{exponent}", OWN) for exponent in (10, 16, 28)),
    *(Case("llama3-8b-layer-x1", OFFLOADED, dtypes) for dtypes in ("bf16+fp32-state", "split8+8bit")),
)
# Last of all: compiling takes long and may fail.
GPU_COMPILED = tuple(Case(name, COMPILED) for name in ("llama3-8b-layer-x1", "small-1000"))
CPU_CASES = (
    Case("gpt2-small-cpu", (*CORE, "own_gc_eager", *RIVALS)),
    Case("small-1000", (*CORE, "own_gc_eager")),
    Case("tiny-1000", (*CORE, "own_gc_eager")),
    Case("gpt2-small-cpu", ("torch_fused", "eager_gc_fused", "own_plain", "own_gc"), "bf16"),
    Case("aligned", OWN),
    Case("unaligned", OWN),
)


def extras_case(extras: str, dtypes: str = "fp32", subject: str = "AdamW") -> Case:
    """A step with extras against the same composed, and what both cost."""
    methods = ("torch_fused", "own_plain", f"eager_{extras}", f"own_{extras}")
    return Case("gpt2-124m", methods, dtypes, subject, extras)


CHAIN_CASES = tuple(extras_case(extras) for extras in ("chain", "noise", "clip", "ema"))
GPU_CHAIN_CASES = (
    *CHAIN_CASES,
    extras_case("noise", "bf16"),
    extras_case("noise", "bf16", "SGD"),
)

RULE_METHODS = ("torch_fused", "torch_foreach", "own_plain", "own_gc")
RULE_LISTS = {"cpu": "gpt2-small-cpu", "cuda": "gpt2-124m"}


def rule_cases(device: torch.device) -> tuple[Case, ...]:
    """Every rule on one list; AdamW's case is in the others."""
    name = RULE_LISTS[device.type]
    return tuple(Case(name, RULE_METHODS, subject=subject) for subject in SUBJECTS if subject != "AdamW")


def cases_of(device: torch.device) -> tuple[Case, ...]:
    """All that are measured there, in their order."""
    if machine.on_gpu(device):
        return (*GPU_FIRST, *GPU_CHAIN_CASES, *GPU_MORE, *rule_cases(device), *GPU_COMPILED)
    return (*CPU_CASES, *CHAIN_CASES, *rule_cases(device))


def main(options: argparse.Namespace) -> int:
    device = machine.pick_device(options.device)
    cases = tuple(case for case in cases_of(device) if re.search(options.only, case.title))
    worker = Worker(options.limit) if options.limit else None
    return _suite(cases, device, options.out, options.seconds, worker)


def _suite(
    cases: tuple[Case, ...], device: torch.device, out: Path, seconds: float, worker: Worker | None = None
) -> int:
    log = Log()
    head = machine.describe(device)
    log(f"{head.short_name}, torch {torch.__version__}")
    effort = Effort(rounds=30, seconds=5) if machine.on_gpu(device) else Effort(40, 40)
    work = Run(head, device, out / head.file_name, log, finish=_finish, worker=worker)
    work.ceilings()
    log(f"memory: {work.results.ceil}")
    work.host()
    for case in cases:
        title = f"{case.title} ({len(case.methods)} methods)"
        if work.interrupted or log.seconds > seconds:
            work.results.left_out.append(title)
            continue
        log(title)
        short = replace(effort, seconds=effort.seconds / 4) if case.subject != "AdamW" else effort
        measured = work.measure(case, short)
        if measured is not None:
            tables.show(tables.case_table(measured))
            for line in measured.missing:
                print(f"    not measured: {line}", flush=True)
    if worker is not None:
        worker.close()
    return _say(work, log)


def _finish(whole: Results) -> None:
    whole.torch_mta = _multi_tensor(whole)
    whole.goals = goals.judge(whole)


def _say(work: Run, log: Log) -> int:
    """The goals, what is missing and what is wrong; returns the exit status."""
    whole = work.save()
    for goal in whole.goals:
        value = tables.number(goal.value)
        log(f"{goal.goal:>4} {goal.what:<48} {value:>8} target {goal.target:g}: {goal.met}")
    if whole.of_chains:
        tables.show(tables.chain_table(whole))
    for title in whole.left_out:
        log(f"left out{' by the interrupt' if work.interrupted else ' for want of time'}: {title}")
    for line in whole.wrong:
        log(f"FAILED: {line}")
    log(f"wrote {work.path}")
    return work.status()


def _multi_tensor(whole: Results) -> dict[str, Any] | None:
    """How much torch's fused kernel takes at once: 2^26 elements are 1024 blocks of 65,536."""
    row = whole.find("single-2^26", "torch_fused")
    if row is None or not row.launches:
        return None
    tensors, blocks = (36, 320) if row.launches >= 4 else (252, 2240)
    return {"max_tensors": tensors, "max_blocks": blocks, "how": "launch count observed"}
