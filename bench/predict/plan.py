"""What a step costs on so many GPUs, on paper: bytes, launches, collectives and time.

python -m fusedcalib plan --model llama3-70b --gpus 512
python3 bench/run.py plan --model llama3-405b --gpus 512,4096,16384 --tp 8 --json plan.json --plot plan.png

From the real shapes of the parameters, laid out as torchtitan does. docs/scaling.md says what is counted and
what is assumed. No GPU is used or needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..measure.baselines import METHODS
from ..measure.method import SUBJECTS, NotAvailableError
from ..models import architectures, shardings
from ..models.architectures import Model
from ..models.shardings import Sharding
from ..report import tables
from . import gpus, plan_steps

Results = dict[str, Any]
SWEPT = ("torch_fused", "own_plain", "eager_chain", "own_chain")  # the columns of a table over sizes


@dataclass(frozen=True)
class Setting:
    """What is the same on any number of GPUs."""

    optimizer: str = "AdamW"
    dtypes: str = "fp32"
    gpu: str = "h100"
    efficiency: float = 1.0


def plan(
    model: Model, sizes: Sequence[Sharding], setting: Setting, names: Sequence[str] = plan_steps.ROWS
) -> Results:
    """The plans of a model on each layout, as data: numbers in bytes and seconds.

    Raises:
        ValueError: a layout does not fit the model.
    """
    return {
        "model": model.name,
        "params": model.count,
        "tensors": len(model.params),
        **vars(setting),
        "gpu": gpus.GPUS[setting.gpu]._asdict(),
        "plans": [_plan(model, sharding, setting, names) for sharding in sizes],
    }


def _plan(model: Model, sharding: Sharding, setting: Setting, names: Sequence[str]) -> dict[str, Any]:
    found = shardings.shards(model, sharding)
    largest = sum(shard.elements * count for shard, count in found.items())
    steps, left_out = [], {}
    for name in names:
        try:
            step = plan_steps.step_of(name, SUBJECTS[setting.optimizer], setting.dtypes, found, sharding)
        except NotAvailableError as error:
            left_out[METHODS[name].title] = str(error)
        else:
            steps.append(_priced(step, len(model.params), largest, sharding, setting))
    return {
        "gpus": sharding.gpus,
        "layout": sharding._asdict(),
        "largest": largest,
        "balance": largest / model.count * sharding.fsdp * sharding.tp,
        "empty": shardings.empty_somewhere(model, sharding),
        "steps": steps,
        "left_out": left_out,
    }


def _priced(
    step: plan_steps.Step, tensors: int, largest: int, sharding: Sharding, setting: Setting
) -> dict[str, Any]:
    gpu = gpus.GPUS[setting.gpu]
    time = gpus.time_of(step, tensors, sharding, gpu, setting.efficiency)
    return {
        "name": step.name,
        "title": step.title,
        "moved": step.moved,
        "moved_per_param": step.moved / largest,
        "kept": step.kept,
        "launches": step.launches,
        "collectives": [sent._asdict() for sent in step.collectives],
        "seconds": {**time._asdict(), "total": time.total},
        "bound": time.bound,
    }


# -- tables


def steps_table(found: dict[str, Any]) -> tables.Table:
    """Each step on one layout."""

    def sent(step: Results) -> str:
        each = [one["bytes"] for one in step["collectives"]]
        return f"{len(each)} ({sum(each)})" if each else "0"

    columns: tables.Columns[Results] = {
        "step": lambda step: step["title"],
        "bytes a parameter": lambda step: f"{step['moved_per_param']:.1f}",
        "GB moved": lambda step: f"{step['moved'] / 1e9:.3g}",
        "launches": lambda step: str(step["launches"]),
        "all-reduces (bytes)": sent,
        "memory ms": lambda step: tables.milliseconds(step["seconds"]["memory"]),
        "host ms": lambda step: tables.milliseconds(step["seconds"]["host"]),
        "all-reduces ms": lambda step: tables.milliseconds(step["seconds"]["collectives"]),
        "step ms": lambda step: tables.milliseconds(step["seconds"]["total"]),
        "bound by": lambda step: step["bound"],
    }
    return tables.table_of(found["steps"], columns)


def sizes_table(results: Results) -> tables.Table:
    """The same steps on each number of GPUs."""
    memory = results["gpu"]["memory"]

    def kept(found: Results) -> str:
        own = _step(found, "own_plain")
        assert own is not None
        return f"{own['kept'] / 1e9:.3g}{' (too much)' * (own['kept'] > memory)}"

    def time_of(name: str) -> Callable[[Results], str]:
        def cell(found: Results) -> str:
            step = _step(found, name)
            return f"{tables.milliseconds(step['seconds']['total'])} ({step['bound']})" if step else "-"

        return cell

    columns: tables.Columns[Results] = {
        "GPUs": lambda found: str(found["gpus"]),
        "split": lambda found: str(Sharding(**found["layout"])),
        "parameters on the fullest (of the mean)": lambda found: (
            f"{found['largest'] / 1e6:,.1f}M ({found['balance']:.2f})"
        ),
        "tensors missing on the last": lambda found: str(found["empty"]),
        f"GB kept, of {memory / 1e9:.0f}": kept,
    }
    names = [name for name in SWEPT if any(_step(found, name) for found in results["plans"])]
    columns |= {f"{METHODS[name].title}: ms": time_of(name) for name in names}
    return tables.table_of(results["plans"], columns)


def _step(found: Results, name: str) -> Results | None:
    return next((step for step in found["steps"] if step["name"] == name), None)


def title(results: Results) -> str:
    return (
        f"{results['model']}: {results['params'] / 1e9:.4g}B parameters in {results['tensors']} tensors, "
        f"{results['optimizer']}, {results['dtypes']}, {results['gpu']['name']} at "
        f"{results['efficiency'] * results['gpu']['bandwidth'] / 1e12:.3g} TB/s"
    )


def split(found: dict[str, Any]) -> str:
    """The layout of a plan in a line."""
    return (
        f"{found['gpus']} GPUs ({Sharding(**found['layout'])}): {found['largest']} parameters on the "
        f"fullest, {found['balance']:.2f} of the mean; {found['empty']} tensors have no element on the last"
    )


NOTE = (
    "On paper: bytes, launches and all-reduces are counted, times follow from published bandwidths and the "
    "assumptions in bench/predict/gpus.py; no GPU was measured. step = max(memory, host) + all-reduces."
)


def show(results: Results) -> None:
    """Prints the tables."""
    print(title(results))
    if len(results["plans"]) > 1:
        tables.show(sizes_table(results))
    for found in results["plans"] if len(results["plans"]) == 1 else ():
        print(split(found))
        tables.show(steps_table(found))
        for reason in dict.fromkeys(found["left_out"].values()):
            names = [name for name, why in found["left_out"].items() if why == reason]
            print(f"not counted: {', '.join(names)}: {reason}")
    print(NOTE)


# -- the command


def main(options: argparse.Namespace) -> int:
    model = architectures.chosen(options)
    asked = (options.fsdp, options.tp, options.replicate)
    sizes = [shardings.sharding_of(gpus, *asked) for gpus in options.gpus]
    setting = Setting(options.optimizer, options.dtypes, options.gpu, options.efficiency)
    results = plan(model, sizes, setting)
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        from . import plots

        plots.plan(results, title(results), options.plot)
    return 0
