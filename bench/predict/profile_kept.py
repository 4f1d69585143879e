"""The static profile that is kept, and what of it became heavier.

Every rule plain, and AdamW with each option and with all of them, on a tensor of every row class, for sm_90.
Another Triton makes other code: only profiles of the same version are compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..env import machine
from ..measure.method import SUBJECTS
from ..models import architectures
from ..report import tables
from ..report.data import made
from . import profile_static
from .gpus import GPUS
from .profile_static import StaticKernel
from .profile_steps import OPTIONS, ProfileCase, everything
from .static_costs import bound, occupancy

GPU, MODEL = "h100", "row-classes"
PATH = machine.RESULTS / "static" / "sm_90.json"
CASES = (
    *(ProfileCase(name) for name in SUBJECTS),
    *(ProfileCase("AdamW", (), dtypes) for dtypes in ("bf16", "bf16+fp32-state")),
    *(ProfileCase("AdamW", (), dtypes) for dtypes in ("split16", "split8+8bit")),
    ProfileCase("Lion", (), "split8+8bit"),
    *(ProfileCase("AdamW", (name,)) for name in OPTIONS if name != "stochastic_rounding"),
    ProfileCase("AdamW", ("stochastic_rounding",), "bf16"),
    ProfileCase("AdamW", everything("fp32")),
    ProfileCase("AdamW", everything("bf16"), "bf16+fp32-state"),
)
MORE = 0.05  # of the instructions: less is noise of the compiler
ACCEPT = "python -m fusedcalib profile --accept"
MEND = f"if that is meant: {ACCEPT}"


@dataclass(frozen=True)
class KeptKernel:
    """What is kept of a kernel, in the units of StaticKernel: nothing that follows from tables of GPUs."""

    registers: int
    spilled: int
    shared: int
    widest: int | None
    narrowest: int | None
    bytes: float
    instructions: float
    executed: float

    @classmethod
    def of(cls, kernel: StaticKernel) -> KeptKernel:
        return cls(*(getattr(kernel, one.name) for one in fields(cls)))


@dataclass
class Kept:
    """The profile that is kept; kernels are called as `AdamW, fp32: step 1x4096 8w`."""

    schema: int
    target: str
    triton: str
    kernels: dict[str, KeptKernel]


def name_of(case: ProfileCase, kernel: str, tile: str) -> str:
    """What a kernel is called in the file."""
    return f"{case.title}: {kernel} {tile}"


def profile(cases: Sequence[ProfileCase] = CASES, workers: int = profile_static.WORKERS) -> Kept:
    """The kept part of a profile made now."""
    found = profile_static.profile(cases, architectures.get(MODEL), GPU, workers)
    kernels = {
        name_of(case, kernel.kernel, kernel.tile): KeptKernel.of(kernel)
        for case in found.cases
        for kernel in case.kernels
    }
    return Kept(1, found.gpu.target, found.triton, kernels)


def read(path: Path = PATH) -> Kept:
    """What the file has."""
    if not path.exists():
        raise ValueError(f"{path} is missing: {ACCEPT} writes it")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("schema") != 1:
        raise ValueError(f"{path} is of another schema: {ACCEPT} writes it anew")
    kept: Kept = made(Kept, found, str(path))
    return kept


def write(kept: Kept, path: Path = PATH) -> None:
    """One kernel a line, so that a change shows as one."""
    head = asdict(kept)
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in head.pop("kernels").items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(head)[:-1]}, "kernels": {{\n{rows}\n}}}}\n', encoding="utf-8")


def incomparable(before: Kept, now: str) -> str | None:
    """Why nothing can be said by this Triton; None where it can."""
    if before.triton == now:
        return None
    return f"the profile is of Triton {before.triton}, here is {now}: other code, nothing is compared"


def heavier(before: dict[str, KeptKernel], now: dict[str, KeptKernel]) -> list[str]:
    """What the kernels of `now` take more of than they did; kernels that were not there are named too."""
    return [f"{name}: {said}" for name, row in now.items() for said in _heavier(before.get(name), row)]


def register_class(registers: int) -> int:
    """Warps of a part of a processor that have room, of 16."""
    return occupancy("sm_90", registers, 4, 0).warps // 4


def _heavier(old: KeptKernel | None, new: KeptKernel) -> Iterator[str]:
    if old is None:
        yield "is new, or was called otherwise"
        return
    if new.spilled > old.spilled:
        yield f"{new.spilled} bytes are spilled, {old.spilled} were"
    if register_class(new.registers) < register_class(old.registers):
        yield f"{new.registers} registers leave room for fewer warps than {old.registers} did"
    if new.instructions > (1 + MORE) * old.instructions:
        yield f"{new.instructions} instructions an element, {old.instructions} before"
    if new.executed > (1 + MORE) * old.executed:
        yield f"{new.executed} instructions an element are executed, {old.executed} were"
    if new.bytes > old.bytes:
        yield f"{new.bytes} bytes an element, {old.bytes} before"
    if (new.narrowest or 0) < (old.narrowest or 0):
        yield f"accesses of {new.narrowest} bytes, none below {old.narrowest} before"


def table(kept: Kept) -> tables.Table:
    """Each kernel of each case, over its row classes; what is unaligned apart."""
    groups: dict[tuple[str, str], list[KeptKernel]] = {}
    for name, row in kept.kernels.items():
        title, _, about = name.partition(": ")
        kernel = about.split()[0] + (", unaligned" if about.endswith("unaligned") else "")
        if row.bytes:  # control_kernel is one program
            groups.setdefault((title, kernel), []).append(row)

    def shares(rows: list[KeptKernel]) -> str:
        taken = [bound(GPUS[GPU], row.bytes, row.executed) for row in rows]
        return f"{_span([100 * time.issue / time.memory for time in taken])} %"

    columns: tables.Columns[tuple[tuple[str, str], list[KeptKernel]]] = {
        "step": lambda group: group[0][0],
        "kernel": lambda group: group[0][1],
        "bytes": lambda group: _span([row.bytes for row in group[1]], "g"),
        "instructions": lambda group: _span([row.instructions for row in group[1]]),
        "executed": lambda group: _span([row.executed for row in group[1]]),
        "of the memory's time": lambda group: shares(group[1]),
        "registers": lambda group: _span([row.registers for row in group[1]]),
        "spilled bytes": lambda group: _span([row.spilled for row in group[1]]),
    }
    return tables.table_of(groups.items(), columns)


def _span(values: Sequence[float], form: str = ".0f") -> str:
    """The least and the most of them, in whole numbers."""
    ends = dict.fromkeys(f"{end(values):{form}}" for end in (min, max))
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
    found = heavier(before.kernels, profile().kernels)
    for line in found:
        print(line, file=sys.stderr)
    print(f"{len(found)} kernels are heavier; {MEND}" if found else "no kernel is heavier")
    return 1 if found else 0
