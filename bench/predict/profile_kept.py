"""The static profile that is kept, and what of it became heavier.

Every rule plain, and AdamW with each option and with all of them, on a tensor of every row class, for sm_90.
Another Triton makes other code: only profiles of the same version are compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..env import machine
from ..measure.method import SUBJECTS
from ..models import architectures
from ..report import tables
from . import profile_static
from .gpus import GPUS
from .profile_steps import OPTIONS, ProfileCase, everything
from .static_costs import bound, occupancy

Results = dict[str, Any]
Row = dict[str, Any]
GPU, MODEL = "h100", "row-classes"
PATH = machine.RESULTS / "static" / "sm_90.json"
KEPT = ("registers", "spilled", "shared", "widest", "narrowest", "bytes", "instructions")
CASES = (
    *(ProfileCase(name) for name in SUBJECTS),
    *(ProfileCase("AdamW", (), dtypes) for dtypes in ("bf16", "bf16+fp32-state")),
    *(ProfileCase("AdamW", (name,)) for name in OPTIONS if name != "stochastic_rounding"),
    ProfileCase("AdamW", ("stochastic_rounding",), "bf16"),
    ProfileCase("AdamW", everything("fp32")),
    ProfileCase("AdamW", everything("bf16"), "bf16+fp32-state"),
)
MORE = 0.05  # of the instructions: less is noise of the compiler
MEND = "if that is meant: python -m fusedcalib profile --accept"


def kept_of(results: Results) -> Results:
    """What is kept of a profile: nothing that follows from tables of GPUs."""
    rows = {}
    for found in results["cases"]:
        case = ProfileCase(found["optimizer"], tuple(found["options"]), found["dtypes"])
        for kernel in found["kernels"]:
            rows[name_of(case, kernel["kernel"], kernel["tile"])] = kept_row(kernel)
    return {"schema": 1, "target": results["gpu"]["target"], "triton": results["triton"], "kernels": rows}


def name_of(case: ProfileCase, kernel: str, tile: str) -> str:
    """What a kernel is called in the file."""
    return f"{case.title}: {kernel} {tile}"


def kept_row(kernel: Results) -> Row:
    """What is kept of a kernel."""
    return {key: kernel[key] for key in KEPT}


def profile(cases: Sequence[ProfileCase] = CASES, workers: int = profile_static.WORKERS) -> Results:
    """The kept part of a profile made now."""
    return kept_of(profile_static.profile(cases, architectures.get(MODEL), GPU, workers))


def read(path: Path = PATH) -> Results:
    """What the file has.

    Raises:
        ValueError: it is not there, or of another schema.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing: python -m fusedcalib profile --accept writes it")
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("schema") != 1:
        raise ValueError(f"{path} is of another schema: python -m fusedcalib profile --accept writes it anew")
    return results


def write(results: Results, path: Path = PATH) -> None:
    """One kernel a line, so that a change shows as one."""
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in results["kernels"].items())
    head = {key: value for key, value in results.items() if key != "kernels"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(head)[:-1]}, "kernels": {{\n{rows}\n}}}}\n', encoding="utf-8")


def incomparable(before: Results, now: str) -> str | None:
    """Why nothing can be said by this Triton; None where it can."""
    if before["triton"] == now:
        return None
    return f"the profile is of Triton {before['triton']}, here is {now}: other code, nothing is compared"


def heavier(before: Results, now: Results) -> list[str]:
    """What the kernels of `now` take more of than they did; kernels that were not there are named too."""
    return [
        f"{name}: {said}"
        for name, row in now["kernels"].items()
        for said in _heavier(before["kernels"].get(name), row)
    ]


def register_class(registers: int) -> int:
    """Warps of a part of a processor that have room, of 16."""
    return occupancy("sm_90", registers, 4, 0).warps // 4


def _heavier(old: Row | None, new: Row) -> Iterator[str]:
    if old is None:
        yield "is new, or was called otherwise"
        return
    if new["spilled"] > old["spilled"]:
        yield f"{new['spilled']} bytes are spilled, {old['spilled']} were"
    if register_class(new["registers"]) < register_class(old["registers"]):
        yield f"{new['registers']} registers leave room for fewer warps than {old['registers']} did"
    if new["instructions"] > (1 + MORE) * old["instructions"]:
        yield f"{new['instructions']} instructions an element, {old['instructions']} before"
    if new["bytes"] > old["bytes"]:
        yield f"{new['bytes']} bytes an element, {old['bytes']} before"
    if (new["narrowest"] or 0) < (old["narrowest"] or 0):
        yield f"accesses of {new['narrowest']} bytes, none below {old['narrowest']} before"


def table(results: Results) -> tables.Table:
    """Each kernel of each case, over its row classes; what is unaligned apart."""
    header = ["step", "kernel", "bytes", "instructions", "of the memory's time", "registers", "spilled bytes"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for name, row in results["kernels"].items():
        title, _, about = name.partition(": ")
        kernel = about.split()[0] + (", unaligned" if about.endswith("unaligned") else "")
        if row["bytes"]:  # control_kernel is one program
            groups.setdefault((title, kernel), []).append(row)
    gpu = GPUS[GPU]
    rows = []
    for (title, kernel), found in groups.items():
        taken = [bound(gpu, row["bytes"], row["instructions"]) for row in found]
        shares = [100 * time.issue / time.memory for time in taken]
        numbers = [
            str(found[0]["bytes"]),
            _span([row["instructions"] for row in found]),
            f"{_span(shares)} %",
        ]
        numbers += [_span([row[key] for row in found]) for key in ("registers", "spilled")]
        rows.append([title, kernel, *numbers])
    return header, rows


def _span(values: Sequence[float]) -> str:
    """The least and the most of them, in whole numbers."""
    ends = dict.fromkeys(f"{end(values):.0f}" for end in (min, max))
    return " to ".join(ends)


def main(accept: bool) -> int:
    """Compares all of it, or writes it anew."""
    import triton

    if accept:
        write(profile())
        print(f"wrote {PATH}; python docs/build.py takes it over")
        return 0
    before = read()
    if reason := incomparable(before, triton.__version__):
        print(reason)
        return 0
    found = heavier(before, profile())
    for line in found:
        print(line, file=sys.stderr)
    print(f"{len(found)} kernels are heavier; {MEND}" if found else "no kernel is heavier")
    return 1 if found else 0
