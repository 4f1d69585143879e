"""Flat shards of FSDP1 whose states and weights are in bytes, each beside what a rank has, as one row."""

import io
import warnings
from typing import Any

import torch
import torch.distributed as dist
from storage_runs import BYTES, adamw
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import FullyShardedDataParallel

from fusedcalib.layout import storage

SPLIT8: dict[str, Any] = {"master_weights": "split8", **BYTES}
COPIED: dict[str, Any] = {"master_weights": "float32", "state_dtype": "float32"}
# Options, and use_orig_params: whether optimizers see a part of each parameter, or of all in one.
REFUSED: dict[str, tuple[dict[str, Any], bool]] = {
    "8bit": (BYTES, True),
    "8bit of one state": ({"state_dtype": {"exp_avg": "8bit"}}, False),
    "split16": ({"master_weights": "split16"}, True),
    "split8": ({"master_weights": "split8"}, False),
}


class Run:
    """A small network under FSDP1 and its optimizer."""

    def __init__(self, options: dict[str, Any], parts: bool) -> None:
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(33, 21), torch.nn.Linear(21, 33)).bfloat16()
        self.model = FullyShardedDataParallel(net, use_orig_params=parts, device_id=torch.device("cpu"))
        self.optimizer = adamw(self.model.parameters(), **options)

    def backward(self, number: int) -> None:
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(4, 33, generator=generator).bfloat16()
        self.model(x).square().sum().backward()

    def train(self, *numbers: int) -> None:
        for number in numbers:
            self.backward(number)
            self.optimizer.step()

    def kept(self) -> list[torch.Tensor]:
        """All that a step leaves, flat."""
        found = []
        for p in self.optimizer.param_groups[0]["params"]:
            entry = self.optimizer.state[p]
            found += [p.detach(), *(entry[key] for key in sorted(entry))]
        return [t.clone().flatten() for t in found]


def differing(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> list[str]:
    same = [a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)]
    return [f"tensor {i}" for i, equal in enumerate(same) if not equal]


def stepped(options: dict[str, Any], parts: bool) -> list[str]:
    """A flat shard is kept and stepped as a matrix of one row; saved on each rank it goes on as it was."""
    run, again = Run(options, parts), Run(options, parts)
    shards = [p for p in run.optimizer.param_groups[0]["params"] if p.numel()]
    rows = [torch.nn.Parameter(p.detach().clone()[None]) for p in shards]
    row_run = adamw(rows, **options)
    for number in (1, 2):
        run.backward(number)
        for row, shard in zip(rows, shards, strict=True):
            row.grad = shard.grad[None].clone()
        run.optimizer.step()
        row_run.step()
    found = []
    for i, (row, shard) in enumerate(zip(rows, shards, strict=True)):
        mine, theirs = run.optimizer.state[shard], row_run.state[row]
        found += [f"keys of {i}"] * (mine.keys() != theirs.keys())
        pairs = [(shard, row), *((mine[key], theirs[key]) for key in mine)]
        found += differing([a.detach().flatten() for a, _ in pairs], [b.detach().flatten() for _, b in pairs])
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    for param, value in zip(again.model.parameters(), run.model.parameters(), strict=True):
        param.data.copy_(value.data)
    again.optimizer.load_state_dict(torch.load(file))
    for each in (run, again):
        each.train(3)
    return found + differing(run.kept(), again.kept())


def resumed(options: dict[str, Any], expanded: bool) -> list[str]:
    """What FSDP1 gathers by the parameters' names, and gives back to each rank, is what there was.

    Not with use_orig_params=True: on CPUs torch 2.13 gives exp_avg there what exp_avg_sq has, also of its own
    optimizers.
    """
    run, again = Run(options, parts=False), Run(options, parts=False)
    run.train(1, 2)
    given = (run.optimizer.expanded_state_dict(),) if expanded else ()
    saved = FullyShardedDataParallel.optim_state_dict(run.model, run.optimizer, *given)
    names = sorted(saved["state"]) if dist.get_rank() == 0 else ["0.bias", "0.weight", "1.bias", "1.weight"]
    found = [] if names == ["0.bias", "0.weight", "1.bias", "1.weight"] else names
    again.optimizer.load_state_dict(
        FullyShardedDataParallel.optim_state_dict_to_load(again.model, again.optimizer, saved)
    )
    for param, value in zip(again.model.parameters(), run.model.parameters(), strict=True):
        param.data.copy_(value.data)
    for each in (run, again):
        each.train(3)
    return found + differing(run.kept(), again.kept())


def refused(options: dict[str, Any], parts: bool) -> list[str]:
    """What is said where FSDP1 asks for what it cannot gather, by itself or for torch's state dicts."""
    run = Run(options, parts)
    run.train(1)
    said = []
    for ask in (
        lambda: FullyShardedDataParallel.optim_state_dict(run.model, run.optimizer),
        lambda: states.get_optimizer_state_dict(run.model, run.optimizer),
        lambda: run.optimizer.master_state_dict(run.model),
        lambda: run.optimizer.load_master_state_dict(run.model, {}),
    ):
        try:
            ask()
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return said


def warned() -> list[str]:
    """A flat parameter beside a matrix has no rows all the same."""
    run = Run({"centralize": True}, parts=False)
    run.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, 2))]})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run.train(1)
    return [str(one.message) for one in told if "without rows" in str(one.message)]


def flat() -> dict[str, Any]:
    """What is not as it should be, by what was tried."""
    storage.FLAT = 256  # shards here have 700 elements
    found: dict[str, Any] = {}
    found["flat: stepped"] = stepped(SPLIT8, parts=False)
    found["parts: stepped"] = stepped(SPLIT8, parts=True)
    found["flat: expanded"] = resumed(BYTES, expanded=True)
    found["flat: gathered"] = resumed(COPIED, expanded=False)
    found["flat refused"] = {name: refused(*case) for name, case in REFUSED.items()}
    found["flat warned"] = warned()
    return found
