"""Virtual gradients (SVGD): layers whose weight gradient is that of a normalised output gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, imported when it is first needed
from torch.autograd.function import once_differentiable
from torch.nn import functional

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
    return narrow and grad.is_cuda and grad.is_contiguous() and _is_triton(grad.device)


def _is_triton(device: torch.device) -> bool:
    return choose("auto", device, torch.float32).name == "triton"


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: VirtualLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        layer: VirtualLinear = ctx.layer
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx = dw = db = scaled = None
        if needs_x:
            dx = (_rows(grad) @ weight).view(x.shape)
        if needs_weight and layer._by_position():
            example = grad if grad.ndim > 1 else grad[None]
            scaled = layer._scaled(example)
            dw = _rows(scaled).T @ _rows(x)
        elif needs_weight:  # a factor for each row of the weight
            rows = _rows(grad)
            factor = layer._factor(rows)
            dw = layer._times(rows.T @ _rows(x), factor)
        if needs_bias:
            db = _rows(grad).sum(0)
            if needs_weight and layer.settings.virtual_bias:
                db = (db * factor).to(db.dtype) if scaled is None else _rows(scaled).sum(0)
        return dx, dw, db, None


class VirtualLinear(Virtual, nn.Linear):
    r"""nn.Linear whose weight gradient is the virtual gradient.

    .. math::
        r \leftarrow \rho r + (1 - \rho)\, \mathrm{mean}_\tau\, q_\tau^2, \qquad
        dW = \tfrac1m \textstyle\sum_\tau \frac{s\, q_\tau}{\sqrt{r + \epsilon}}\, x_\tau^T

    with :math:`q_\tau` the gradient of example :math:`\tau`'s loss with respect to its output. Input and bias
    have their plain gradients. `r` is a buffer that begins at 0, and changes once in each backward pass of
    a layer in training; in eval() it stays and is used as it is.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        scale: :math:`s`. It takes the place of a learning rate's scale and is to be tuned with it.
        rho: how much of `r` stays in a step, in [0, 1]. Default 0.9.
        eps: :math:`\epsilon`, in units of the gradient squared. Default 1e-6.
        loss_reduction: of the loss over the m examples: with "mean" q is m times the gradient that arrives,
            with "sum" that gradient itself; then dW is not divided by m, like all gradients. Default "mean".
        official_scaling: q is the gradient that arrives, also for a mean loss, as in the authors' code:
            (s, eps) here are (m s, m^2 eps) without. Depends on the size of a batch. Default False.
        r_shape: "position": a value for each place of the output but the batch, whose size must not change;
            "channel": [out], mean over all else. Default "auto": by channel, and every row of an input with
            more than two dimensions is an example; `VirtualConv2d` by position, as the paper.
        virtual_bias: give the bias the scaled gradient too. Default False, as in the authors' code.
        sync: average squares over ranks where torch.distributed runs, so that every rank has the same `r`.
            All ranks must then go through the layer in the same order. Default True.

    The loss must not be scaled, or `set_loss_scale` must say by how much. A layer used twice in a forward
    pass has one `r` for both, which changes twice.

    Raises:
        ValueError: an option out of range; outputs of another size, by position.

    Source: Li and Shu, "SVGD: A Virtual Gradients Descent Method for Stochastic Optimization", 2019,
    Algorithm 1.

    >>> import torch, fusedcalib.nn
    >>> layer = fusedcalib.nn.VirtualLinear(2, 1, scale=1.0, rho=0.0, eps=0.0)
    >>> layer(torch.ones(4, 2)).mul(5).mean().backward()
    >>> layer.weight.grad.tolist(), layer.bias.grad.item(), layer.r.item()
    ([[1.0, 1.0]], 5.0, 25.0)
    """

    auto = "channel"
    channels = -1

    def forward(self, input: Tensor) -> Tensor:
        return self._run(_LinearFunction, input)


class _Conv2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: VirtualConv2d, padding: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.padding = layer, padding
        return functional.conv2d(x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        layer: VirtualConv2d = ctx.layer
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad

        def gradients(of: Tensor, *mask: bool) -> list[Tensor | None]:
            sizes = [weight.shape[0]] if mask[2] else None
            options = (sizes, layer.stride, ctx.padding, layer.dilation, False, [0, 0], layer.groups)
            found = torch.ops.aten.convolution_backward(of, x, weight, *options, mask)
            return [t if wanted else None for t, wanted in zip(found, mask, strict=True)]

        if not needs_weight:
            return *gradients(grad, needs_x, False, needs_bias), None, None
        virtual_bias = needs_bias and layer.settings.virtual_bias
        if layer._by_position():
            scaled = layer._scaled(grad)
            dx, _, db = gradients(grad, needs_x, False, needs_bias and not virtual_bias)
            _, dw, scaled_db = gradients(scaled, False, True, virtual_bias)
            return dx, dw, scaled_db if virtual_bias else db, None, None
        factor = layer._factor(grad)
        dx, dw, db = gradients(grad, needs_x, True, needs_bias)
        assert dw is not None
        dw = layer._times(dw, factor)
        if virtual_bias and db is not None:
            db = (db * factor).to(db.dtype)
        return dx, dw, db, None, None


class VirtualConv2d(Virtual, nn.Conv2d):
    r"""nn.Conv2d whose weight gradient is the virtual gradient, as in `VirtualLinear`.

    .. math:: dW = \mathrm{conv\_backward}_W\left(\frac{s\, q}{\sqrt{r + \epsilon}}\right)

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype: as nn.Conv2d.
        scale, rho, eps, loss_reduction, official_scaling, virtual_bias, sync: as `VirtualLinear`. The weight
            gradient adds up all places of the output: `scale` must be smaller than for a linear layer.
        r_shape: "position": r is [out, H, W], whose size must not change; "channel": [out], mean over the
            places too. Default "auto": "position", as the paper.

    Raises:
        ValueError: an option out of range; outputs of another size, by position.

    Source: Li and Shu, "SVGD: A Virtual Gradients Descent Method for Stochastic Optimization", 2019,
    Algorithm 1.

    >>> import torch, fusedcalib.nn
    >>> layer = fusedcalib.nn.VirtualConv2d(1, 2, 3, scale=0.01)
    >>> layer(torch.randn(4, 1, 8, 8)).square().mean().backward()
    >>> layer.r.shape
    torch.Size([2, 6, 6])
    """

    auto = "position"
    channels = 1

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 3:
            return self.forward(input[None])[0]
        padding: Any = (0, 0) if self.padding == "valid" else self.padding
        if self.padding_mode != "zeros" or padding == "same":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = functional.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0, 0)
        return self._run(_Conv2dFunction, input, padding)


VIRTUAL: dict[type[nn.Module], type[Virtual]] = {nn.Linear: VirtualLinear, nn.Conv2d: VirtualConv2d}
