"""One rank of the distributed tests: each case beside the same run in one process. Not a test by itself.

python tests/distributed_run.py RANK RANKS STORE OUT
"""

import copy
import datetime
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rule_cases import RULES
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fusedcalib
from fusedcalib import GradientNoise

# Even and uneven rows, fewer rows than ranks, a convolution, vectors, a scalar.
SHAPES = ((8, 8), (5, 7), (1, 6), (4, 3, 2, 2), (9,), (1,), (12, 4))
STEPS = 4
LOOPS = importlib.util.find_spec("numba") is not None  # each rank compiles them: two suffice
CHAIN = {"max_grad_norm": 2.0, "noise": GradientNoise(0.1), "ema_decay": 0.9, "seed": 3, "weight_decay": 0.1}
CHAIN["centralize"] = True
OF_ROWS = {**CHAIN, "centralize": "update", "max_row_norm": 2.0}


def layouts(ranks: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Mesh and placements."""
    line = init_device_mesh("cpu", (ranks,))
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "fsdp": (line, (Shard(0),)),
        "ddp": (line, (Replicate(),)),
        "tp of rows": (line, (Shard(1),)),
    }
    if ranks == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        found["hsdp"] = (square, (Replicate(), Shard(0)))
        found["fsdp x tp of rows"] = (square, (Shard(0), Shard(1)))
        found["fsdp x tp"] = (square, (Shard(0), Shard(0)))
        found["rows over both"] = (square, (Shard(1), Shard(1)))
    return found


def spread(t: torch.Tensor, mesh: Any, placements: tuple[Any, ...]) -> DTensor:
    """Shards of vectors by their only dimension; copies of what has none."""
    own = [p if not p.is_shard() or p.dim < t.ndim else Replicate() for p in placements]
    return distribute_tensor(t, mesh, own)


def trial(rule: str, options: dict[str, Any], mesh: Any, placements: tuple[Any, ...]) -> dict[str, float]:
    """How far parameters, averages and norm lie from those of one process; collectives of a step."""
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    whole = [torch.nn.Parameter(t.clone()) for t in start]
    parts = [torch.nn.Parameter(spread(t, mesh, placements)) for t in start]
    runs = [RULES[rule].ours(params, **options) for params in (whole, parts)]
    counted = []
    original = dist.all_reduce
    for _ in range(STEPS):
        gradients = [torch.randn_like(t) for t in start]
        for p, q, g in zip(whole, parts, gradients, strict=True):
            p.grad, q.grad = g, spread(g, mesh, placements)
        runs[0].step()
        calls: list[int] = []
        dist.all_reduce = lambda *a, calls=calls, **k: (calls.append(1), original(*a, **k))[1]
        try:
            runs[1].step()
        finally:
            dist.all_reduce = original
        counted.append(len(calls))
    errors = [(p - q.full_tensor()).abs().max().item() for p, q in zip(whole, parts, strict=True)]
    for p, q in zip(whole, parts, strict=True):
        for name, value in runs[0].state[p].items():
            other = runs[1].state[q][name]
            if name not in ("step", "mu_product"):
                assert isinstance(other, DTensor)
                assert other.placements == q.placements
                other = other.full_tensor()
            errors.append((value - other).abs().max().item())
    if "max_grad_norm" in options:
        errors.append(abs(runs[0].grad_norm.item() - runs[1].grad_norm.item()))
    split = sum(p.is_shard() and p.dim > 0 for p in placements)
    stages = bool(options.get("centralize")) + ("max_row_norm" in options)
    expected = mesh.ndim * ("max_grad_norm" in options) + split * stages
    return {"error": max(errors), "collectives": max(counted), "expected": expected}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = torch.nn.Linear(6, 7), torch.nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


def trained(model: Net, optimizer: Any, steps: range) -> None:
    """Every rank has the same batch, so that the mean of their gradients is each one's."""
    for step in steps:
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()


def fsdp(ranks: int, folder: str) -> dict[str, float]:
    """fully_shard, a checkpoint in the middle, going on with it in a new model and in one process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as states
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    options = {**CHAIN, "lr": 0.05, "centralize": True, "backend": "eager"}

    def sharded() -> tuple[Net, Any]:
        model = Net()
        for layer in (model.first, model.last, model):
            fully_shard(layer, mesh=mesh)
        return model, fusedcalib.AdamW(list(model.named_parameters()), **options)

    def saved(model: Net, optimizer: Any) -> dict[str, Any]:
        return {
            "model": states.get_model_state_dict(model),
            "optim": states.get_optimizer_state_dict(model, optimizer),
        }

    whole = Net()
    reference = fusedcalib.AdamW(list(whole.named_parameters()), **options)
    trained(whole, reference, range(6))
    model, optimizer = sharded()
    trained(model, optimizer, range(3))
    dcp.save(saved(model, optimizer), checkpoint_id=folder)
    again, resumed = sharded()
    for p in again.parameters():
        torch.nn.init.zeros_(p)
    state = saved(again, resumed)
    dcp.load(state, checkpoint_id=folder)
    states.set_model_state_dict(again, state["model"])
    states.set_optimizer_state_dict(again, resumed, state["optim"])
    trained(again, resumed, range(3, 6))
    trained(model, optimizer, range(3, 6))
    alone = Net()
    solo = fusedcalib.AdamW(list(alone.named_parameters()), **options)
    state = saved(alone, solo)
    dcp.load(state, checkpoint_id=folder)
    states.set_model_state_dict(alone, state["model"])
    states.set_optimizer_state_dict(alone, solo, state["optim"])
    trained(alone, solo, range(3, 6))
    expected = {name: p.detach() for name, p in whole.named_parameters()}
    found = [(name, p.full_tensor()) for m in (model, again) for name, p in m.named_parameters()]
    found += [(name, p.detach()) for name, p in alone.named_parameters()]
    return {"error": max((p - expected[name]).abs().max().item() for name, p in found)}


def virtual(rank: int, ranks: int) -> dict[str, float]:
    """A part of each batch on every rank: weights and r beside those of the whole batch in one process."""
    torch.manual_seed(2)
    layers = (torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))
    whole = torch.nn.Sequential(*layers).double()
    model = copy.deepcopy(whole)
    fusedcalib.nn.virtualize(whole, scale=0.1, sync=False)
    fusedcalib.nn.virtualize(model, scale=0.1)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(3):
        x, y = torch.randn(2 * ranks, 1, 8, 8, dtype=torch.float64), torch.randint(3, (2 * ranks,))
        for net, part in ((whole, slice(None)), (wrapped, slice(2 * rank, 2 * rank + 2))):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    found = zip(whole.state_dict().values(), model.state_dict().values(), strict=True)
    errors = torch.stack([(a - b).abs().max() for a, b in found])
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    return {"error": errors.max().item(), "moved": whole[0].r.max().item()}


def main(rank: int, ranks: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{store}", timeout, ranks, rank)
    found: dict[str, Any] = {"fully_shard": fsdp(ranks, f"{out}.checkpoint")}
    if ranks == 2:
        found["virtual layers"] = virtual(rank, ranks)
    for name, (mesh, placements) in layouts(ranks).items():
        rules = RULES if (ranks, name) in ((2, "fsdp"), (2, "tp of rows")) else ("SGD", "AdamW")
        for rule in rules:
            options = {**RULES[rule].options, **CHAIN, "backend": "eager"}
            found[f"{rule}, {name}"] = trial(rule, options, mesh, placements)
        for words, others in (("plain", {}), ("update", OF_ROWS)):
            options = {"backend": "eager", "lr": 0.1, **others}
            found[f"AdamW, {words}, {name}"] = trial("AdamW", options, mesh, placements)
        if LOOPS and (ranks, name) == (2, "tp of rows"):
            options = {**CHAIN, "max_row_norm": 2.0, "backend": "numba", "lr": 0.1}
            found[f"SGD by loops, {name}"] = trial("SGD", options, mesh, placements)
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
