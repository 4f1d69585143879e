"""What layers with virtual gradients (SVGD) share: settings, the running mean of squares, the factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, imported when it is first needed

from ..executors.choose import choose
from ..kernels.launch import launch_virtual
from ..layout.row_scales import row_factors_of

SHAPES = ("auto", "position", "channel")
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Settings:
    """What a virtual layer is told; see `VirtualLinear`."""

    scale: float
    rho: float = 0.9
    eps: float = 1e-6
    loss_reduction: str = "mean"
    official_scaling: bool = False
    r_shape: str = "auto"
    virtual_bias: bool = False
    sync: bool = True

    def __post_init__(self) -> None:
        for name in ("scale", "eps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Invalid {name}: {getattr(self, name)}, expected a finite number >= 0")
        if not 0 <= self.rho <= 1:
            raise ValueError(f"Invalid rho: {self.rho}, expected a number in [0, 1]")
        if self.r_shape not in SHAPES:
            raise ValueError(f"Invalid r_shape: {self.r_shape!r}, expected one of {', '.join(SHAPES)}")
        if self.loss_reduction not in REDUCTIONS:
            raise ValueError(
                f"Invalid loss_reduction: {self.loss_reduction!r}, expected one of {', '.join(REDUCTIONS)}"
            )


class Virtual(nn.Module):
    """What the virtual layers share: the buffer `r`, empty until the first batch in training."""

    r: Tensor
    weight: Any
    bias: Any
    settings: Settings
    loss_scale: Any = 1.0
    auto: str  # what r_shape "auto" is
    channels: int  # the dimension of an output that has the channels

    def __init__(self, *args: Any, **options: Any) -> None:
        """Arguments of the plain layer, and those of `Settings` by name."""
        own = {field.name: options.pop(field.name) for field in fields(Settings) if field.name in options}
        super().__init__(*args, **options)
        self._begin(Settings(**own))

    def _begin(self, settings: Settings) -> None:
        self.settings = settings
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        self.register_buffer("r", torch.zeros(0, dtype=wide, device=self.weight.device))

    @_disable_dynamo  # its backward pass changes r, which a graph cannot hold
    def _run(self, function: Any, x: Tensor, *options: Any) -> Tensor:
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):  # before the function, whose dtypes are then one
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        y: Tensor = function.apply(x, weight, bias, self, *options)
        if self.training and y.requires_grad:
            self._fit(y)
        return y

    def _by_position(self) -> bool:
        given = self.settings.r_shape
        return (self.auto if given == "auto" else given) == "position"

    def _shape(self, y: Tensor) -> torch.Size:
        """Of r, for this output."""
        return y.shape[1:] if self._by_position() and y.ndim > 1 else torch.Size([y.shape[self.channels]])

    def _fit(self, y: Tensor) -> None:
        """Begins r at 0 in the shape of the output."""
        shape = self._shape(y)
        if self.r.shape == shape:
            return
        if self.r.numel():
            raise ValueError(
                f"{type(self).__name__} accumulates squares of {list(self.r.shape)} and now has outputs of "
                f"{list(shape)}; with r_shape='channel' sizes may change"
            )
        with torch.no_grad():
            self.r.resize_(shape).zero_()  # in place: wrappers keep the tensor

    def _scale_now(self) -> float | Tensor:
        """The factor by which the loss is too large, as a tensor where a GradScaler has it on the device."""
        given = self.loss_scale
        if isinstance(given, float | int | Tensor):
            return given
        on_device = getattr(given, "_scale", None)
        return float(given.get_scale()) if on_device is None else on_device

    def _ranks(self) -> int:
        """Over how many ranks squares are averaged."""
        distributed = torch.distributed
        runs = self.settings.sync and distributed.is_available() and distributed.is_initialized()
        return distributed.get_world_size() if runs else 1

    def _gain(self, grad: Tensor) -> float | Tensor:
        """By what the gradient that arrives is multiplied to be each example's own."""
        s = self.settings
        examples = grad.shape[0] if s.loss_reduction == "mean" and not s.official_scaling else 1
        return examples / self._scale_now()

    def _scaled(self, grad: Tensor) -> Tensor:
        """The output gradient [m, ...], accumulated and times the factor of each place."""
        if runs_fused(grad, self.r) and self._ranks() == 1:
            s = self.settings
            gain = self._gain(grad)
            if not isinstance(gain, Tensor) or gain.is_cpu:  # filled in there: a copy would be waited for
                gain = torch.full((), float(gain), dtype=torch.float32, device=grad.device)
            gain = gain.to(grad.device, torch.float32)
            scaled = torch.empty_like(grad)
            launch_virtual(grad, scaled, self.r, gain, s.scale, s.rho, s.eps, self.training)
            torch.autograd.graph.increment_version(self.r)
            return scaled
        return (grad * self._factor(grad)).to(grad.dtype)

    def _factor(self, grad: Tensor) -> Tensor:
        """Accumulates the output gradient [m, ...] (in training); s / sqrt(r + eps), like r."""
        if self.training:
            self._accumulate(grad)
        total = self.r.to(torch.promote_types(self.r.dtype, torch.float32)) + self.settings.eps
        # Nothing over nothing, as with eps = 0, is nothing.
        return torch.where(total > 0, self.settings.scale / total.sqrt(), 0.0)

    def _times(self, dw: Tensor, factor: Tensor) -> Tensor:
        """The weight's gradient, its rows times their factors: all of them, or what the step leaves to do."""
        found = row_factors_of(self.weight)
        if found and self.weight.grad is None and not found.used:
            found.take(factor)
            found.used = True
            return dw
        if found:  # gradients are added up: the step multiplies all of them by the factor of the first
            first = torch.where(found.values > 0, found.values, factor)
            found.take(first)
            factor = torch.where(first > 0, factor / first, 0.0)
        return (dw * factor.view(-1, *(1,) * (dw.ndim - 1))).to(dw.dtype)

    def _accumulate(self, grad: Tensor) -> None:
        s = self.settings
        wide = torch.promote_types(self.r.dtype, torch.float32)
        squares = mean_of_squares(grad.to(wide) * self._gain(grad), self.r.shape)
        if (ranks := self._ranks()) > 1:
            torch.distributed.all_reduce(squares)
            squares /= ranks
        new = s.rho * self.r.to(wide) + (1 - s.rho) * squares
        self.r.copy_(torch.where(new.isfinite(), new, self.r.to(wide)))  # an overflow must not stay

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        """An empty `r` takes the shape of the one that is loaded."""
        saved = state_dict.get(f"{prefix}r")
        if isinstance(saved, Tensor) and not self.r.numel():
            self.r.resize_(saved.shape).zero_()
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def extra_repr(self) -> str:
        s = self.settings
        return f"{super().extra_repr()}, scale={s.scale}, rho={s.rho}, eps={s.eps}"


def mean_of_squares(q: Tensor, shape: torch.Size) -> Tensor:
    """Mean over the batch [m, ...], and over all but channels where the shape is [C]."""
    squares = q.square()
    return squares.mean(0) if squares.shape[1:] == shape else squares.mean((0, *range(2, squares.ndim)))


def runs_fused(grad: Tensor, r: Tensor) -> bool:
    """Whether kernels/virtual.py takes these."""
    narrow = grad.dtype in (torch.float32, torch.bfloat16, torch.float16) and r.dtype == torch.float32
    return narrow and grad.is_cuda and grad.is_contiguous() and choose("auto", grad.device, r.dtype).launches
