"""The Triton executor: what the engine asks of it."""

from __future__ import annotations

import torch

from ...kernels import launch
from ...layout.buckets import Bucket, TileShape
from ...layout.geometry import Geometry
from ..eager import squares
from . import branches
from .decide import DeviceDecider
from .run import Together, guarded, resident_of


class TritonExecutor:
    """Runs a bucket in one launch, with one more for each sum over rows that no tile can hold."""

    name = "triton"
    launches = True

    decider = DeviceDecider
    branches = branches

    def shape(
        self, layout: Geometry, by_rows: bool, tensors: int, split: bool, whole: bool = False
    ) -> TileShape:
        """The tile of the slot's row class."""
        tile = launch.tile_for(layout.rows, layout.columns, by_rows, tensors, split)
        if whole and tile.reduction == "pieces":
            tile = tile._replace(reduction="loop")
        # A looping program walks its whole row: one tile a row in the list.
        columns = layout.columns if tile.reduction in launch.LOOPS else tile.columns
        return TileShape(tile.rows, columns, tile)

    def prepare(self, buckets: list[Bucket]) -> None:
        """Sends what has changed, on the current streams of the devices, and compiles what is not yet."""
        devices: dict[torch.device, list[Bucket]] = {}
        for bucket in buckets:
            devices.setdefault(bucket.key.device, []).append(bucket)
        for device, members in devices.items():
            cache = members[0].cache
            if "together" not in cache:
                cache["together"] = Together(members)
            with guarded(device):
                cache["together"].prepare()

    def step_bucket(self, bucket: Bucket, part: str = "step") -> int:
        """Steps every slot of the bucket on the current stream of its device."""
        launches = resident_of(bucket).launches
        wanted = [name for name in _names(part, bucket) if name in launches]
        with guarded(bucket.key.device):
            for name in wanted:
                launches[name]()
        return len(wanted)

    def squares(self, bucket: Bucket) -> float:
        """Only asked where a step is decided on the host, which waits for it."""
        return squares(bucket)


def _names(part: str, bucket: Bucket) -> tuple[str, ...]:
    """The launches of a part of a step, in their order; with their sums, where rows are whole here."""
    late = bucket.key.recipe.flags.centres_trusted
    if part == "squares":
        return ("squares", "totals") if late or bucket.key.split else ("sums", "squares", "totals")
    if bucket.key.split or part == "statistics":
        return (part,)
    return ("step", "finish") if bucket.norms and not late else ("sums", "step", "finish")


EXECUTOR = TritonExecutor()
