"""Calibrated convolutions (CSGD): K branches that share one set of kernels, weighed by branch weights R.

Maps with branches are branch-major: [N, K C, H, W], channel k C + c.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..executors.branches import normalized

MODES = ("mixed", "grouped")
READOUTS = ("concat", "max", "mean")
GRAD_RULES = ("bp", "literal")


class _BranchKernels(torch.autograd.Function):
    """H_k = R_k * w: keeps R and w only, and going back makes one w at a time beside what it returns."""

    @staticmethod
    def forward(ctx: Any, R: Tensor, w: Tensor, grad_rule: str) -> Tensor:
        ctx.save_for_backward(R, w)
        ctx.grad_rule = grad_rule
        return R[:, None, None] * w

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        R, w = ctx.saved_tensors
        (dH,) = grads
        dR = dw = None
        if ctx.needs_input_grad[0]:
            dR = torch.stack([(w * dH_k).sum((0, 1)) for dH_k in dH]).to(R.dtype)
        if ctx.needs_input_grad[1]:
            shares = R if ctx.grad_rule == "bp" else R * R
            dw = shares[0] * dH[0]
            for share, dH_k in zip(shares[1:], dH[1:], strict=True):
                dw = torch.addcmul(dw, share, dH_k)
            dw = dw.to(w.dtype)
        return dR, dw, None


def branch_kernels(R: Tensor, w: Tensor, grad_rule: str = "bp") -> Tensor:
    r"""The kernels of all branches.

    .. math:: H_k = R_k * w, \qquad dw = \sum_k R_k * dH_k, \qquad dR_k = \sum_{o, i} w * dH_k

    Args:
        R: branch weights [K, kh, kw].
        w: kernels [out, in, kh, kw].
        grad_rule: "bp", or "literal" for :math:`dw = \sum_k R_k^2 * dH_k`: line 6 of Algorithm 1 read
            letter by letter, where R has come in by the chain rule already. Default "bp".

    Returns:
        H, [K, out, in, kh, kw].

    Raises:
        ValueError: the gradient rule is neither.

    Source: Zhuo et al., "Calibrated Stochastic Gradient Descent for Convolutional Neural Networks", AAAI
    2019, eq. 2 and 3.

    >>> import torch
    >>> branch_kernels(torch.tensor([0.25, 0.75]).view(2, 1, 1), torch.full((1, 1, 1, 1), 4.0)).flatten()
    tensor([1., 3.])
    """
    check_grad_rule(grad_rule)
    kernels: Tensor = _BranchKernels.apply(R, w, grad_rule)  # type: ignore[no-untyped-call]
    return kernels


def _split(x: Tensor, *sizes: int) -> Tensor:
    """Dimension 1 as several."""
    return x.reshape(x.shape[0], *sizes, *x.shape[2:])


class CalibConv2d(nn.Conv2d):
    r"""A convolution in K branches that share the kernels w, weighed by R (GClayer of CSGD).

    .. math:: F'_k = \left(\textstyle\sum_j F_j \otimes (R_k * w_j)\right) \text{ (mixed)}, \qquad
        F'_k = F_k \otimes (R_k * w) \text{ (grouped, eq. 4)}

    with :math:`R \ge 0` and :math:`\sum_k R_k = 1` at each position of the kernel. Takes maps
    [N, K in_channels, H, W] and gives [N, K out_channels, H', W'], branch-major (channel k C + c).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype: as nn.Conv2d, for one branch. The bias is the same for all branches.
        branches: K. Default 4.
        mode: "mixed": every branch sees the planes of all of them; `weight` is
            [out, K in / groups, kh, kw], so that K multiplies parameters by K and work by K^2. "grouped":
            branch k sees branch k; `weight` is [out, in / groups, kh, kw], work is multiplied by K.
            Default "mixed", whose parameter counts are those of the paper's tables.
        grad_rule: of the weight, "bp" or "literal", as `branch_kernels`. Default "bp".

    `R` [K, kh, kw] is a parameter to be stepped by `CSGD`: uniform random numbers in [0, 1), normalised. They
    must differ: equal branches stay equal for good.

    Raises:
        ValueError: an argument out of range, or an input without K in_channels planes.

    Source: Zhuo et al., "Calibrated Stochastic Gradient Descent for Convolutional Neural Networks", AAAI
    2019.

    >>> import torch, fusedcalib.nn
    >>> conv = fusedcalib.nn.CalibConv2d(3, 8, 3, padding=1, branches=2)
    >>> conv(torch.zeros(1, 6, 5, 5)).shape, conv.weight.shape, conv.R.shape
    (torch.Size([1, 16, 5, 5]), torch.Size([8, 6, 3, 3]), torch.Size([2, 3, 3]))
    >>> torch.allclose(conv.R.sum(0), torch.ones(3, 3))
    True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        branches: int = 4,
        mode: str = "mixed",
        grad_rule: str = "bp",
    ) -> None:
        check_branches(branches)
        if mode not in MODES:
            raise ValueError(f"Invalid mode: {mode!r}, expected one of {', '.join(MODES)}")
        check_grad_rule(grad_rule)
        planes = in_channels * (branches if mode == "mixed" else 1)
        super().__init__(
            *(planes, out_channels, kernel_size, stride, padding, dilation, groups),
            *(bias, padding_mode, device, dtype),
        )
        self.in_channels = in_channels
        self.branches = branches
        self.mode = mode
        self.grad_rule = grad_rule
        self.R = nn.Parameter(torch.empty(branches, *self.kernel_size, device=device, dtype=dtype))
        self.reset_branches()

    def reset_branches(self) -> None:
        """Draws R anew."""
        with torch.no_grad():
            if self.branches == 1:
                self.R.fill_(1.0)  # no random number, so that K = 1 is nn.Conv2d from the seed on
            else:
                self.R.copy_(normalized(self.R.uniform_()))

    def forward(self, input: Tensor) -> Tensor:
        K, groups = self.branches, self.groups
        if input.ndim != 4 or input.shape[1] != K * self.in_channels:
            raise ValueError(
                f"CalibConv2d of {K} branches of {self.in_channels} channels takes "
                f"[N, {K * self.in_channels}, H, W] and got {list(input.shape)}; BranchExpand makes branches "
                "of a plain image"
            )
        H = branch_kernels(self.R, self.weight, self.grad_rule)
        if self.mode == "grouped":
            return self._convolve(input, H.flatten(0, 1), self._tiled_bias(), K * groups)
        if groups == 1 or K == 1:
            return self._convolve(input, H.flatten(0, 1), self._tiled_bias(), groups)
        # torch's groups lie together, ours are spread over the branches: group-major, and back.
        H = _split(H, groups, -1).transpose(0, 1).flatten(0, 2)
        bias = None if self.bias is None else self.bias.view(groups, 1, -1).expand(-1, K, -1).flatten()
        x = _split(input, K, groups, -1).transpose(1, 2).flatten(1, 3)
        y = self._convolve(x, H, bias, groups)
        return _split(y, groups, K, -1).transpose(1, 2).flatten(1, 3)

    def _tiled_bias(self) -> Tensor | None:
        return None if self.bias is None or self.branches == 1 else self.bias.repeat(self.branches)

    def _convolve(self, x: Tensor, kernels: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        if bias is None:
            bias = self.bias
        return functional.conv2d(x, kernels, bias, self.stride, padding, self.dilation, groups)

    def extra_repr(self) -> str:
        shown: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{shown}, branches={self.branches}, mode={self.mode}, grad_rule={self.grad_rule}"


class BranchExpand(nn.Module):
    """Makes K branches of a plain image: all its channels K times over.

    Args:
        branches: K.

    Raises:
        ValueError: K is not an int of at least 1.

    >>> import torch, fusedcalib.nn
    >>> fusedcalib.nn.BranchExpand(2)(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)).flatten()
    tensor([1., 2., 1., 2.])
    """

    def __init__(self, branches: int) -> None:
        super().__init__()
        check_branches(branches)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, self.branches, *[1] * (x.ndim - 2))

    def extra_repr(self) -> str:
        return str(self.branches)


class BranchReadout(nn.Module):
    """Makes plain features of branches: [N, K C, ...] to [N, K C, ...] (concat) or [N, C, ...].

    Args:
        branches: K.
        mode: "concat": the branches as they lie; "max" and "mean": over the branches. Default "concat".

    Raises:
        ValueError: an argument out of range, or channels that are no multiple of K.

    >>> import torch, fusedcalib.nn
    >>> x = torch.tensor([[1.0, 2.0, 5.0, 0.0]])
    >>> [fusedcalib.nn.BranchReadout(2, mode)(x).tolist() for mode in ("concat", "max", "mean")]
    [[[1.0, 2.0, 5.0, 0.0]], [[5.0, 2.0]], [[3.0, 1.0]]]
    """

    def __init__(self, branches: int, mode: str = "concat") -> None:
        super().__init__()
        check_branches(branches)
        check_readout(mode)
        self.branches = branches
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % self.branches:
            raise ValueError(f"{x.shape[1]} channels are not {self.branches} branches of the same size")
        if self.mode == "concat":
            return x
        branches = _split(x, self.branches, -1)
        return branches.amax(1) if self.mode == "max" else branches.mean(1)

    def extra_repr(self) -> str:
        return f"{self.branches}, {self.mode!r}"


def check_branches(branches: int) -> None:
    """Raises ValueError unless it is an int of at least 1."""
    if type(branches) is not int or branches < 1:
        raise ValueError(f"Invalid branches: {branches!r}, expected an int >= 1")


def check_grad_rule(grad_rule: str) -> None:
    """Raises ValueError unless it is known."""
    if grad_rule not in GRAD_RULES:
        raise ValueError(f"Invalid grad_rule: {grad_rule!r}, expected one of {', '.join(GRAD_RULES)}")


def check_readout(readout: str) -> None:
    """Raises ValueError unless it is known."""
    if readout not in READOUTS:
        raise ValueError(f"Invalid readout: {readout!r}, expected one of {', '.join(READOUTS)}")
