"""Models on several ranks, as PyTorch wraps them: DDP, FSDP2, tensor parallel, both, HSDP.

Every rank has the same batch, so that the mean of their gradients is each one's, and one process takes the
same steps.
"""

import copy
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import fusedcalib
import fusedcalib.nn
from fusedcalib import GradientNoise

STEPS = 20
OPTIONS: dict[str, Any] = {
    "lr": 0.05,
    "centralize": True,
    "max_row_norm": 1.0,
    "max_grad_norm": 0.5,
    "noise": GradientNoise(0.1),
    "ema_decay": 0.9,
    "backend": "eager",
}
WRITERS = {(2, "fsdp"), (4, "fsdp x tp")}
MODES = {2: ("ddp", "fsdp", "tp"), 4: ("fsdp", "tp", "hsdp", "fsdp x tp")}


class Net(torch.nn.Module):
    """Its first layer can be cut by rows, its second by columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.last = (torch.nn.Linear(n, m) for n, m in ((6, 8), (8, 7), (7, 3)))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def wrapped(mode: str, ranks: int) -> tuple[Net, Any]:
    """The model, and what is called; 7 and 3 rows are not divisible."""
    model: Net = Net()
    if mode == "alone":
        return model, model
    if mode == "ddp":
        return model, torch.nn.parallel.DistributedDataParallel(model)
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    if mode == "tp":
        parallelize_module(model, init_device_mesh("cpu", (ranks,)), plan)
        return model, model
    mesh = init_device_mesh("cpu", (ranks,))
    if mode != "fsdp":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("outer", "inner"))
    if mode == "fsdp x tp":
        parallelize_module(model, mesh["inner"], plan)
        mesh = mesh["outer"]
    for layer in (model.first, model.second, model.last, model):
        fully_shard(layer, mesh=mesh)
    return model, model


class Run:
    """A model and its optimizer."""

    def __init__(self, mode: str, ranks: int, **options: Any) -> None:
        self.model, self.called = wrapped(mode, ranks)
        named = list(self.model.named_parameters())
        self.optimizer = fusedcalib.AdamW(named, **{**OPTIONS, **options})

    def train(self, steps: Iterable[int]) -> "Run":
        for step in steps:
            torch.manual_seed(100 + step)
            self.optimizer.zero_grad()
            self.called(torch.randn(5, 6, dtype=torch.float64)).square().mean().backward()
            self.optimizer.step()
        return self

    def state(self) -> dict[str, Any]:
        return {
            "model": states.get_model_state_dict(self.model),
            "optim": states.get_optimizer_state_dict(self.model, self.optimizer),
        }

    def resumed(self, folder: Path) -> "Run":
        for p in self.model.parameters():
            torch.nn.init.zeros_(p)
        saved = self.state()
        dcp.load(saved, checkpoint_id=str(folder))
        states.set_model_state_dict(self.model, saved["model"])
        states.set_optimizer_state_dict(self.model, self.optimizer, saved["optim"])
        return self

    def distance(self, other: "Run") -> float:
        """Largest difference of parameters, states and averages."""
        errors = []
        for p, q in zip(self.model.parameters(), other.model.parameters(), strict=True):
            pairs = [(p, q), *((t, other.optimizer.state[q][k]) for k, t in self.optimizer.state[p].items())]
            errors += [(full(a) - full(b)).abs().max().item() for a, b in pairs]
        return max(errors)


def full(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def runs(ranks: int, folder: Path) -> dict[str, float]:
    """How far each mode is from one process; the same for those that go on from a checkpoint.

    Two ranks write it first, and four ranks read it. These write another by "fsdp x tp",
    which one process reads, and a mode that cuts otherwise.
    """
    half, rest = range(STEPS // 2), range(STEPS // 2, STEPS)
    whole = Run("alone", ranks).train((*half, *rest))
    found = {}
    for mode in MODES[ranks]:
        run = Run(mode, ranks).train(half)
        if (ranks, mode) in WRITERS:
            dcp.save(run.state(), checkpoint_id=str(folder / f"checkpoint{ranks}"))
        found[mode] = run.train(rest).distance(whole)
    resumed = [(mode, 2) for mode in (*MODES[ranks], "alone") if mode != "ddp"]
    for mode, writers in resumed + ([("tp", 4), ("alone", 4)] if ranks == 4 else []):
        run = Run(mode, ranks).resumed(folder / f"checkpoint{writers}")
        found[f"{mode}, resumed of {writers}"] = run.train(rest).distance(whole)
    return found


class Watching(TorchDispatchMode):
    """Counts operations on DTensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(issubclass(t, DTensor) for t in types)
        return func(*args, **(kwargs or {}))


def long(ranks: int) -> dict[str, float]:
    """200 steps of FSDP2: what is left behind, and what a step does with DTensors."""
    run = Run("fsdp", ranks).train(range(50))
    before = _left()
    run.train(range(50, 200))
    after = _left()
    with Watching() as mode:
        run.optimizer.step()
    return {
        "objects": after[0] - before[0],
        "DTensors": after[1] - before[1],
        "pages": after[2] - before[2],
        "dispatched": mode.count,
    }


def _left() -> tuple[int, int, int]:
    """Objects that Python knows, DTensors among them, pages of memory that the process holds."""
    gc.collect()
    known = gc.get_objects()
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return len(known), sum(type(o) is DTensor for o in known), resident


def scaler(rank: int) -> dict[str, Any]:
    """One element of one rank's gradient is not finite: whether this rank left the step out, and the next."""
    found = {}
    mesh = init_device_mesh("cpu", (2,))
    for way, options in {"scaler": {"fused": True}, "skip_nonfinite": {"skip_nonfinite": True}}.items():
        p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        optimizer = fusedcalib.SGD([p], lr=0.5, backend="eager", **options)
        amp = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=way == "scaler")
        moved = []
        for bad in (True, False):
            gradient = torch.ones(4, 3)
            gradient[3, 0] = float("inf") if bad else 1.0
            amp.scale(p.full_tensor().sum())
            p.grad = distribute_tensor(gradient * amp.get_scale(), mesh, [Shard(0)])
            amp.step(optimizer)
            amp.update()
            moved.append(p.to_local()[0, 0].item())
        told = [None, None]
        dist.all_gather_object(told, (moved, int(optimizer.skipped_steps)))
        found[way] = told
    return found


def embedded(ranks: int) -> dict[str, float]:
    """A RowwiseParallel embedding, whose gradient every rank has whole; and how often a step was laid out."""
    distances, plans = [], set()
    models = [torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2)).double() for _ in "ab"]
    models[1].load_state_dict(models[0].state_dict())
    whole = Replicate()
    plan = {"0": RowwiseParallel(input_layouts=whole, output_layouts=whole), "1": ColwiseParallel()}
    parallelize_module(models[1], init_device_mesh("cpu", (ranks,)), plan)
    optimizers = [fusedcalib.AdamW(model.parameters(), **OPTIONS) for model in models]
    for _ in range(5):
        tokens = torch.randint(10, (6,))
        for model, optimizer, part in zip(models, optimizers, (slice(None), dist.get_rank()), strict=True):
            optimizer.zero_grad()
            out = model(tokens)
            weights = torch.tensor([[1.0], [2.0]], dtype=torch.float64)  # of the columns of the output
            (out * weights[part].view(1, -1)).square().sum().backward()
            optimizer.step()
        plans.add(id(optimizers[1]._engine.plan))
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        distances.append((full(p) - full(q)).abs().max().item())
    return {"error": max(distances), "plans": len(plans)}


def virtual(rank: int, ranks: int) -> dict[str, float]:
    """A part of each batch on every rank: weights and r beside those of the whole batch in one process."""
    torch.manual_seed(2)
    layers = (torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))
    whole = torch.nn.Sequential(*layers).double()
    model = copy.deepcopy(whole)
    fusedcalib.nn.virtualize(whole, scale=0.1, sync=False)
    fusedcalib.nn.virtualize(model, scale=0.1)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizers = [fusedcalib.SGD(net.parameters(), lr=0.1, backend="eager") for net in (whole, model)]
    fusedcalib.nn.scale_in_step(model, optimizers[1])
    for _ in range(3):
        x, y = torch.randn(2 * ranks, 1, 8, 8, dtype=torch.float64), torch.randint(3, (2 * ranks,))
        parts = (slice(None), slice(2 * rank, 2 * rank + 2))
        for net, part, optimizer in zip((whole, wrapped), parts, optimizers, strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    found = zip(whole.state_dict().values(), model.state_dict().values(), strict=True)
    errors = torch.stack([(a - b).abs().max() for a, b in found])
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    return {"error": errors.max().item(), "moved": whole[0].r.max().item()}
