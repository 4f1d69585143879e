"""A plan on paper is held to what FSDP2 really leaves on a GPU, and to what the engine launches there."""

from math import prod

import pytest
import torch
import torch.distributed as dist
from cases import prepared
from plan_subjects import ALONE, LONG, TINY, placements_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fusedcalib
import fusedcalib.executors.choose
from fusedcalib.bench.measure.baselines import METHODS, centralize_, options_of
from fusedcalib.bench.measure.method import SUBJECTS
from fusedcalib.bench.models import shardings
from fusedcalib.bench.models.architectures import Model, Param
from fusedcalib.bench.models.shardings import Sharding
from fusedcalib.bench.predict import plan_steps
from fusedcalib.executors.triton import run as gpu
from fusedcalib.kernels import launch

ADAMW = SUBJECTS["AdamW"]


class Counted:
    """A kernel that is counted where it would be launched."""

    def __init__(self, names, name):
        self.names, self.name = names, name

    def __getitem__(self, grid):
        return lambda *args, **constants: self.names.append(self.name)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that the engine launches on the CPU in place of a GPU."""
    pytest.importorskip("triton")
    names = []
    for part in launch.KERNELS:
        monkeypatch.setitem(launch.KERNELS, part, Counted(names, part))
    for kernel in ("norm_kernel", "control_kernel"):
        monkeypatch.setattr(launch, kernel, Counted(names, kernel))
    monkeypatch.setattr(gpu, "interpreted", lambda: True)
    fusedcalib.executors.choose.choose.cache_clear()
    yield names
    fusedcalib.executors.choose.choose.cache_clear()


@pytest.fixture
def ranks(monkeypatch):
    """`ranks(n)`: makes this process the first of so many, and returns the bytes of each all-reduce."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sent = []

    def begin(count):
        dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
        monkeypatch.setattr(dist, "all_reduce", lambda t, **_: sent.append(t.numel() * t.element_size()))
        return sent

    yield begin
    if dist.is_initialized():
        dist.destroy_process_group()


def real_parameters(model, layout):
    """The parameters of the first rank, with the gradients that FSDP2's reduce-scatter would leave."""
    mesh = None
    if layout.mesh:
        names, sizes = zip(*layout.mesh.dims, strict=True)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    for unit in shardings._units(model.params):
        shapes = [shardings.local_shape(param, layout) for param in unit]
        flat = torch.zeros(sum(map(prod, shapes)))
        firsts = [sum(map(prod, shapes[:i])) for i in range(len(shapes))]
        for param, shape, first in zip(unit, shapes, firsts, strict=True):
            local = torch.zeros(shape)
            grad = flat[first : first + prod(shape)].view(shape) if layout.fsdp > 1 else torch.zeros(shape)
            if mesh:
                place = (mesh, placements_of(param, layout))
                like = {"shape": torch.Size(param.shape), "stride": torch.empty(param.shape).stride()}
                local, grad = (DTensor.from_local(t, *place, run_check=False, **like) for t in (local, grad))
            made = torch.nn.Parameter(local)
            made.grad = grad
            yield shardings.kind_of(param), made


def real_step(name, model, layout, subject=ADAMW):
    """Launches of a real step on the first rank, and bytes of its memory."""
    plain = {"weight_decay": 0.0, "centralize": False}
    kinds = {"weight": {}, "embedding": {"centralize": False}, "vector": plain}
    params = list(real_parameters(model, layout))
    groups = [{"params": [p for k, p in params if k == kind], **own} for kind, own in kinds.items()]
    method = METHODS[name]
    options = {"backend": "triton", **subject.options, **options_of(method.extras)}
    optimizer = getattr(fusedcalib, subject.cls)([g for g in groups if g["params"]], **options)
    launches = prepared(optimizer).step()
    tensors = [
        t for bucket in optimizer._engine.plan.buckets for slot in bucket.slots for t in slot.tensors()
    ]
    return launches, sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name", ["own_plain", "own_gc", "own_clip", "own_chain"])
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (LONG, ALONE),
        (TINY, ALONE),
        (TINY, Sharding(1, 2, 1)),
        (TINY, Sharding(1, 64, 1)),  # norms of two elements: gradients behind them are not aligned
        (TINY, Sharding(2, 3, 1)),
        (TINY, Sharding(1, 2, 4)),
        (TINY, Sharding(2, 2, 2)),
        (TINY, Sharding(1, 1, 2)),
    ],
    ids=lambda of: getattr(of, "name", str(of)),
)
def test_launches_and_collectives_are_those_of_the_engine(name, model, layout, launched, ranks):
    planned = plan_steps.step_of(name, ADAMW, "fp32", shardings.shards(model, layout), layout)
    sent = ranks(layout.gpus)
    launches, kept = real_step(name, model, layout)
    assert planned.launches == launches == len(launched)
    assert [one.bytes for one in planned.collectives] == sent
    assert planned.kept == kept


# -- what torch does


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(10, 14, bias=False), nn.Linear(14, 10, bias=False)
        self.norm = nn.RMSNorm(10)

    def forward(self, x):
        return x + self.down_proj(self.up_proj(self.norm(x)))


class Net(nn.Module):
    """A language model as small as can be, with names as in Llama."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 10)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm, self.lm_head = nn.RMSNorm(10), nn.Linear(10, 11, bias=False)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x)).clone()


def spread(net, layout):
    """As torchtitan spreads Llama: tensor parallel, then FSDP2 by layer."""
    names, sizes = zip(*layout.mesh.dims, strict=True)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    if layout.tp > 1:
        rows, columns = RowwiseParallel(output_layouts=Shard(1)), ColwiseParallel(input_layouts=Shard(1))
        embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
        ends = {"embed_tokens": embedding, "norm": SequenceParallel(), "lm_head": head}
        parallelize_module(net, mesh["tp"], ends)
        for layer in net.layers:
            plan = {"norm": SequenceParallel(), "up_proj": columns, "down_proj": rows}
            parallelize_module(layer, mesh["tp"], plan)
        mesh = mesh[tuple(name for name in names if name != "tp")]
    for module in (*net.layers, net):
        fully_shard(module, mesh=mesh)


@pytest.fixture(params=[Sharding(1, 3, 1), Sharding(2, 3, 2)], ids=str)
def trained(request, ranks):
    """A model after a backward pass on the first rank of a layout, the same as a list, and the layout."""
    layout = request.param
    ranks(layout.gpus)
    net = Net()
    model = Model("net", tuple(Param(name, tuple(p.shape)) for name, p in net.named_parameters()))
    spread(net, layout)
    net(torch.zeros(2, 4, dtype=torch.int64)).sum().backward()
    return net, model, layout


def test_parts_and_gradients_lie_where_fsdp2_leaves_them(trained):
    net, model, layout = trained
    found = {}
    for unit in shardings._units(model.params):
        offset = 0
        for param in unit:
            shape = shardings.local_shape(param, layout)
            found[param.name] = (shape, offset, tuple(placements_of(param, layout)))
            offset += prod(shape)
    assert found == {
        name: (tuple(p._local_tensor.shape), p.grad._local_tensor.storage_offset(), p.placements)
        for name, p in net.named_parameters()
    }
    offsets = sorted(shard.offset for shard in shardings.shards(model, layout).elements())
    assert offsets == sorted(offset for _, offset, _ in found.values())


def test_clipping_and_centring_by_hand_send_what_torch_sends(trained):
    net, model, layout = trained
    params = [p for name, p in net.named_parameters() if "embed" not in name]
    calls = {
        "eager_clip": lambda: nn.utils.clip_grad_norm_(params, 1.0, foreach=True),
        "eager_gc_fused": lambda: centralize_(params),
    }
    for name, call in calls.items():
        planned = plan_steps.step_of(name, ADAMW, "fp32", shardings.shards(model, layout), layout)
        with CommDebugMode() as sent:
            call()
        assert sent.get_total_counts() == len(planned.collectives)
