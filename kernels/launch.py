"""The only launches, and the shapes they have."""

from typing import NamedTuple

from .language import AVAILABLE, tl
from .rows import row_sums_kernel
from .step import step_kernel

# (longest row, rows of a tile, columns of a tile, warps). Few classes keep launches and compiled
# variants few; up to 8192 columns a row stays in registers without spilling.
ROW_CLASSES = (
    (64, 64, 64, 8),
    (256, 16, 256, 8),
    (1024, 4, 1024, 8),
    (4096, 1, 4096, 8),
    (8192, 1, 8192, 16),
)
FLAT = (1, 4096, 8)


class Tile(NamedTuple):
    """Shape of a program's tile [rows, columns] and the warps that work on it."""

    rows: int
    columns: int
    warps: int
    pieces: bool  # a row takes several tiles


class Spec(NamedTuple):
    """What is compiled: one specialisation of the kernel each. No hyperparameter is in it."""

    rule: object  # device function
    variant: str
    maximize: bool
    decay: str  # "none" | "coupled" | "decoupled"
    centralize: str  # "none" | "gradient" | "update"
    dtypes: tuple  # triton dtypes of parameter, gradient, state...
    compute: object
    fields: int
    count: int
    inner: int
    vector: int
    tile: Tile

    def constants(self) -> dict:
        """Compile-time arguments of the kernels, by name."""
        return {
            "RULE": self.rule,
            "VARIANT": self.variant,
            "MAXIMIZE": self.maximize,
            "DECAY": self.decay,
            "CENTRALIZE": self.centralize,
            "DTYPES": self.dtypes,
            "COMPUTE": self.compute,
            "FIELDS": self.fields,
            "COUNT": self.count,
            "D": self.inner,
            "VECTOR": self.vector,
            "R": self.tile.rows,
            "C": self.tile.columns,
            "PIECES": self.tile.pieces,
        }


# Without contraction to fused multiply-add every executor rounds alike; the kernel is bound by memory.
OPTIONS = {"enable_fp_fusion": False}


def tile_for(columns: int, centred: bool) -> Tile:
    """The tile for rows of this length: a plain function, never a search (an autotuned step would run twice)."""
    if centred:
        for longest, *shape in ROW_CLASSES:
            if columns <= longest:
                return Tile(*shape, pieces=False)
    return Tile(*FLAT, pieces=centred)


def dtype_of(name: str):
    """Triton's dtype for a torch dtype's name ("float32", "bfloat16", ...)."""
    return getattr(tl, name)


def launch_step(table, tiles, scalars, sums, spec: Spec) -> int:
    """Steps every tile of the list on the current stream; returns the number of launches.

    Args:
        table: int64 [slots, fields] on the device.
        tiles: int32 [programs, 3] on the device.
        scalars: compute dtype [rows, count] on the device.
        sums: compute dtype [programs], scratch, where `spec.tile.pieces`; else anything.
    """
    grid = (tiles.shape[0],)
    constants = {**spec.constants(), "num_warps": spec.tile.warps, **OPTIONS}
    if spec.tile.pieces:
        row_sums_kernel[grid](table, tiles, scalars, sums, **constants)
    step_kernel[grid](table, tiles, scalars, sums, **constants)
    return 1 + spec.tile.pieces


__all__ = ["AVAILABLE", "OPTIONS", "Spec", "Tile", "dtype_of", "launch_step", "tile_for"]
