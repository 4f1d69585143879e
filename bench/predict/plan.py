"""What a step costs on so many GPUs, on paper: bytes, launches, collectives and time.

python -m fusedcalib plan --model llama3-70b --gpus 512
python -m fusedcalib plan --model llama3-8b --dtypes split8+8bit --offload
python3 bench/run.py plan --model llama3-405b --gpus 512,4096,16384 --tp 8 --json plan.json --plot plan.png

From the real shapes of the parameters, laid out as torchtitan does. docs/scaling.md says what is counted and
what is assumed. No GPU is used or needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from ..measure.baselines import METHODS
from ..measure.method import SUBJECTS, NotAvailableError
from ..models import architectures, shardings
from ..models.architectures import Model
from ..models.shardings import Sharding
from ..report import tables
from ..report.data import write
from . import gpus, plan_steps
from .plan_results import Plan, PlannedStep, Plans, Setting

SWEPT = ("torch_fused", "own_plain", "eager_chain", "own_chain")  # the columns of a table over sizes
NOTE = (
    "On paper: bytes, launches and all-reduces are counted, times follow from published bandwidths and the "
    "assumptions in bench/predict/gpus.py; no GPU was measured. step = max(memory, host, link) + all-reduces."
)


def plan(
    model: Model, sizes: Sequence[Sharding], setting: Setting, names: Sequence[str] = plan_steps.ROWS
) -> Plans:
    """The plans of a model on each layout."""
    plans = [_plan(model, sharding, setting, names) for sharding in sizes]
    return Plans(**vars(setting), **model.facts, plans=plans)


def _plan(model: Model, sharding: Sharding, setting: Setting, names: Sequence[str]) -> Plan:
    found = shardings.shards(model, sharding)
    largest = sum(shard.elements * count for shard, count in found.items())
    balance = largest / model.count * sharding.fsdp * sharding.tp
    made = Plan(sharding.gpus, sharding, largest, balance, shardings.empty_somewhere(model, sharding))
    for name in names:
        try:
            step = plan_steps.step_of(name, SUBJECTS[setting.optimizer], setting.dtypes, found, sharding)
        except NotAvailableError as error:
            made.left_out[METHODS[name].title] = str(error)
        else:
            work = setting.gpu, setting.efficiency, setting.link
            time = gpus.time_of(step, len(model.params), sharding, *work)
            each = step.moved / largest
            made.steps.append(PlannedStep(**vars(step), moved_per_param=each, seconds=time, bound=time.bound))
    return made


# -- tables


def steps_table(found: Plan, link: float | None = None) -> tables.Table:
    """Each step on one layout; `link`: as of Setting."""

    def sent(step: PlannedStep) -> str:
        each = [one.bytes for one in step.collectives]
        return f"{len(each)} ({sum(each)})" if each else "0"

    columns: tables.Columns[PlannedStep] = {
        "step": lambda step: step.title,
        "bytes a parameter": lambda step: f"{step.moved_per_param:.1f}",
        "GB moved": lambda step: f"{step.moved / 1e9:.3g}",
        "launches": lambda step: str(step.launches),
        "all-reduces (bytes)": sent,
        "memory ms": lambda step: tables.milliseconds(step.seconds.memory),
        "host ms": lambda step: tables.milliseconds(step.seconds.host),
        "all-reduces ms": lambda step: tables.milliseconds(step.seconds.collectives),
        **(_LINK if link else {}),
        "step ms": lambda step: tables.milliseconds(step.seconds.total),
        "bound by": lambda step: step.bound,
    }
    return tables.table_of(found.steps, columns)


_LINK: tables.Columns[PlannedStep] = {
    "of it up, down": lambda step: f"{step.states_read / 1e9:.3g}, {step.states_written / 1e9:.3g}",
    "GB on the host": lambda step: f"{step.states_kept / 1e9:.3g}",
    "link ms": lambda step: tables.milliseconds(step.seconds.link),
}


def sizes_table(results: Plans) -> tables.Table:
    """The same steps on each number of GPUs."""
    memory = results.gpu.memory

    def kept(found: Plan) -> str:
        own = found.step("own_plain")
        assert own is not None
        size = results.on_gpu(own)
        return f"{size / 1e9:.3g}{' (too much)' * (size > memory)}"

    def away(found: Plan) -> str:
        own = found.step("own_plain")
        assert own is not None
        return f"{own.states_kept / 1e9:.3g}"

    def time_of(name: str) -> Callable[[Plan], str]:
        def cell(found: Plan) -> str:
            step = found.step(name)
            return f"{tables.milliseconds(step.seconds.total)} ({step.bound})" if step else "-"

        return cell

    columns: tables.Columns[Plan] = {
        "GPUs": lambda found: str(found.gpus),
        "split": lambda found: str(found.layout),
        "parameters on the fullest (of the mean)": lambda found: (
            f"{found.largest / 1e6:,.1f}M ({found.balance:.2f})"
        ),
        "tensors missing on the last": lambda found: str(found.empty),
        f"GB kept, of {memory / 1e9:.0f}": kept,
    }
    if results.link:
        columns["GB on the host, a GPU"] = away
    names = [name for name in SWEPT if any(found.step(name) for found in results.plans)]
    columns |= {f"{METHODS[name].title}: ms": time_of(name) for name in names}
    return tables.table_of(results.plans, columns)


def show(results: Plans) -> None:
    """Prints the tables."""
    print(results.title)
    if len(results.plans) > 1:
        tables.show(sizes_table(results))
    else:
        (found,) = results.plans
        print(found)
        tables.show(steps_table(found, results.link))
        for reason in dict.fromkeys(found.left_out.values()):
            names = [name for name, why in found.left_out.items() if why == reason]
            print(f"not counted: {', '.join(names)}: {reason}")
    print(NOTE)


# -- the command


def main(options: argparse.Namespace) -> int:
    model = architectures.chosen(options)
    asked = (options.fsdp, options.tp, options.replicate)
    sizes = [shardings.sharding_of(count, *asked) for count in options.gpus]
    link = options.link * 1e9 if options.offload else None
    setting = Setting(options.optimizer, options.dtypes, options.efficiency, gpus.GPUS[options.gpu], link)
    results = plan(model, sizes, setting)
    show(results)
    write(results, options.json)
    if options.plot:
        from . import plots

        plots.plan(results, options.plot)
    return 0
