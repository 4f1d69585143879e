"""Layers whose weight gradient is the virtual gradient (SVGD): that of a normalised output gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .virtual import Virtual


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
