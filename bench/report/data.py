"""Dataclasses as JSON: written, and checked when they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


def write(found: Any, path: Path | None) -> None:
    """Writes a dataclass, if there is a path for it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")


def made(hint: Any, value: Any, where: str) -> Any:
    """A value of that type from what JSON has of it; fields that the type does not know are left out.

    Raises:
        ValueError: it is of another type, or something is missing; says where.
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is UnionType:
        return None if value is None else made(inner[0], value, where)
    nested = is_dataclass(kind)
    accepted = (int, float) if kind is float else dict if nested else object if kind is Any else kind
    if not isinstance(value, accepted):
        raise ValueError(f"{where} is {value!r}")
    found: Any = value
    if nested:
        return hint(**dict(_fields(hint, found, where)))
    if kind is list:
        return [made(inner[0], one, f"{where} {i}") for i, one in enumerate(found)]
    return {key: made(inner[1], one, f"{where}: {key!r}") for key, one in found.items()} if inner else found


def _fields(cls: type, value: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(cls)
    for one in fields(cls):
        if one.name in value:
            yield one.name, made(hints[one.name], value[one.name], f"{where}: {one.name!r}")
        elif one.default is one.default_factory is MISSING:
            raise ValueError(f"{where} has no {one.name!r}")
