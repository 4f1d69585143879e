"""The only launches. What they compile is a Spec each (spec.py), for which Triton keeps compiled kernels."""

from typing import Any, NamedTuple

from .branch import BranchSpec, Told, branch_kernel
from .decide import GRID, Control, Sums, control_kernel, norm_kernel
from .direct import Launch
from .language import AVAILABLE, cdiv, tl
from .observed import Observing, observed_kernel
from .rows import project_kernel, row_sums_kernel
from .spec import LOOPS, DeciderSpec, NormSpec, Spec, Tile, norm_spec, tile_for
from .stages import Flags
from .step import step_kernel
from .totals import Partials, squares_kernel, totals_kernel
from .virtual import VirtualNumbers, VirtualSpec, virtual_kernel

# Without contraction to fused multiply-add every executor rounds alike; the kernel is bound by memory.
OPTIONS = {"enable_fp_fusion": False}
# norm_kernel reads, and wants many programs at once: 64 registers are enough for that. `decide`, which takes
# four times as many, spills then; it is done once, by one program. AMD's compiler knows no such limit.
NORM_OPTIONS: dict[str, dict[str, Any]] = {
    "cuda": {**OPTIONS, "maxnreg": 64},
    "hip": OPTIONS,
    "interpreter": OPTIONS,
}

KERNELS = {
    "sums": row_sums_kernel,
    "squares": squares_kernel,
    "totals": totals_kernel,
    "step": step_kernel,
    "finish": project_kernel,
    "statistics": observed_kernel,
}
SLOTWISE = ("totals", "statistics")  # a program a slot
NORMS = ("squares", "totals")  # of whole tensors: these two share `Partials`
WARPS = 4  # of the programs that have no tile
# Places of arguments that may be others at the next step.
GRADS, SCALARS, NORM_CONTROL, CONTROL, TOLD = 1, 3, 4, 1, 4


def dtype_of(name: str):
    """Triton's dtype for a torch dtype's name ("float32", "bfloat16", ...)."""
    return getattr(tl, name)


def parts_of(tile: Tile, flags: Flags) -> tuple[str, ...]:
    """The launches of a step, in their order: what comes before it, itself, what comes after it."""
    whole = tile.reduction not in ("pieces", "ranks")
    found = [part for part in KERNELS if flags.needs(part) and not (whole and part in ("sums", "finish"))]
    return tuple(sorted(found, key=lambda part: part not in NORMS) if flags.centres_trusted else found)


def warps_of(part: str, spec: Spec) -> int:
    """The warps of a program of a launch."""
    return WARPS if part in SLOTWISE else spec.WARPS


class Scratch(NamedTuple):
    """What the launches of a step leave for each other."""

    sums: Any  # compute dtype [2, programs], where rows are added up from pieces; else anything
    squares: Any = None  # fp64 [programs, SUMS], where a rule wants norms of whole tensors
    firsts: Any = None  # int32 [slots + 1], where the programs of each slot begin; there, or if measured
    observed: Any = None  # fp64 [programs, OBSERVED], where the step is measured
    places: Any = None  # int64 [slots], where its statistics are left; there as well


def step_launches(table, grads, tiles, scalars, scratch: Scratch, spec: Spec) -> dict[str, Launch]:
    """The launches that step every tile of a list, by their parts and in their order.

    Args:
        table: int64 [slots, fields] on the device.
        grads: int64 [slots] on the device, the addresses of the gradients.
        tiles: int32 [programs, 3] on the device.
        scalars: compute dtype [rows, count] on the device, `Numbers` of kernels/stages.py; or those of the
            one row, where `spec.COUNT` is 0.
        scratch: what they share.
    """
    assert spec.FLAGS is not None
    partials = Partials(scratch.sums, scratch.squares)
    observing = Observing(scratch.sums, scratch.observed, scratch.places)
    observed = ("step", "statistics") if spec.FLAGS.statistics else ()

    def launch(part: str) -> Launch:
        constants = {"SPEC": spec, "num_warps": warps_of(part, spec), **OPTIONS}
        sums = partials if part in NORMS else observing if part in observed else scratch.sums
        if part in SLOTWISE:
            args, programs = (table, grads, scratch.firsts, scalars, sums), scratch.firsts.shape[0] - 1
        else:
            args, programs = (table, grads, tiles, scalars, sums), tiles.shape[0]
        return Launch(KERNELS[part], programs, args, constants)

    return {part: launch(part) for part in parts_of(spec.tile, spec.FLAGS)}


def programs_for(tiles: int) -> int:
    """Programs of a launch of norm_kernel over so many tiles."""
    return min(tiles, GRID)


def norm_launch(table, grads, tiles, sums: Sums, control: Control, spec: NormSpec, backend: str) -> Launch:
    """Measures the gradients of a list; of all such launches the last program decides: see decide.py.

    `backend` is that of NORM_OPTIONS.
    """
    constants = {"SPEC": spec, "num_warps": spec.SLOTS.WARPS, **NORM_OPTIONS[backend]}
    return Launch(norm_kernel, programs_for(tiles.shape[0]), (table, grads, tiles, sums, control), constants)


def control_launch(squares, control: Control, spec: DeciderSpec) -> Launch:
    """Decides, by squares that were added up elsewhere or without a norm: one program."""
    constants = {"SPEC": spec, "num_warps": WARPS, **OPTIONS}
    return Launch(control_kernel, 1, (squares, control), constants)


def branch_launch(table, numbers, sources, told: Told, spec: BranchSpec) -> Launch:
    """The step of every branch weight of the table; arguments as the kernel's."""
    args = (table, numbers, sources, numbers.shape[1], told)
    return Launch(branch_kernel, table.shape[0], args, {"SPEC": spec, "num_warps": WARPS, **OPTIONS})


def launch_virtual(grad, scaled, r, gain, scale: float, rho: float, eps: float, update: bool) -> None:
    """Accumulates virtual gradients and scales by them, on the current stream.

    Args:
        grad: fp32, bf16 or fp16 [examples, ...] on the device, contiguous.
        scaled: like grad, is written.
        r: fp32 [...], contiguous, is written where `update`.
        gain: fp32, one number on the device, by which the gradients are multiplied before they are squared.
        scale, rho, eps: as in the formula.
        update: whether to accumulate.
    """
    spec, shape = VirtualSpec(update), (grad.shape[0], r.numel())
    numbers = VirtualNumbers(*shape, float(scale), float(rho), 1.0 - rho, float(eps))
    grid = (cdiv(r.numel(), spec.P),)
    virtual_kernel[grid](grad, scaled, r, gain, numbers, SPEC=spec, num_warps=WARPS, **OPTIONS)


__all__ = [
    "AVAILABLE",
    "CONTROL",
    "GRADS",
    "KERNELS",
    "LOOPS",
    "NORMS",
    "NORM_CONTROL",
    "NORM_OPTIONS",
    "OPTIONS",
    "SCALARS",
    "TOLD",
    "BranchSpec",
    "Control",
    "DeciderSpec",
    "Launch",
    "NormSpec",
    "Partials",
    "Scratch",
    "Spec",
    "Sums",
    "Tile",
    "Told",
    "branch_launch",
    "control_launch",
    "dtype_of",
    "launch_virtual",
    "norm_launch",
    "norm_spec",
    "parts_of",
    "programs_for",
    "step_launches",
    "tile_for",
    "warps_of",
]
