"""What a plan says: the steps of a model on each layout, in bytes and seconds."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..models.shardings import Sharding
from . import gpus
from .plan_steps import Step


@dataclass(frozen=True)
class Setting:
    """What is the same on any number of GPUs."""

    optimizer: str = "AdamW"
    dtypes: str = "fp32"
    efficiency: float = 1.0  # the share of its published bandwidth that a memory reaches
    gpu: gpus.Gpu = gpus.GPUS["h100"]
    link: float | None = None  # bytes a second each way to the host, where our states lie; None: on the GPU

    def on_gpu(self, step: Step) -> int:
        """Bytes that stay on the GPU."""
        return step.kept - step.states_kept if self.link else step.kept


@dataclass(frozen=True)
class PlannedStep(Step):
    """A step with its time, and the bytes that it moves for each parameter of its GPU."""

    moved_per_param: float
    seconds: gpus.Time
    bound: str


@dataclass
class Plan:
    """The steps of a model on one layout."""

    gpus: int
    layout: Sharding
    largest: int  # parameters on the fullest GPU
    balance: float  # the same as a multiple of the mean
    empty: int  # tensors that have no element on the last GPU
    steps: list[PlannedStep] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # why, by the title of the step

    def step(self, name: str) -> PlannedStep | None:
        return next((step for step in self.steps if step.name == name), None)

    def __str__(self) -> str:
        return (
            f"{self.gpus} GPUs ({self.layout}): {self.largest} parameters on the fullest, "
            f"{self.balance:.2f} of the mean; {self.empty} tensors have no element on the last"
        )


@dataclass(frozen=True, kw_only=True)
class Plans(Setting):
    """The plans of a model on each layout: numbers in bytes and seconds."""

    model: str
    params: int
    tensors: int
    plans: list[Plan]

    @property
    def title(self) -> str:
        away = f", our states on the host, {self.link / 1e9:.3g} GB/s each way" if self.link else ""
        return (
            f"{self.model}: {self.params / 1e9:.4g}B parameters in {self.tensors} tensors, "
            f"{self.optimizer}, {self.dtypes}, {self.gpu.name} at "
            f"{self.efficiency * self.gpu.bandwidth / 1e12:.3g} TB/s{away}"
        )
