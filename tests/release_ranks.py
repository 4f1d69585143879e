"""Gradient release of models that ranks share, by gloo, beside the same without it. Not a test by itself.

python tests/release_ranks.py FOLDER RANKS
"""

import datetime
import json
import logging
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fusedcalib

WIDTH = 64
BF16 = torch.bfloat16
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chain": {
        "noise": fusedcalib.GradientNoise(0.1),
        "centralize": True,
        "ema_decay": 0.9,
        "max_row_norm": 1.0,
    },
    "split8, 8bit": {"master_weights": "split8", "state_dtype": "8bit", "min_8bit_size": 64},
}
MODES = {2: ("fsdp", "tp"), 4: ("fsdp", "hsdp", "fsdp x tp")}


class Net(torch.nn.Sequential):
    """Rows that ranks share unevenly; a first layer for columns of the second."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        super().__init__(*(torch.nn.Linear(n, m) for n, m in ((WIDTH, 72), (72, 66), (66, 7))))
        self.to(dtype)


def spread(mode: str, ranks: int, dtype: torch.dtype) -> Net:
    """The model over the ranks; alone as it is."""
    model = Net(dtype)
    mesh = init_device_mesh("cpu", (ranks,))
    if mode in ("hsdp", "fsdp x tp"):
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("outer", "inner"))
    if mode in ("tp", "fsdp x tp"):
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        parallelize_module(model, mesh if mode == "tp" else mesh["inner"], plan)
    if mode != "tp":
        mesh = mesh["outer"] if mode == "fsdp x tp" else mesh
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
    return model


def trained(model: Net, rank: int, options: dict[str, Any], bucket_bytes: int | None) -> list[torch.Tensor]:
    """All local parts of parameters and states after three steps, the last of two micro-batches."""
    shared = {"lr": 0.01, "weight_decay": 0.1, "backend": "eager", **options}
    optimizer = fusedcalib.AdamW(model.named_parameters(), **shared)
    handle = None
    if bucket_bytes is not None:
        handle = fusedcalib.enable_gradient_release(model, optimizer, bucket_bytes)
    dtype = next(model.parameters()).dtype
    for step in range(3):
        optimizer.zero_grad()
        for last in (False, True) if step == 2 else (True,):
            torch.manual_seed(100 * step + rank + 10 * last)
            with nullcontext() if last or handle is None else handle.paused():
                model(torch.randn(5, WIDTH, dtype=dtype)).float().square().mean().backward()
        if bucket_bytes == 0:
            assert {p.grad for p in model.parameters()} == {None}
        optimizer.step()
    found = [p.detach() for p in model.parameters()]
    found += [t for p in model.parameters() for t in optimizer.state[p].values()]
    return [getattr(t, "_local_tensor", t) for t in found]


def differing(ranks: int, rank: int) -> dict[str, int]:
    """How many tensors are others than without release, by what was tried."""
    found = {}
    for mode in MODES[ranks]:
        for name, options in OPTIONS.items():
            if "tp" in mode and name != "plain":
                continue  # centring is refused, and these blocks ranks would cut
            dtype = BF16 if "split8" in name else torch.float32
            expected = trained(spread(mode, ranks, dtype), rank, options, None)
            for bucket_bytes in (0, 8_000, 1 << 30):
                tensors = trained(spread(mode, ranks, dtype), rank, options, bucket_bytes)
                pairs = zip(tensors, expected, strict=True)
                found[f"{mode}, {name}, {bucket_bytes}"] = sum(not torch.equal(a, b) for a, b in pairs)
    return found


def embedded(ranks: int) -> dict[str, int]:
    """A RowwiseParallel embedding, whose gradient every rank has whole: tensors that differ, late layouts."""
    left, late = [], []
    for release in (False, True):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2))
        plan = {"0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())}
        parallelize_module(model, init_device_mesh("cpu", (ranks,)), {**plan, "1": ColwiseParallel()})
        optimizer = fusedcalib.SGD(model.parameters(), lr=0.1, momentum=0.9, backend="eager")
        if release:
            fusedcalib.enable_gradient_release(model, optimizer, 0)
        for step in range(4):
            if step == 2:
                lay_out = optimizer._engine._lay_out
                optimizer._engine._lay_out = lambda *args, lay=lay_out: (late.append(1), lay(*args))[1]
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randint(10, (6,))).square().sum().backward()
            optimizer.step()
        left.append([p.detach()._local_tensor for p in model.parameters()])
    return {"embedded": sum(not torch.equal(a, b) for a, b in zip(*left, strict=True)), "late": len(late)}


def said(what: Any) -> str:
    """The RuntimeError of a call; "" if there is none."""
    try:
        what()
    except RuntimeError as error:
        return str(error)
    return ""


def refused(ranks: int) -> dict[str, str]:
    """What is said of models whose gradients cannot be released."""
    found = {}

    def enabled(model: torch.nn.Module, **options: Any) -> Any:
        optimizer = fusedcalib.AdamW(model.parameters(), backend="eager", **options)
        return fusedcalib.enable_gradient_release(model, optimizer, 0)

    found["rows"] = said(lambda: enabled(spread("tp", ranks, torch.float32), centralize=True))
    found["DDP"] = said(lambda: enabled(torch.nn.parallel.DistributedDataParallel(Net(torch.float32))))
    found["FSDP1"] = said(lambda: enabled(FullyShardedDataParallel(Net(torch.float32), device_id="cpu")))
    model = Net(torch.float32)
    enabled(model)
    later = torch.nn.parallel.DistributedDataParallel(model)
    found["DDP later"] = said(lambda: later(torch.randn(5, WIDTH)))
    return found


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store{ranks}", timeout, ranks, rank)
    own: dict[str, Any] = {"differing": differing(ranks, rank)}
    if ranks == 2:
        own["differing"].update(embedded(ranks))
        own["refused"] = refused(ranks)
    told: list[Any] = [None] * ranks
    dist.all_gather_object(told, own)
    if rank == 0:
        (folder / f"{ranks}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    count = int(sys.argv[2])
    mp.start_processes(main, (count, Path(sys.argv[1])), nprocs=count, start_method="fork")
