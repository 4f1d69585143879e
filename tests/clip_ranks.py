"""Gradients clipped over ranks, each case beside the same in one process. Not a test by itself.

python tests/clip_ranks.py FOLDER RANKS
"""

import datetime
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fusedcalib

SHAPES = ((8, 8), (5, 7), (1, 6), (3, 1), (9,))  # even, uneven and empty shards


def parameter(value: torch.Tensor, grad: torch.Tensor) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.zeros_like(value))
    p.grad = grad
    return p


def spread(g: torch.Tensor, mesh: Any, *placements: Any) -> torch.nn.Parameter:
    own = [Replicate() if p.is_shard() and p.dim >= g.ndim else p for p in placements]
    d = distribute_tensor(g.clone(), mesh, own, src_data_rank=None)
    return parameter(d, d)


def plain(g: torch.Tensor) -> torch.nn.Parameter:
    return parameter(g, g.clone())


def gradients(count: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(SHAPES[i % len(SHAPES)], dtype=torch.float64) for i in range(count)]


def compared(
    params: list[Any], grads: list[torch.Tensor], max_norm: float = 1.0, p: float = 2.0, **options: Any
) -> dict[str, Any]:
    """How far norm and gradients lie from those of one process by torch; collectives."""
    whole = [plain(g) for g in grads]
    expected = torch.nn.utils.clip_grad_norm_(whole, max_norm, p)
    calls: list[int] = []
    original = dist.all_reduce
    dist.all_reduce = lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    try:
        norm = fusedcalib.clip_grad_norm_(params, max_norm, p, **options)
    finally:
        dist.all_reduce = original
    error = abs(norm - expected).item()
    for mine, other in zip(params, whole, strict=False):
        if mine.grad is None:
            continue
        grad = mine.grad.full_tensor() if isinstance(mine.grad, DTensor) else mine.grad
        if grad.shape == other.grad.shape:
            error = max(error, (grad - other.grad).abs().max().item())
    return {"error": error, "norm": norm.item(), "collectives": len(calls)}


def failures(params: list[Any]) -> str:
    """What torch's own says to them; "" where it works."""
    try:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
    except Exception as error:
        return type(error).__name__
    return ""


def meshes(ranks: int) -> dict[str, Any]:
    """A list that has parameters of several meshes, and plain ones beside them."""
    line = init_device_mesh("cpu", (ranks,))
    square = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
    grads = gradients(5)
    places: list[Any] = [(line, (Shard(0),)), (square, (Replicate(), Shard(0))), (line, (Replicate(),))]
    places.append((square, (Shard(0), Shard(1))))

    def mixed() -> list[Any]:
        return [*(spread(g, m, *p) for g, (m, p) in zip(grads, places, strict=False)), plain(grads[4])]

    found = {"mixed": compared(mixed(), grads), "mixed of torch": failures(mixed())}
    found["mixed, inf"] = compared(mixed(), grads, p=math.inf)
    found["mixed, 3"] = compared(mixed(), grads, p=3.0)
    many = gradients(40)
    found["fsdp, 5"] = compared([spread(g, line, Shard(0)) for g in grads], grads)
    found["fsdp, 40"] = compared([spread(g, line, Shard(0)) for g in many], many)
    found["tp, 5"] = compared([spread(g, line, Shard(1)) for g in grads], grads)
    return found


def experts(rank: int, ranks: int) -> dict[str, Any]:
    """Plain experts, one on each rank, beside a dense parameter that all have; stages of a pipeline."""
    line = init_device_mesh("cpu", (ranks,))
    dense, *others = gradients(ranks + 1)
    mine = plain(others[rank])
    found = {}
    for name, group in {"group": dist.group.WORLD, "mesh": line}.items():
        params = [plain(dense), mine] if name == "group" else [spread(dense, line, Shard(0)), mine]
        mine.grad = others[rank].clone()
        pairs = [([mine], group)]
        found[f"experts, {name}"] = compared(params, [dense, *others], process_groups=pairs)
    mine.grad = others[rank].clone()
    found["experts by torch"] = torch.nn.utils.clip_grad_norm_([plain(dense), mine], 1e9).item()
    mine.grad = others[rank].clone()
    found["stages"] = compared([mine], others, process_groups=dist.group.WORLD)
    unused = plain(others[rank])
    if rank:
        unused.grad = None
    kept = [dense, others[0]]
    found["unused"] = compared([plain(dense), unused], kept, process_groups=([unused], line))
    return found


def special(rank: int, ranks: int) -> dict[str, Any]:
    line = init_device_mesh("cpu", (ranks,))
    grads = gradients(3)
    dropped = [spread(g, line, Shard(0)) for g in grads]
    dropped[1].grad = None
    found = {"missing": compared(dropped[:1] + dropped[2:] + dropped[1:2], [grads[0], grads[2]])}
    bad = grads[0].clone()
    bad[-1, -1] = math.nan  # on the last rank only
    named = [("a", spread(grads[1], line, Shard(0))), ("b", spread(bad, line, Shard(0)))]
    named.append(("c", spread(grads[2], line, Replicate())))
    before = [p.grad.to_local().clone() for _, p in named]
    try:
        fusedcalib.clip_grad_norm_(named, 1.0, error_if_nonfinite=True)
        found["raised"] = ""
    except RuntimeError as error:
        found["raised"] = str(error)
    same = zip(before, named, strict=True)
    found["kept"] = all(torch.equal(b.nan_to_num(), p.grad.to_local().nan_to_num()) for b, (_, p) in same)
    found["named"] = fusedcalib.nonfinite_gradients(named)
    found["nan, inf-norm"] = math.isnan(fusedcalib.clip_grad_norm_(named, 1.0, math.inf).item())
    part = spread(grads[0], line, Shard(0))
    local = grads[0] * (rank + 1) / sum(range(1, ranks + 1))
    part.grad = DTensor.from_local(local, line, [Partial()])
    found["partial"] = compared([part], grads[:1])
    limit = fusedcalib.AdaGC(warmup_steps=1)
    for scale in (1.0, 10.0):
        params = [spread(g * scale, line, Shard(0)) for g in grads]
        fusedcalib.clip_grad_norm_(params, limit)
    one, whole = fusedcalib.AdaGC(warmup_steps=1), []
    for scale in (1.0, 10.0):
        whole = [plain(g * scale) for g in grads]
        fusedcalib.clip_grad_norm_(whole, one)
    pairs = zip(params, whole, strict=True)
    found["adagc"] = max((p.grad.full_tensor() - q.grad).abs().max().item() for p, q in pairs)
    return found


def main(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout, ranks, rank)
    found = {**meshes(ranks), **experts(rank, ranks), **special(rank, ranks)}
    told: list[Any] = [None] * ranks
    dist.all_gather_object(told, found)
    if rank == 0:
        (Path(folder) / f"{ranks}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(main, (int(sys.argv[2]), sys.argv[1]), nprocs=int(sys.argv[2]), start_method="fork")
