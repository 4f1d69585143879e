"""The only launches, and the shapes they have."""

from typing import Any, NamedTuple

from .language import AVAILABLE, tl
from .rows import row_sums_kernel
from .step import step_kernel

# (longest row, rows of a tile, columns of a tile, warps, where its mean comes from): sixteen elements a
# thread. Few classes keep launches and compiled variants few. Up to 8192 columns a row stays in registers
# without spilling; up to 32768 the gradients of all rows in flight stay in an L2 cache of 50 MB.
ROW_CLASSES = (
    (64, 64, 64, 8, "tile"),
    (256, 16, 256, 8, "tile"),
    (1024, 4, 1024, 8, "tile"),
    (4096, 1, 4096, 8, "tile"),
    (8192, 1, 8192, 16, "tile"),
    (32768, 1, 4096, 8, "loop"),
)
FLAT = (1, 4096, 8)


class Tile(NamedTuple):
    """Shape of a program's tile [rows, columns], the warps that work on it, where row means come from."""

    rows: int
    columns: int
    warps: int
    mean: str  # "none" | "tile" | "loop" | "pieces"


class Spec(NamedTuple):
    """What is compiled: one specialisation of the kernel each. No hyperparameter is in it."""

    rule: object  # device function
    variant: str
    maximize: bool
    decay: str  # "none" | "coupled" | "decoupled"
    centralize: str  # "none" | "gradient" | "update"
    dtypes: tuple[Any, ...]  # triton dtypes of parameter, gradient, state...
    compute: object
    fields: int
    scalars: int
    inner: int
    vector: int
    tile: Tile

    def constants(self) -> dict[str, Any]:
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
            "COUNT": self.scalars,
            "D": self.inner,
            "VECTOR": self.vector,
            "R": self.tile.rows,
            "C": self.tile.columns,
            "MEAN": self.tile.mean,
        }


# Without contraction to fused multiply-add every executor rounds alike; the kernel is bound by memory.
OPTIONS = {"enable_fp_fusion": False}


def tile_for(rows: int, columns: int, centred: bool) -> Tile:
    """The tile for a tensor: a plain function, never a search (an autotuned step would run several times).

    Rows matter where they are centred, and where strides keep them apart (rows > 1).
    """
    for longest, tall, wide, warps, mean in ROW_CLASSES:
        if columns <= longest and (centred or (rows > 1 and mean == "tile")):
            return Tile(tall, wide, warps, mean if centred else "none")
    return Tile(*FLAT, "pieces" if centred else "none")


def dtype_of(name: str):
    """Triton's dtype for a torch dtype's name ("float32", "bfloat16", ...)."""
    return getattr(tl, name)


def launch_step(table, tiles, scalars, sums, spec: Spec) -> int:
    """Steps every tile of the list on the current stream; returns the number of launches.

    Args:
        table: int64 [slots, fields] on the device.
        tiles: int32 [programs, 3] on the device.
        scalars: compute dtype [rows, count] on the device.
        sums: compute dtype [programs], scratch, where the row means come from pieces; else anything.
    """
    grid = (tiles.shape[0],)
    constants = {**spec.constants(), "num_warps": spec.tile.warps, **OPTIONS}
    if spec.tile.mean == "pieces":
        row_sums_kernel[grid](table, tiles, scalars, sums, **constants)
    step_kernel[grid](table, tiles, scalars, sums, **constants)
    return 2 if spec.tile.mean == "pieces" else 1


__all__ = ["AVAILABLE", "OPTIONS", "Spec", "Tile", "dtype_of", "launch_step", "tile_for"]
