"""Making a model virtual, and what its layers are to know: the loss scale, the optimizer that scales rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layout.row_scales import RowFactors, set_row_factors
from ..optimizer import FusedOptimizer
from .virtual import Settings, Virtual
from .virtual_layers import VIRTUAL


def virtualize(
    model: nn.Module, scale: float, rho: float = 0.9, eps: float = 1e-6, **settings: Any
) -> list[str]:
    """Makes every nn.Linear and nn.Conv2d of a model virtual, in place: parameters, names and hooks stay.

    Subclasses of the two stay as they are, as the output of nn.MultiheadAttention, which does not call them.

    Args:
        model: the model; may itself be such a layer.
        scale, rho, eps, **settings: as `VirtualLinear`, for all layers.

    Returns:
        The names of the layers that were changed.

    Raises:
        ValueError: an option out of range, or the model has no such layer.
        TypeError: an option that there is not.

    Source: Li and Shu, "SVGD: A Virtual Gradients Descent Method for Stochastic Optimization", 2019.

    >>> import torch, fusedcalib.nn
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> fusedcalib.nn.virtualize(model, scale=0.1)
    ['0', '2']
    """
    found = Settings(scale, rho, eps, **settings)
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in VIRTUAL}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Linear and no nn.Conv2d")
    for layer in layers.values():
        layer.__class__ = VIRTUAL[type(layer)]
        layer._begin(found)
    return list(layers)


def set_loss_scale(model: nn.Module, scale: Any) -> None:
    """Tells the virtual layers of a model by how much the loss is scaled before backward.

    Args:
        model: the model.
        scale: a number, a 0-dim tensor, or a torch.amp.GradScaler, whose scale is then read in each backward
            pass, without waiting for the device.

    Raises:
        ValueError: the model has no virtual layer.

    >>> import torch, fusedcalib.nn
    >>> layer = fusedcalib.nn.VirtualLinear(4, 2, scale=0.1)
    >>> fusedcalib.nn.set_loss_scale(layer, torch.amp.GradScaler("cpu"))
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Virtual)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no virtual layer; virtualize it first")
    for layer in layers:
        layer.loss_scale = scale


def scale_in_step(model: nn.Module, optimizer: FusedOptimizer | None) -> list[str]:
    r"""Has the optimizer's step multiply the factors of the virtual layers by channel, at no memory traffic.

    .. math:: dW = \mathrm{diag}\left(\frac{s}{\sqrt{r + \epsilon}}\right) dW_\mathrm{plain}

    Where `r` is one number for each output channel, the virtual gradient is the plain one, its rows scaled.
    From here on `weight.grad` is the plain gradient, and what the optimizer does begins with its product:
    centring, decay, moments, and the norm of `max_grad_norm`, which is to be used instead of
    `clip_grad_norm_`. Gradients may be added up over several backward passes. Layers by position multiply
    in their backward pass as before.

    Args:
        model: with virtual layers.
        optimizer: of this library; it has to step them from now on. None gives the factors back to
            the backward pass, as does the end of the optimizer's life. A copy of the model does not know it.

    Returns:
        The names of the layers of which it multiplies the factors.

    Raises:
        TypeError: the optimizer is another library's.
        ValueError: it does not step a layer's weight; or there is no layer by channel; or squares are not
            averaged over ranks (`sync=False`), each of which would have factors of its own.

    Source: Li and Shu, "SVGD: A Virtual Gradients Descent Method for Stochastic Optimization", 2019.

    >>> import torch, fusedcalib.nn
    >>> layer = fusedcalib.nn.VirtualLinear(2, 1, bias=False, scale=1.0, rho=0.0, eps=0.0)
    >>> opt = fusedcalib.SGD(layer.parameters(), lr=1.0)
    >>> fusedcalib.nn.scale_in_step(torch.nn.Sequential(layer), opt)
    ['0']
    >>> _ = torch.nn.init.zeros_(layer.weight)
    >>> layer(torch.ones(4, 2)).mul(5).mean().backward()
    >>> opt.step()
    >>> layer.weight.grad.tolist(), layer.weight.tolist()
    ([[5.0, 5.0]], [[-1.0, -1.0]])
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Virtual) and not layer._by_position()
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no virtual layer by channel; virtualize it first")
    if optimizer is None:
        for layer in layers.values():
            set_row_factors(layer.weight, None)
        return []
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"{type(optimizer).__name__} knows no factors; use an optimizer of fusedcalib")
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        if layer.weight not in stepped:
            raise ValueError(f"{type(optimizer).__name__} does not step the weight of layer {name!r}; add it")
        if (
            not layer.settings.sync
            and torch.distributed.is_available()
            and torch.distributed.is_initialized()
        ):
            raise ValueError(f"layer {name!r} has sync=False: every rank would have factors of its own")
    found = []
    for layer in layers.values():
        weight = layer.weight
        dtype = torch.promote_types(layer.r.dtype, torch.float32)
        found.append(RowFactors(torch.ones(weight.shape[0], dtype=dtype, device=weight.device), optimizer))
        set_row_factors(weight, found[-1])

    def stepped_once(*_: Any) -> None:
        for factors in found:
            factors.used = False

    optimizer.register_step_post_hook(stepped_once)
    return list(layers)
