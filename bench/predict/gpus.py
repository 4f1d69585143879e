"""What a step takes, on paper: published bandwidths, and a few assumptions. Every constant stands here.

time = max(memory, host, link) + collectives
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..models.shardings import NODE, Sharding
from .plan_steps import Collective, Step


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet; bytes a second are per GPU and in one direction."""

    name: str
    memory: float  # bytes
    bandwidth: float  # of its memory, bytes a second
    link: float  # to the others of its node
    network: float  # to other nodes: a network card for each GPU, as in the makers' own systems
    target: str  # what kernels are compiled for
    processors: int
    clock: float  # the highest, Hz: on NVIDIA where 2 * lanes * processors * clock is the sheet's fp32 rate
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            *("a100", 80e9, 2.039e12, 300e9, 25e9, "sm_80", 108, 1.41e9),
            "A100 80 GB SXM data sheet: 19.5 TFLOPS, 64 lanes; DGX A100: 200 Gb/s",
        ),
        Gpu(
            *("h100", 80e9, 3.35e12, 450e9, 50e9, "sm_90", 132, 1.98e9),
            "H100 SXM data sheet: 67 TFLOPS, 128 lanes; DGX H100: 400 Gb/s",
        ),
        Gpu(
            *("h200", 141e9, 4.8e12, 450e9, 50e9, "sm_90", 132, 1.98e9),
            "H200 SXM data sheet: 67 TFLOPS, 128 lanes; DGX H200: 400 Gb/s",
        ),
        Gpu(
            *("b200", 180e9, 8e12, 900e9, 50e9, "sm_100", 148, 1.98e9),
            "DGX B200 data sheet: 64 TB/s and 1440 GB for 8; 400 Gb/s; HGX B200: 75 TFLOPS, 128 lanes; "
            "the 148 processors are not the maker's own number",
        ),
        Gpu(
            *("mi300x", 192e9, 5.3e12, 448e9, 50e9, "gfx942", 304, 2.1e9),
            "MI300X data sheet: 7 links of 64 GB/s, 304 compute units, 2100 MHz; 400 Gb/s assumed",
        ),
    )
}

# The host, seconds. For each tensor: measured by `bench/run.py host --each` on a CPU (AMD EPYC, one thread,
# torch 2.13.0+cpu, 2026-11-21, medians of eight runs: 1.8 to 3.1, 3.2 to 4.7 us). For each launch: assumed.
OWN_TENSOR, TORCH_TENSOR = 2.4e-6, 3.6e-6
OWN_LAUNCH, TORCH_LAUNCH = 10e-6, 4e-6

# The link between a GPU and its host, over which offloaded states are read and, at the same time, written:
# bytes a second each way, assumed, of the 63e9 that PCIe 5.0 has with 16 lanes.
HOST_LINK = 50e9

# An all-reduce of few bytes, seconds: NCCL's own model of its tree with the LL protocol (src/graph/tuning.cc,
# baseLat and hwLat): start + 2 * (in a node, for each other GPU + between nodes, for each level of the tree).
START, IN_NODE, BETWEEN = 6.8e-6, 0.6e-6, 5e-6


@dataclass
class Time:
    """What a step takes, in seconds: the host prepares and launches while the memory and the link work."""

    memory: float
    host: float
    collectives: float
    link: float = 0.0
    total: float = field(init=False)

    def __post_init__(self) -> None:
        self.total = max(self.memory, self.host, self.link) + self.collectives

    @property
    def bound(self) -> str:
        """Which of them is the longest."""
        return max(("memory", "host", "collectives", "link"), key=lambda name: float(getattr(self, name)))


def time_of(
    step: Step, tensors: int, sharding: Sharding, gpu: Gpu, efficiency: float, link: float | None = None
) -> Time:
    """The time of a step over so many tensors.

    Args:
        efficiency: what share of its bandwidth a memory reaches.
        link: bytes a second each way to the host, where our states lie; None: they lie on the GPU.
    """
    tensor, launch = (OWN_TENSOR, OWN_LAUNCH) if step.own else (TORCH_TENSOR, TORCH_LAUNCH)
    away = step.states_read + step.states_written if link else 0
    return Time(
        (step.moved - away) / (gpu.bandwidth * efficiency),
        tensors * tensor + step.launches * launch,
        sum(all_reduce(sent, sharding, gpu) for sent in step.collectives),
        max(step.states_read, step.states_written) / link if link else 0.0,
    )


def all_reduce(sent: Collective, sharding: Sharding, gpu: Gpu) -> float:
    """Seconds of one all-reduce: its latency, and each byte twice over the slowest link."""
    sizes = vars(sharding)
    names = list(sizes)
    ranks: int = sizes[sent.over]
    inner: int = math.prod(sizes[name] for name in names[names.index(sent.over) + 1 :])  # ranks side by side
    in_node = max(1, min(ranks, NODE // inner))
    nodes = -(-ranks // in_node)
    levels = math.log2(nodes)
    latency = START + 2 * ((in_node - 1) * IN_NODE + levels * BETWEEN)
    slowest = gpu.network if nodes > 1 else gpu.link
    return latency + 2 * (ranks - 1) / ranks * sent.bytes / slowest
