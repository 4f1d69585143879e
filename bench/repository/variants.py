"""What cannot be decided without a GPU: kernels with another constant each, timed beside the present ones.

python3 bench/run.py variants --out DIR [--seconds 240] [--only REGEX]

Writes DIR/variants.json after each row, and says at the end which constants to change. Rows run in
another process: a kernel that does not compile, or crashes the GPU's context, costs its row only.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..measure.worker import LostError, Worker, WorkError
from ..models.architectures import Shape
from ..report import tables
from .variants_run import Changes, Variant

Row = dict[str, Any]
LONGEST = 60.0  # seconds of a row: what takes longer hangs
GC: dict[str, Any] = {"centralize": True}
CLIP: dict[str, Any] = {"max_grad_norm": 1.0}
LARGE: tuple[Shape, ...] = ((4096, 4096),) * 3  # 50M parameters: 1.4 GB in a step of AdamW
SMALL: tuple[Shape, ...] = ((1024, 1024),) * 4


def rows_of(columns: int) -> tuple[Shape, ...]:
    """A matrix of about 32M elements with such rows."""
    return ((2**25 // columns, columns),)


def class_of(longest: int, *tile: Any, without: Sequence[int] = ()) -> Changes:
    """The row classes with one of them exchanged or more, and some left out."""
    from fusedcalib.kernels.spec import ROW_CLASSES

    kept = [row for row in ROW_CLASSES if row[0] not in (longest, *without)]
    return {"spec": {"ROW_CLASSES": tuple(sorted([*kept, (longest, *tile)]))}}


def norm_options(**options: Any) -> Changes:
    """Other options for the compiler of the norm's launch."""
    from fusedcalib.kernels.launch import NORM_OPTIONS

    return {"launch": {"NORM_OPTIONS": {**NORM_OPTIONS, "cuda": {**NORM_OPTIONS["cuda"], **options}}}}


def _walked_twice() -> list[Variant]:
    """Rows that are read twice, and tiles of them."""
    off: Changes = {"rows": {"HINTS": False}}
    found = [
        Variant(f"no eviction hints, rows of {n}", off, rows_of(n), options=GC, exact=True)
        for n in (9216, 14_336, 32_768)
    ]
    eight = class_of(32_768, 1, 2048, 8, "loop")
    found += [
        Variant(f"tiles of 2048 in a loop, rows of {n}", eight, rows_of(n), options=GC)
        for n in (14_336, 32_768)
    ]
    return found


def _held() -> list[Variant]:
    """Rows that registers hold: elements a thread, and shorter rows by a loop."""
    loop = class_of(32_768, 1, 4096, 8, "loop", without=[8192])
    found = []
    for dtypes in ("fp32", "bf16"):
        wide: dict[str, Any] = {"shapes": rows_of(8192), "options": GC, "dtypes": dtypes}
        found += [
            Variant(f"32 warps, rows of 8192, {dtypes}", class_of(8192, 1, 8192, 32, "tile"), **wide),
            Variant(f"a loop, rows of 8192, {dtypes}", loop, **wide),
        ]
    sixteen, two = class_of(4096, 1, 4096, 16, "tile"), class_of(2048, 2, 2048, 8, "tile")
    found += [Variant("16 warps, rows of 4096", sixteen, rows_of(4096), options=GC)]
    found += [Variant(f"tiles [2, 2048], rows of {n}", two, rows_of(n), options=GC) for n in (1536, 2048)]
    adan: dict[str, Any] = {"shapes": rows_of(4096), "optimizer": "Adan", "options": GC}
    found += [
        Variant("Adan: 16 warps, rows of 4096", sixteen, **adan),
        Variant(
            "Adan: a loop, rows of 4096", class_of(32_768, 1, 4096, 8, "loop", without=[4096, 8192]), **adan
        ),
    ]
    return found


def _flat() -> list[Variant]:
    """Steps without rows, of which every result is the same to the bit; tiles of many tensors."""
    found = []
    for wide, warps in ((4096, 16), (2048, 8), (2048, 4), (1024, 4)):
        changes: Changes = {"spec": {"FLAT": (1, wide, warps)}}
        for dtypes in ("fp32", "bf16"):
            name = f"flat tiles of {wide}, {warps} warps, {dtypes}"
            found.append(Variant(name, changes, LARGE, dtypes=dtypes, exact=True))
    for limit in (96, 80):
        capped = {"launch": {"OPTIONS": {"enable_fp_fusion": False, "maxnreg": limit}}}
        found.append(Variant(f"at most {limit} registers, flat", capped, LARGE, exact=True))
    sixteen: Changes = {"spec": {"MANY": 9}}
    found.append(Variant("Adan: sixteen elements a thread, flat", sixteen, LARGE, "Adan", exact=True))
    found += [
        Variant(f"Adan: sixteen elements a thread, rows of {n}", sixteen, rows_of(n), "Adan", GC)
        for n in (14_336, 32_768)
    ]
    return found


def _norm() -> list[Variant]:
    """The launch that measures; the last rows time it together with a step over few parameters."""
    changes: dict[str, Changes] = {
        **{f"{n} warps": {"spec": {"NORM_WARPS": n}} for n in (2, 8)},
        **{f"{n} programs": {"decide": {"GRID": n}} for n in (512, 2048)},
        **{f"at most {n} registers": norm_options(maxnreg=n) for n in (48, 96)},
    }
    found = [
        Variant(f"norm: {name}, {dtypes}", change, LARGE, options=CLIP, dtypes=dtypes, norm=True)
        for name, change in changes.items()
        for dtypes in ("fp32", "bf16")
    ]
    single: dict[str, Changes] = {  # of fp32 they are one tile already; blocks of 512 are 128 bits a thread
        "bf16": {"spec": {"NORM_BYTES": 8192}},
        "fp32": {"spec": {"NORM_BLOCK": 512}},
    }
    for dtypes, change in single.items():
        name = "a tile at once" if dtypes == "bf16" else "blocks of 512"
        found.append(
            Variant(f"norm: {name}, {dtypes}", change, LARGE, options=CLIP, dtypes=dtypes, norm=True)
        )
    forwards: Changes = {"decide": {"BACKWARDS": False}}
    found += [
        Variant(f"norm and step: forwards, {size}", forwards, tensors, options=CLIP)
        for size, tensors in (("4M parameters", SMALL), ("17M parameters", ((4096, 4096),)))
    ]
    return found


VARIANTS = (*_walked_twice(), *_held(), *_norm(), *_flat())


BY_NAME = {variant.name: variant for variant in VARIANTS}


# -- the command


def main(options: argparse.Namespace) -> int:
    import torch

    from ..env import machine

    if not torch.cuda.is_available():
        raise ValueError("no GPU is here to measure on")
    names = [name for name in BY_NAME if re.search(options.only, name)]
    if not names:
        raise ValueError(f"no row is like {options.only!r}")
    head = asdict(machine.describe(torch.device("cuda", torch.cuda.current_device())))
    options.out.mkdir(parents=True, exist_ok=True)
    worker = Worker(LONGEST)
    show(collected(names, options.seconds, options.out / "variants.json", head, worker.call))
    worker.close()
    return 0


def work(name: str, seconds: float) -> Row:
    """Measures a row on the GPU that is here."""
    import torch

    from .variants_run import measured

    row = measured(BY_NAME[name], torch.device("cuda", torch.cuda.current_device()), seconds)
    torch.cuda.empty_cache()
    return row


def collected(
    names: Sequence[str], seconds: float, path: Path, head: Row, call: Callable[..., Row]
) -> list[Row]:
    """The rows, each written as soon as it is there; `call` measures in another process."""
    end = time.monotonic() + seconds
    each = min(2.0, 0.4 * seconds / len(names))  # the rest of the time is for compiling and judging
    rows: list[Row] = []
    for name in names:
        try:
            row = call(work, name, each) if time.monotonic() < end else _failed(name, "no time was left")
        except (LostError, WorkError) as error:  # it costs this row only
            row = _failed(name, str(error).partition("\n")[0][:200])
        rows.append(row)
        path.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return rows


def _failed(name: str, reason: str) -> Row:
    return {"name": name, "kept": False, "reason": reason}


def show(rows: Sequence[Row]) -> None:
    """Prints the rows, and what to change."""
    header = ["variant", "of the present time", "10-90 %", "keep"]
    body = []
    for row in rows:
        ratio, numbers = row.get("ratio"), ["-", row["reason"] or "-"]
        if ratio:
            numbers = [f"{ratio['median']:.3f}", f"{ratio['p10']:.3f}-{ratio['p90']:.3f}"]
        body.append([row["name"], *numbers, "yes" if row["kept"] else "no"])
    tables.show((header, body))
    kept = [row["name"] for row in rows if row["kept"]]
    print(f"to be kept: {'; '.join(kept)}" if kept else "no variant is better by more than its spread")
