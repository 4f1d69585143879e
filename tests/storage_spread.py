"""Parameters over ranks (DTensor) whose states and weights are in bytes, each beside one process."""

from typing import Any

import torch
import torch.distributed as dist
from storage_runs import LEAST, adamw
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fusedcalib

BYTES = {"state_dtype": "8bit", **LEAST}
OPTIONS: dict[str, dict[str, Any]] = {
    "split8, 8bit": {"master_weights": "split8", **BYTES},
    "split16, 8bit": {"master_weights": "split16", **BYTES},
    "split8 at random, 8bit": {"master_weights": "split8", "stochastic_rounding": True, **BYTES},
    "float32, of each": {
        "master_weights": "float32",
        "state_dtype": {"exp_avg": "8bit", "exp_avg_sq": "bfloat16_stochastic"},
        **LEAST,
    },
}
SHARDED = ((20, 100), (7, 200), (3, 90), (1, 300), (9,), (4, 3, 10, 10))


def spread(t: torch.Tensor, *placements: Any) -> DTensor:
    """By one dimension of a mesh or by two. Every rank has the whole."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,) if len(placements) == 1 else (2, ranks // 2))
    own = [p if getattr(p, "dim", 0) < t.ndim else Replicate() for p in placements]
    return distribute_tensor(t, mesh, own, src_data_rank=None)


def gradient(p: torch.Tensor, number: int) -> torch.Tensor:
    """The part here of a gradient that depends on the number and the shape only."""
    generator = torch.Generator().manual_seed(1000 * number + sum(p.shape))
    whole = torch.randn(p.shape, generator=generator) * torch.randn(p.shape, generator=generator).exp()
    if not isinstance(p, DTensor):
        return whole.to(p.dtype)
    return distribute_tensor(whole.to(p.dtype), p.device_mesh, p.placements, src_data_rank=None)


def train(optimizer: torch.optim.Optimizer, *numbers: int) -> None:
    for number in numbers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = gradient(p, number)
        optimizer.step()
        optimizer.zero_grad()


def differing(run: torch.optim.Optimizer, whole: torch.optim.Optimizer) -> list[str]:
    """What of parameters and states is not that of one process, to the last bit, shape or dtype."""
    found = []
    for group, other in zip(run.param_groups, whole.param_groups, strict=True):
        for i, (p, q) in enumerate(zip(group["params"], other["params"], strict=True)):
            if run.state[p].keys() != whole.state[q].keys():
                found.append(f"keys of {i}: {[*run.state[p]]}")
                continue
            pairs = [("parameter", p, q), *((k, t, whole.state[q][k]) for k, t in run.state[p].items())]
            for name, mine, theirs in pairs:
                if isinstance(p, DTensor) and name != "step":
                    assert isinstance(mine, DTensor)
                    assert mine.placements == p.placements
                mine = (mine.full_tensor() if isinstance(mine, DTensor) else mine).detach()
                if mine.dtype != theirs.dtype or not torch.equal(mine, theirs.detach()):
                    found.append(f"{name} of {i}")
    return found


def pair(cls: Any, shapes: Any, *placements: Any, **options: Any) -> tuple[Any, Any]:
    """Optimizers of the same parameters, spread and in one process."""
    torch.manual_seed(0)
    start = [torch.randn(shape).bfloat16() for shape in shapes]
    parts = [torch.nn.Parameter(spread(t, *placements)) for t in start]
    whole = [torch.nn.Parameter(t.clone()) for t in start]
    return tuple(cls(ps, lr=0.01, weight_decay=0.1, backend="eager", **options) for ps in (parts, whole))


def sharded(cls: Any, shapes: Any, *placements: Any, **options: Any) -> list[str]:
    """After three steps, of which some ranks have nothing in some parameters."""
    runs = pair(cls, shapes, *placements, **options)
    for run in runs:
        train(run, 1, 2, 3)
    return differing(*runs)


def converted(placement: Any) -> list[str]:
    """States and weights that change what they are kept in between steps."""
    runs = pair(fusedcalib.AdamW, SHARDED, placement, state_dtype="float32", master_weights="float32")
    for run in runs:
        train(run, 1)
        for options in (*OPTIONS.values(), {"state_dtype": "float32"}, BYTES, {"master_weights": "none"}):
            run.param_groups[0].update({"stochastic_rounding": False, **options})
            train(run, 2)
    return differing(*runs)


def grids() -> dict[str, list[str]]:
    """On two dimensions of a mesh: copies of rows, rows cut twice, rows and columns, columns cut twice."""
    wide = ((8, 256), (6, 4, 8, 8), (1, 512))
    found = {}
    for name, options in OPTIONS.items():
        for placements in (
            (Replicate(), Shard(0)),
            (Shard(0), Shard(0)),
            (Shard(0), Shard(1)),
            (Shard(1), Shard(1)),
        ):
            found[f"{placements}, {name}"] = sharded(fusedcalib.AdamW, wide, *placements, **options)
    twice = pair(fusedcalib.AdamW, ((8, 128),), Shard(1), Shard(1), **BYTES)[0]
    try:
        train(twice, 1)
        found["cut twice"] = ["not refused"]
    except RuntimeError as error:
        found["cut twice"] = [] if "cut by 4 ranks" in str(error) else [str(error)]
    return found | {"fsdp x tp": both()}


def both() -> list[str]:
    """FSDP2 over tensor parallel: of the first layer rows are cut by both, the later first."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    runs = []
    for is_spread in (True, False):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(100, 22), torch.nn.Linear(256, 9)).bfloat16()
        if is_spread:
            parallelize_module(model, mesh["inner"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
            fully_shard(model, mesh=mesh["outer"])
        runs.append(adamw(model.parameters(), **OPTIONS["split8 at random, 8bit"]))
        train(runs[-1], 1, 2, 3)
    return differing(*runs)


def cut(ranks: int, shape: tuple[int, ...], dim: int) -> list[str]:
    """What is said where ranks would share blocks, and what has changed all the same."""
    run, whole = pair(fusedcalib.Lion, [(4, 64 * ranks), shape], Shard(dim), **BYTES)
    try:
        train(run, 1)
    except RuntimeError as error:
        made = ["state"] * len(run.state)
        return [str(error), *made, *differing(run, whole)]
    return []


def left_out(rank: int) -> list[str]:
    """One rank has a gradient that is not finite: no rank steps. Then all do."""
    runs = pair(fusedcalib.AdamW, SHARDED, Shard(0), skip_nonfinite=True, **OPTIONS["split8, 8bit"])
    for run in runs:
        train(run, 1)
    for p in runs[0].param_groups[0]["params"]:
        p.grad = gradient(p, 2)
    if rank == 0:
        runs[0].param_groups[0]["params"][0].grad.to_local()[0, 0] = float("inf")
    runs[0].step()
    found = differing(*runs)
    for run in runs:
        train(run, 2)
    return found + differing(*runs) + ["counted"] * (int(runs[0].skipped_steps) != 1)
