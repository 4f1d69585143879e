"""How the model is spread over ranks, and checkpoints that do not depend on it."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model import Transformer
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read
from torch.distributed.checkpoint.state_dict_saver import save as write
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

MODES = ("single", "ddp", "fsdp2", "fsdp2-tp", "tp")


@dataclass(frozen=True)
class Share:
    """The part of a batch that this rank works on: `index` of `count`. Tensor parallel ranks share one."""

    index: int = 0
    count: int = 1
    group: Any = None

    def of(self, batch: Tensor) -> Tensor:
        return batch[self.index :: self.count]

    def mean(self, values: Tensor) -> Tensor:
        """Over the ranks with other shares, all of one size."""
        if self.count > 1:
            dist.all_reduce(values, group=self.group)
        return values / self.count


def join(device: str) -> torch.device:
    """This rank's device, its process group made: what torchrun says, or one process alone."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    own = torch.device(device)
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        launched = "WORLD_SIZE" in os.environ
        where: Any = {} if launched else {"store": HashStore(), "rank": 0, "world_size": 1}
        backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"  # checkpoints speak from the CPU
        dist.init_process_group(backend, timeout=timedelta(minutes=5), **where)
    return own


def spread(model: Transformer, mode: str, tp: int, device: torch.device) -> tuple[nn.Module, Share]:
    """What to call for a forward pass, and the share of a batch that it is for.

    Parameters are replaced in the model itself, so it and not its wrapper goes to the optimizer.

    Raises:
        ValueError: the number of ranks does not suit the mode.
    """
    ranks = dist.get_world_size()
    if mode == "single" and ranks > 1:
        raise ValueError(f"--parallel single is for one process, and there are {ranks}: choose another")
    if mode == "single":
        return model, Share()
    tp = {"tp": ranks, "fsdp2-tp": tp}.get(mode, 1)
    if ranks % tp:
        raise ValueError(f"--tp {tp} does not divide {ranks} ranks: torchrun --nproc-per-node a multiple")
    mesh = init_device_mesh(device.type, (ranks // tp, tp), mesh_dim_names=("data", "tensor"))
    data = mesh["data"]
    share = Share(data.get_local_rank(), data.size(), data.get_group())
    if tp > 1:
        by_tensor(model, mesh["tensor"])
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model, process_group=data.get_group()), share
    if mode != "tp":
        by_rows(model, data)
    return model, share


def by_tensor(model: Transformer, mesh: DeviceMesh) -> None:
    """Heads and hidden units over the ranks of a mesh: one sum after the attention and one after the MLP.

    The head's bytes are divided too. Norms and the small table of the embedding stay whole on every rank.

    Raises:
        ValueError: they cannot be divided.
    """
    first: Any = model.blocks[0]
    heads = first.attention.query.out_features // first.attention.size
    if heads % mesh.size():
        raise ValueError(f"--heads {heads} cannot be divided over {mesh.size()} tensor parallel ranks")
    split, joined = ColwiseParallel, RowwiseParallel
    for block in model.blocks:
        plan = {f"attention.{name}": split() for name in ("query", "key", "value")}
        plan |= {"mlp.gate": split(), "mlp.up": split()}
        parallelize_module(block, mesh, {**plan, "attention.out": joined(), "mlp.down": joined()})
    parallelize_module(model, mesh, {"head": split(output_layouts=Replicate())})


def by_rows(model: Transformer, mesh: DeviceMesh) -> None:
    """FSDP2: every parameter's rows over the ranks of a mesh, gathered block by block.

    The root too lets go of what it has gathered after a forward pass. Else a second validation, with other
    weights, would be made with those that the first one gathered.
    """
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # nothing is done to it in place
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def save(folder: Path, model: nn.Module, optimizer: Any, facts: dict[str, Any]) -> None:
    """A checkpoint of whole parameters by name, of which each rank writes what it has."""
    weights, state = get_state_dict(model, optimizer)
    write({"model": weights, "optimizer": state, "facts": facts}, checkpoint_id=folder)


def load(folder: Path, model: nn.Module, optimizer: Any, settings: dict[str, Any]) -> int:
    """Goes on from a checkpoint, whatever the ranks and the mode that wrote it; returns its step.

    Raises:
        ValueError: there is none, or it is of a training with other settings.
    """
    if not (folder / ".metadata").exists():
        raise ValueError(f"--resume: no checkpoint in {folder}, such as OUT/step-100")
    facts: dict[str, Any] = {"step": 0, **dict.fromkeys(settings)}
    read({"facts": facts}, checkpoint_id=folder)
    others = [f"--{key} {facts[key]}, not {value}" for key, value in settings.items() if facts[key] != value]
    if others:
        raise ValueError(f"--resume: {folder} is of a training with {', '.join(others)}")
    weights, state = get_state_dict(model, optimizer)
    read({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return int(facts["step"])
