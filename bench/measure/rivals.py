"""Other libraries' optimizers, which are used where they can be imported and never required.

Each is asked for the plain computation of the rule. Those that keep states in 8 bits (COMPRESSED) stand
beside ours that do so too, and are held against the reference with what their format is off by.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from ..models.shapes import ParamList
from ..models.traffic import Storage
from .method import ADAMW, Built, NotAvailableError, Subject, groups_of


class Rival(NamedTuple):
    """Another library."""

    title: str
    module: str
    classes: Mapping[str, str]  # by the names of ours
    options: Mapping[str, Any] = MappingProxyType({})  # more arguments, for every class that takes them
    on_gpu: Mapping[str, Any] = MappingProxyType({})  # the same, on a GPU
    renamed: Mapping[str, str] = MappingProxyType({})  # its names for options of ours
    narrow: bool = False  # whether it makes the numbers of a step in fp32, as torch.compile does

    def make(self, spec: ParamList, params: list[Tensor], subject: Subject = ADAMW) -> Built:
        cls, arguments, note = self.find(subject, params[0].is_cuda)
        optimizer = cls(groups_of(spec, params), **arguments)
        return Built(optimizer.step, optimizer, note=note)

    def find(self, subject: Subject, gpu: bool) -> tuple[type, dict[str, Any], str]:
        """Its class, the arguments that make it the subject, and a note: which version.

        Raises:
            NotAvailableError: it is not installed, or has no such optimizer.
        """
        package = self.module.partition(".")[0]
        try:
            library = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            raise NotAvailableError(f"{error.name or package} is not installed") from error
        except Exception as error:  # a library that is broken, or was built for another torch
            raise NotAvailableError(f"{package} cannot be imported: {sentence(error)}") from error
        name = self.classes.get(subject.cls)
        cls: type | None = getattr(library, name, None) if name else None
        if cls is None:
            raise NotAvailableError(f"{package} has no {subject.cls}")
        if cls.__module__.startswith("torch.optim"):
            raise NotAvailableError(f"its {subject.cls} is torch.optim's own class")
        version = getattr(importlib.import_module(package), "__version__", "?")
        return cls, self._arguments(cls, subject, gpu), f"{self.module}.{name} {version}"

    def _arguments(self, cls: type, subject: Subject, gpu: bool) -> dict[str, Any]:
        taken = inspect.signature(cls).parameters
        given: dict[str, Any] = {}
        for name, value in subject.rule_options().items():
            theirs = self.renamed.get(name, name)
            if theirs in taken:
                given[theirs] = value
            elif name in subject.options:
                raise NotAvailableError(f"{cls.__name__} has no option {name!r}")
        more = {**self.options, **(self.on_gpu if gpu else {})}
        return given | {name: value for name, value in more.items() if name in taken}


def sentence(error: BaseException) -> str:
    """An error in one line: what compilers raise fills pages."""
    if isinstance(error, NotAvailableError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 or len(lines) > 1 else ''}"


def _same(names: str, **others: str) -> dict[str, str]:
    return {name: name for name in names.split()} | others


RIVALS = {
    "apex": Rival("apex FusedAdam", "apex.optimizers", {"AdamW": "FusedAdam", "SGD": "FusedSGD"}),
    "bitsandbytes": Rival("bitsandbytes", "bitsandbytes.optim", _same("Adam AdamW Adagrad Lion RMSprop SGD")),
    "optimi": Rival(
        *("optimi", "optimi", _same("Adam AdamW Adan Lion RAdam SGD")),
        on_gpu={"triton": True},
        renamed={"decoupled_weight_decay": "decouple_wd"},
    ),
    "flashoptim": Rival(
        *("flashoptim", "flashoptim"),
        {name: f"Flash{name}" for name in ("Adam", "AdamW", "Lion", "SGD", "SGDW")},
        {"quantize": False, "master_weight_bits": None},
    ),
    "torchao": Rival("torchao", "torchao.optim.adam", {"AdamW": "_AdamW"}, narrow=True),
    "pytorch_optimizer": Rival(
        *("pytorch_optimizer", "pytorch_optimizer"),
        _same("Adam AdamW Adan ADOPT Lion NAdam RAdam RMSprop SGD SGDW", Adamax="AdaMax"),
        renamed={"decoupled_weight_decay": "weight_decouple"},
    ),
}


class Compressed(NamedTuple):
    """A library whose states are in bytes: what it is called with, and how it keeps things."""

    rival: Rival
    form: str  # of gate.FORMATS
    block: int  # elements of a scale of 4 bytes, or what is as much
    splits: bool = False  # whether it keeps bits beside bf16 weights, as asked for

    def beside(self, storage: Storage) -> Compressed:
        """The same, with as many bits of the weights as ours has."""
        bits = {"split16": 32, "split8": 24}.get(storage.master or "")
        more = {"master_weight_bits": bits} if self.splits else {}
        return self._replace(rival=self.rival._replace(options={**self.rival.options, **more}))

    def kept(self, storage: Storage) -> Storage:
        """What it keeps beside ours."""
        return Storage(storage.param, "8bit", storage.master if self.splits else None, block=self.block)


def _in_bytes(names: str) -> dict[str, str]:
    return {name: f"{name}8bit" for name in names.split()}


COMPRESSED = {
    "bitsandbytes": Compressed(
        Rival("bitsandbytes 8-bit", "bitsandbytes.optim", _in_bytes("Adam AdamW Lion RMSprop SGD")),
        *("dynamic", 256),
    ),
    "torchao": Compressed(
        Rival("torchao 8-bit", "torchao.optim", _in_bytes("Adam AdamW"), narrow=True), "dynamic", 256
    ),
    "flashoptim": Compressed(
        RIVALS["flashoptim"]._replace(title="flashoptim 8-bit", options={"quantize": True}),
        *("companded", 64, True),
    ),
}
