"""The results file: one JSON a run, checked when it is written and when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..env import machine

Results = dict[str, Any]

# What must be there. A tuple lists the types that a value may have; None stands for "not measured".
NUMBER = (int, float)
MAYBE = (int, float, type(None))
HEAD: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "utc": (str,),
    "commit": (str, type(None)),
    "dirty": (bool, type(None)),
    "device": (dict, type(None)),
    "cpu": (dict,),
    "versions": (dict,),
    "torch_mta": (dict, type(None)),
    "ceil": (dict,),
    "cases": (list,),
}
CASE: dict[str, tuple[type, ...]] = {
    "list": (str,),
    "tensors": (int,),
    "params": (int,),
    "dtypes": (str,),
    "subject": (str,),
    "bytes_per_param": (int,),
    "flush": (str,),
    "clock": (str,),
    "methods": (list,),
}
# What newer files have, and of what type.
HEAD_MORE: dict[str, tuple[type, ...]] = {"incomplete": (bool,), "failures": (list,), "left_out": (list,)}
CASE_MORE: dict[str, tuple[type, ...]] = {
    "extras": (str,),
    "base": (str, type(None)),
    "hyper": (dict,),
    "incomplete": (bool,),
}
METHOD: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "title": (str,),
    "options": (dict,),
    **dict.fromkeys(("device_ms_median", "device_ms_p10", "device_ms_p90"), MAYBE),
    **dict.fromkeys(("wall_ms", "host_us", "launches", "peak_extra_bytes"), MAYBE),
    **dict.fromkeys(("pct_copy", "pct_stream", "max_err_vs_fp64", "kept", "dropped"), MAYBE),
    "ratio_to": (dict,),
    "wall_ratio_to": (dict,),
    "reason": (str, type(None)),
}
METHOD_MORE: dict[str, tuple[type, ...]] = {
    "note": (str,),
    "bytes_per_param": (int,),
    **dict.fromkeys(("first_steps_s", "gbs", "pct_4r3w"), MAYBE),
}
SPEEDS = ("wall_ms", "device_ms_median", "host_us", "gbs", "pct_copy", "pct_4r3w", "pct_stream")
SPREAD: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("median", "p10", "p90", "n"), NUMBER),
    "disturbed": (bool,),
}


def assemble(head: Results, ceil: dict[str, Any], cases: list[dict[str, Any]], **more: Any) -> Results:
    """Put a run together, and say each time as bandwidth: in GB/s, and as shares of the ceilings."""
    for case in cases:
        for row in case["methods"]:
            milliseconds = row["wall_ms" if case["clock"] == "wall" else "device_ms_median"]
            moved = row.get("bytes_per_param", case["bytes_per_param"]) * case["params"]
            row["gbs"] = 1e-6 * moved / milliseconds if milliseconds else None
            for key, ceiling in (("pct_copy", "copy_gbs"), ("pct_4r3w", "stream_4r3w_gbs")):
                row[key] = 100 * row["gbs"] / ceil[ceiling] if row["gbs"] and ceil.get(ceiling) else None
    return {**head, "torch_mta": more.pop("torch_mta", None), "ceil": ceil, "cases": cases, **more}


def check(results: Results) -> None:
    """Hold results against the schema.

    Raises:
        ValueError: something is missing, is of another type, or is a number without a gate.
    """
    _typed(results, HEAD, "results", HEAD_MORE)
    if results["schema"] != 1:
        raise ValueError(f"results of schema {results['schema']}, not 1")
    for case in results["cases"]:
        where = f"case {case.get('list')!r}"
        _typed(case, CASE, where, CASE_MORE)
        for row in case["methods"]:
            _typed(row, METHOD, f"{where}, method {row.get('name')!r}", METHOD_MORE)
            for spread in (*row["ratio_to"].values(), *row["wall_ratio_to"].values()):
                _typed(spread, SPREAD, f"{where}, ratio of {row['name']!r}")
            if row["reason"] is not None and (row["ratio_to"] or any(row.get(key) for key in SPEEDS)):
                raise ValueError(f"{where}: {row['name']!r} did not pass and has a speed")


def _typed(
    value: dict[str, Any],
    wanted: dict[str, tuple[type, ...]],
    where: str,
    more: dict[str, tuple[type, ...]] | None = None,
) -> None:
    for key in wanted:
        if key not in value:
            raise ValueError(f"{where} has no {key!r}")
    for key, types in (wanted | (more or {})).items():
        if key in value and not isinstance(value[key], types):
            raise ValueError(f"{where}: {key!r} is {value[key]!r}")


def save(results: Results, path: Path) -> Path:
    """Check, then write; no half-written file is left, nor one with NaN, which is not JSON."""
    check(results)
    text = json.dumps(results, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    return path


def file_name(head: Results) -> str:
    """`<utc>-<device>.json`, which sorts by time."""
    stamp = head["utc"].replace("-", "").replace(":", "")
    return f"{stamp}-{machine.slug(head)}.json"


def load(path: Path) -> Results:
    results: Results = json.loads(path.read_text())
    check(results)
    return results


def find_row(
    results: Results,
    name: str,
    method: str,
    dtypes: str = "fp32",
    subject: str = "AdamW",
    extras: str = "",
) -> Results | None:
    """The row of a method on a list, or None if that was not measured."""
    for case in results["cases"]:
        found_in = (case["list"], case["dtypes"], case["subject"], extras_of(case))
        if found_in == (name, dtypes, subject, extras):
            for row in case["methods"]:
                if row["name"] == method and row["reason"] is None:
                    found: Results = row
                    return found
    return None


def extras_of(case: Results) -> str:
    """What a case is about besides its rule; older files have nothing of the kind."""
    extras: str = case.get("extras", "")
    return extras


def ratio(
    results: Results, name: str, method: str, to: str, clock: str = "ratio_to", **where: str
) -> Results | None:
    """The spread of one ratio, or None if that was not measured; `where`: more of what find_row takes."""
    row = find_row(results, name, method, **where)
    spread: Results | None = row[clock].get(to) if row else None
    return spread
