"""Parameters of whatever holds some, with their names, alone or in named groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

REST = "other"  # what those of no group are called


def named(source: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and their names, of tensors, pairs, modules, optimizers, lists of these."""
    if isinstance(source, Tensor):
        yield "", source
    elif isinstance(source, torch.nn.Module):
        yield from source.named_parameters()
    elif hasattr(source, "param_groups"):
        for group in source.param_groups:
            names = group.get("param_names") or [""] * len(group["params"])
            yield from zip(names, group["params"], strict=True)
    elif isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], str):
        yield source[0], _tensor(source[1])
    else:
        if isinstance(source, str | bytes | dict) or not isinstance(source, Iterable):
            _tensor(source)
        for item in source:
            yield from named(item)


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    raise TypeError(
        f"expected parameters, (name, parameter) pairs, a module or optimizers, not {type(value).__name__}; "
        "pass model.parameters() or the optimizer"
    )


def named_once(parameters: Any) -> list[tuple[str, Tensor]]:
    """As `named`, each parameter once, and with a name in any case."""
    found: dict[int, tuple[str, Tensor]] = {}
    for i, (name, p) in enumerate(named(parameters)):
        found.setdefault(id(p), (name or f"parameter {i}", p))
    return [*found.values()]


def grouped(
    parameters: Any, groups: Mapping[str, Any] | None
) -> tuple[list[str], list[list[tuple[str, Tensor]]]]:
    """Names of the norm groups, and the named parameters of each."""
    every = named_once(parameters)
    if groups is None:
        return [REST], [every]
    if REST in groups:
        raise ValueError(f'groups has "{REST}", which is what parameters of no group are called; rename it')
    called = {id(p): name for name, p in every}
    taken: dict[int, str] = {}
    names, owned = [], []
    for group, members in groups.items():
        mine = [(called.get(id(p), name), p) for name, p in named_once(members)]
        for name, p in mine:
            if id(p) in taken:
                raise ValueError(f'{name} is in groups "{taken[id(p)]}" and "{group}"; leave it in one')
            taken[id(p)] = group
        names.append(group)
        owned.append(mine)
    rest = [(name, p) for name, p in every if id(p) not in taken]
    return ([*names, REST], [*owned, rest]) if rest else (names, owned)
