"""What a step costs on so many GPUs, on paper: bytes, launches, collectives and time.

python -m fusedcalib plan --model llama3-70b --gpus 512
python3 bench/run.py plan --model llama3-405b --gpus 512,4096,16384 --tp 8 --json plan.json --plot plan.png

From the real shapes of the parameters, laid out as torchtitan does. docs/scaling.md says what is counted and
what is assumed. No GPU is used or needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import architectures, layouts, plan_costs, plan_steps, tables
from .architectures import Model
from .baselines import METHODS, SUBJECTS, NotAvailableError
from .case import DTYPES
from .layouts import Layout

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
    model: Model, sizes: Sequence[Layout], setting: Setting, names: Sequence[str] = plan_steps.ROWS
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
        "gpu": plan_costs.GPUS[setting.gpu]._asdict(),
        "plans": [_plan(model, layout, setting, names) for layout in sizes],
    }


def _plan(model: Model, layout: Layout, setting: Setting, names: Sequence[str]) -> dict[str, Any]:
    found = layouts.shards(model, layout)
    largest = sum(shard.elements * count for shard, count in found.items())
    steps, left_out = [], {}
    for name in names:
        try:
            step = plan_steps.step_of(name, SUBJECTS[setting.optimizer], setting.dtypes, found, layout)
        except NotAvailableError as error:
            left_out[METHODS[name].title] = str(error)
        else:
            steps.append(_priced(step, len(model.params), largest, layout, setting))
    return {
        "gpus": layout.gpus,
        "layout": layout._asdict(),
        "largest": largest,
        "balance": largest / model.count * layout.fsdp * layout.tp,
        "empty": layouts.empty_somewhere(model, layout),
        "steps": steps,
        "left_out": left_out,
    }


def _priced(
    step: plan_steps.Step, tensors: int, largest: int, layout: Layout, setting: Setting
) -> dict[str, Any]:
    gpu = plan_costs.GPUS[setting.gpu]
    time = plan_costs.time_of(step, tensors, layout, gpu, setting.efficiency)
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


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.9995 else f"{1e3 * seconds:.0f}"


def steps_table(found: dict[str, Any]) -> tables.Table:
    """Each step on one layout."""
    header = ["step", "bytes a parameter", "GB moved", "launches", "all-reduces (bytes)"]
    header += ["memory ms", "host ms", "all-reduces ms", "step ms", "bound by"]
    rows = []
    for step in found["steps"]:
        sent = step["collectives"]
        total = sum(one["bytes"] for one in sent)
        seconds = step["seconds"]
        rows.append(
            [
                step["title"],
                f"{step['moved_per_param']:.1f}",
                f"{step['moved'] / 1e9:.3g}",
                f"{step['launches']}",
                f"{len(sent)} ({total})" if sent else "0",
                *(_ms(seconds[part]) for part in ("memory", "host", "collectives", "total")),
                step["bound"],
            ]
        )
    return header, rows


def sizes_table(results: Results) -> tables.Table:
    """The same steps on each number of GPUs."""
    names = [name for name in SWEPT if any(_step(found, name) for found in results["plans"])]
    header = ["GPUs", "split", "parameters on the fullest (of the mean)", "tensors missing on the last"]
    header.append(f"GB kept, of {results['gpu']['memory'] / 1e9:.0f}")
    header += [f"{METHODS[name].title}: ms" for name in names]
    rows = []
    for found in results["plans"]:
        own = _step(found, "own_plain")
        assert own is not None
        cells = [str(found["gpus"]), str(Layout(**found["layout"]))]
        cells.append(f"{found['largest'] / 1e6:,.1f}M ({found['balance']:.2f})")
        too_much = own["kept"] > results["gpu"]["memory"]
        cells += [str(found["empty"]), f"{own['kept'] / 1e9:.3g}{' (too much)' * too_much}"]
        for name in names:
            step = _step(found, name)
            cells.append(f"{_ms(step['seconds']['total'])} ({step['bound']})" if step else "-")
        rows.append(cells)
    return header, rows


def _step(found: dict[str, Any], name: str) -> dict[str, Any] | None:
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
        f"{found['gpus']} GPUs ({Layout(**found['layout'])}): {found['largest']} parameters on the fullest, "
        f"{found['balance']:.2f} of the mean; {found['empty']} tensors have no element on the last"
    )


NOTE = (
    "On paper: bytes, launches and all-reduces are counted, times follow from published bandwidths and the "
    "assumptions in bench/plan_costs.py; no GPU was measured. step = max(memory, host) + all-reduces."
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


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    try:
        model = _model(options)
        sizes = [
            layouts.layout_of(gpus, options.fsdp, options.tp, options.replicate) for gpus in options.gpus
        ]
        setting = Setting(options.optimizer, options.dtypes, options.gpu, options.efficiency)
        results = plan(model, sizes, setting)
        show(results)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if options.plot:
            from . import plan_plot

            plan_plot.draw(results, options.plot)
    except ImportError as error:
        print(f"fusedcalib plan: --plot needs {error.name}: pip install {error.name}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"fusedcalib plan: {error}", file=sys.stderr)
        return 2
    return 0


def _model(options: argparse.Namespace) -> Model:
    if options.hf_config:
        return architectures.from_config(options.hf_config)
    if options.shapes:
        return architectures.from_shapes(options.shapes)
    return architectures.get(options.model)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fusedcalib plan", description=(__doc__ or "").split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="llama3-8b", help=f"{', '.join(architectures.NAMES)} (llama3-8b)")
    which.add_argument("--hf-config", type=Path, metavar="FILE", help="config.json of a llama-like model")
    which.add_argument("--shapes", type=Path, metavar="FILE", help='JSON: [{"name", "shape"}, ...]')
    parser.add_argument("--gpus", type=_counts, default=[8], help="how many, or several: 8,64,512 (8)")
    parser.add_argument("--fsdp", type=_count, help="GPUs that share a copy's parts (what the others leave)")
    parser.add_argument("--tp", type=_count, default=1, help="GPUs of tensor parallel (1)")
    parser.add_argument(
        "--replicate", type=_count, help="copies of the model, HSDP (1, or what --fsdp leaves)"
    )
    parser.add_argument("--gpu", default="h100", choices=list(plan_costs.GPUS), help="(h100)")
    parser.add_argument("--efficiency", type=_share, default=1.0, help="share of the published bandwidth (1)")
    parser.add_argument("--optimizer", default="AdamW", choices=list(SUBJECTS), help="(AdamW)")
    parser.add_argument("--dtypes", default="fp32", choices=list(DTYPES), help="(fp32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes everything as data")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draws time over the number of GPUs")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(one) for one in text.split(",")]


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and up to 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
