"""What cannot be decided without a GPU: kernels with another constant each, timed beside the present ones.

python3 bench/run.py variants --out DIR [--seconds 240] [--only REGEX]

Writes DIR/variants.json after each row, and says at the end which constants to change. Rows run in
another process: a kernel that does not compile, or crashes the GPU's context, costs its row only.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..env.machine import Head
from ..measure.worker import LostError, Worker, WorkError
from ..models.architectures import Shape
from ..report import tables
from ..report.data import write
from .variants_run import Changes, Variant, VariantRow

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


def on_rows(name: str, changes: Changes, *columns: int, dtypes: str = "", **more: Any) -> list[Variant]:
    """A variant on centred matrices with rows of each of these lengths."""
    ending = f", {dtypes}" if dtypes else ""
    more = {"options": GC, "dtypes": dtypes or "fp32", **more}
    return [Variant(f"{name}, rows of {n}{ending}", changes, rows_of(n), **more) for n in columns]


def _walked_twice() -> list[Variant]:
    """Rows that are read twice, and tiles of them."""
    return [
        *on_rows("no eviction hints", {"rows": {"HINTS": False}}, 9216, 14_336, 32_768, exact=True),
        *on_rows("tiles of 2048 in a loop", class_of(32_768, 1, 2048, 8, "loop"), 14_336, 32_768),
    ]


def _held() -> list[Variant]:
    """Rows that registers hold: elements a thread, and shorter rows by a loop."""
    wide = class_of(8192, 1, 8192, 32, "tile")
    sixteen, two = class_of(4096, 1, 4096, 16, "tile"), class_of(2048, 2, 2048, 8, "tile")
    loop = class_of(32_768, 1, 4096, 8, "loop", without=[8192])
    shorter = class_of(32_768, 1, 4096, 8, "loop", without=[4096, 8192])
    found = []
    for dtypes in ("fp32", "bf16"):
        found += on_rows("32 warps", wide, 8192, dtypes=dtypes)
        found += on_rows("a loop", loop, 8192, dtypes=dtypes)
    return [
        *found,
        *on_rows("16 warps", sixteen, 4096),
        *on_rows("tiles [2, 2048]", two, 1536, 2048),
        *on_rows("Adan: 16 warps", sixteen, 4096, optimizer="Adan"),
        *on_rows("Adan: a loop", shorter, 4096, optimizer="Adan"),
    ]


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
    return found + on_rows("Adan: sixteen elements a thread", sixteen, 14_336, 32_768, optimizer="Adan")


def _norm() -> list[Variant]:
    """The launch that measures; the last rows time it together with a step over few parameters."""
    changes: dict[str, Changes] = {
        **{f"{n} warps": {"spec": {"NORM_WARPS": n}} for n in (2, 8)},
        **{f"{n} programs": {"decide": {"GRID": n}} for n in (512, 2048)},
        **{f"at most {n} registers": norm_options(maxnreg=n) for n in (48, 96)},
    }
    named = [(name, change, dtypes) for name, change in changes.items() for dtypes in ("fp32", "bf16")]
    # Of fp32 they are one tile already; blocks of 512 are 128 bits a thread.
    named += [("a tile at once", {"spec": {"NORM_BYTES": 8192}}, "bf16")]
    named += [("blocks of 512", {"spec": {"NORM_BLOCK": 512}}, "fp32")]
    forwards: Changes = {"decide": {"BACKWARDS": False}}
    return [
        *(
            Variant(f"norm: {name}, {dtypes}", change, LARGE, options=CLIP, dtypes=dtypes, norm=True)
            for name, change, dtypes in named
        ),
        Variant("norm and step: forwards, 4M parameters", forwards, SMALL, options=CLIP),
        Variant("norm and step: forwards, 17M parameters", forwards, ((4096, 4096),), options=CLIP),
    ]


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
    head = machine.describe(torch.device("cuda", torch.cuda.current_device()))
    worker = Worker(LONGEST)
    show(collected(names, options.seconds, options.out / "variants.json", head, worker.call))
    worker.close()
    return 0


@dataclass
class VariantRows(Head):
    """All rows, as the file has them."""

    rows: list[VariantRow]


def work(name: str, seconds: float) -> VariantRow:
    """Measures a row on the GPU that is here."""
    import torch

    from .variants_run import measured

    row = measured(BY_NAME[name], torch.device("cuda", torch.cuda.current_device()), seconds)
    torch.cuda.empty_cache()
    return row


def collected(
    names: Sequence[str], seconds: float, path: Path, head: Head, call: Callable[..., VariantRow]
) -> list[VariantRow]:
    """The rows, each written as soon as it is there; `call` measures in another process."""
    end = time.monotonic() + seconds
    each = min(2.0, 0.4 * seconds / len(names))  # the rest of the time is for compiling and judging
    found = VariantRows(**vars(head), rows=[])
    for name in names:
        late = VariantRow(name, reason="no time was left")
        try:
            row = call(work, name, each) if time.monotonic() < end else late
        except (LostError, WorkError) as error:  # it costs this row only
            row = VariantRow(name, reason=str(error).partition("\n")[0][:200])
        found.rows.append(row)
        write(found, path)
    return found.rows


def show(rows: Sequence[VariantRow]) -> None:
    """Prints the rows, and what to change."""

    def spread(row: VariantRow) -> str:
        return f"{row.ratio.p10:.3f}-{row.ratio.p90:.3f}" if row.ratio else row.reason or "-"

    columns: tables.Columns[VariantRow] = {
        "variant": lambda row: row.name,
        "of the present time": lambda row: tables.number(row.ratio.median if row.ratio else None, ".3f"),
        "10-90 %": spread,
        "keep": lambda row: "yes" if row.kept else "no",
    }
    tables.show(tables.table_of(rows, columns))
    kept = [row.name for row in rows if row.kept]
    print(f"to be kept: {'; '.join(kept)}" if kept else "no variant is better by more than its spread")
