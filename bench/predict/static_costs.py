"""What a compiled kernel takes of a GPU: bytes, room on a processor, and the time that each of them binds.

A processor is a streaming multiprocessor, or a compute unit; a warp is a wavefront there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .gpus import Gpu


class Processor(NamedTuple):
    """What there is of one processor, which every architecture here has in four parts."""

    lanes: int  # of a warp
    registers: int  # of 32 bits, of a part
    warps: int  # of a part at most
    programs: int  # of the processor at most
    shared: int  # bytes of shared memory that programs can have, of the processor
    reserved: int  # bytes of it that each program takes besides its own
    issues: int  # instructions of a warp that a processor starts in a cycle
    source: str


PARTS = 4
GRANULE = 8  # registers of a thread are handed out in eights, on all of them
_CUDA = "CUDA C++ Programming Guide, technical specifications per compute capability; a scheduler each part"
PROCESSORS = {
    "sm_80": Processor(32, 16_384, 16, 32, 164 * 1024, 1024, 4, _CUDA),
    "sm_90": Processor(32, 16_384, 16, 32, 228 * 1024, 1024, 4, _CUDA),
    "sm_100": Processor(32, 16_384, 16, 32, 228 * 1024, 1024, 4, _CUDA),
    "gfx942": Processor(
        *(64, 32_768, 8, 32, 64 * 1024, 0, 1),
        "LLVM AMDGPU usage: 512 vector registers of 64 lanes and 8 waves each SIMD, 64 KiB of LDS; "
        "CDNA 3 ISA: a vector instruction of a wave takes four cycles of one of four SIMDs",
    ),
}


@dataclass(frozen=True)
class Occupancy:
    """Warps that a processor holds at once, of so many, and what allows no more."""

    warps: int
    most: int
    limit: str  # "registers" | "shared memory" | "warps"


def occupancy(target: str, registers: int, warps: int, shared: int) -> Occupancy:
    """The occupancy by programs of so many warps, registers of a thread, bytes of shared memory."""
    has = PROCESSORS[target]
    each = -(-max(registers, 1) // GRANULE) * GRANULE * has.lanes
    held = {
        "registers": has.registers // each * PARTS // warps,
        "warps": min(has.warps * PARTS // warps, has.programs),
    }
    if shared:
        held["shared memory"] = has.shared // (shared + has.reserved)
    limit = min(held, key=lambda name: (held[name], name != "warps"))
    return Occupancy(held[limit] * warps, has.warps * PARTS, limit)


@dataclass(frozen=True)
class Bound:
    """Seconds that the memory takes to move the bytes, processors to start the instructions, and both."""

    memory: float
    issue: float
    bound: float

    @property
    def by(self) -> str:
        """Which of the two binds."""
        return "memory" if self.memory >= self.issue else "issue"


def bound(gpu: Gpu, moved: float, executed: float) -> Bound:
    """What binds so many bytes, and instructions of a lane."""
    memory, issue = moved / gpu.bandwidth, executed / issue_rate(gpu)
    return Bound(memory, issue, max(memory, issue))


def issue_rate(gpu: Gpu) -> float:
    """Instructions of a lane that all processors start in a second."""
    has = PROCESSORS[gpu.target]
    return gpu.processors * has.issues * has.lanes * gpu.clock
