"""What the gate cannot see of a method's clip and noise, on one tensor of zeros.

That the noise has the deviation that it should, falls as it should and is new in each step; and the limit of
the clip, as AdamW's step hardly depends on the size of gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..models import shapes
from ..models.shapes import ParamList
from .method import GAMMA, Method, Subject

SPARE = (1024, 512)  # shape of the tensor


def shows_gradient(subject: Subject) -> bool:
    """Whether the gradient that the rule was given can be read from what the step left: see `Spare`."""
    simple = {"lr", "betas", "eps", "weight_decay"}
    return subject.cls in ("AdamW", "SGD") and subject.options.keys() <= simple


class Spare:
    """A method on one tensor of zeros, to see what gradient its rule is given."""

    def __init__(self, method: Method, subject: Subject, device: torch.device, dtype: torch.dtype) -> None:
        spec = ParamList("spare", (SPARE,))
        (self._param,) = params = shapes.build(spec, device, dtype)
        with torch.no_grad():
            self._param.zero_()
        self.built = method.make(spec, params, subject)
        self._options = subject.options
        self._before = torch.zeros(SPARE, device=device, dtype=torch.float64)

    def seen(self, grad: Tensor | None = None) -> Tensor:
        """The gradient that the rule saw in a step with this one (nothing)."""
        param, optimizer = self._param, self.built.optimizer
        assert param.grad is not None
        assert optimizer is not None
        param.grad.zero_() if grad is None else param.grad.copy_(grad)
        self.built.step()
        average: Tensor | None = optimizer.state[param].get("exp_avg")
        before = self._before
        if average is None:  # plain SGD
            self._before = param.detach().double()
            lr, decay = float(self._options["lr"]), float(self._options["weight_decay"])
            return (before - self._before) / lr - decay * before
        self._before, beta = average.to(param.device).double(), float(self._options["betas"][0])
        return (self._before - beta * before) / (1 - beta)


def fault(method: Method, subject: Subject, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the clip or the noise of a method: AdamW, or chance, hides it from the gate."""
    wrong = None
    if method.extras.clip is not None:
        wrong = _clip_fault(method, Spare(method, subject, device, dtype), method.extras.clip)
    if method.extras.noise is not None and not wrong:
        wrong = _noise_fault(method, Spare(method, subject, device, dtype), method.extras.noise)
    return wrong


def _clip_fault(method: Method, spare: Spare, limit: float) -> str | None:
    """A gradient beyond the limit, and one within it."""
    if spare.built.set_noise:
        spare.built.set_noise(0.0)
    like = spare.seen()
    grad = torch.randn(SPARE, generator=torch.Generator().manual_seed(1)).to(like).add_(1.0)
    grad /= grad.norm()
    for share in (100.0, 0.5):
        seen = spare.seen(grad * (share * limit))
        wanted = grad * (min(share, 1.0) * limit)
        if method.extras.gc:
            wanted -= wanted.mean(dim=1, keepdim=True)
        if not float((seen - wanted).abs().amax()) <= 1e-4 * float(wanted.abs().amax()):
            return f"wrong clip of a gradient of {share:g} times the limit"
    return None


def _noise_fault(method: Method, spare: Spare, eta: float) -> str | None:
    """Two steps whose gradient is nothing but noise."""
    rows, columns = SPARE
    noises = []
    for step in range(2):
        noise = spare.seen()
        sigma = math.sqrt(eta / (1 + step) ** GAMMA)
        share = math.sqrt(1 - 1 / columns) if method.extras.gc else 1.0  # what centring leaves
        found, mean = float(noise.std()), float(noise.mean())
        if not abs(found / (sigma * share) - 1) <= 0.01:  # ten deviations of it
            return f"wrong noise: deviation {found:.3g} in step {step}, not {sigma * share:.3g}"
        if not abs(mean) <= 6 * sigma / math.sqrt(rows * columns):
            return f"wrong noise: mean {mean:.3g} in step {step}"
        if method.extras.gc and not float(noise.mean(dim=1).abs().amax()) <= 1e-3 * sigma:
            return f"wrong noise: not centred in step {step}"
        noises.append(noise.flatten())
    alike = float(torch.corrcoef(torch.stack(noises))[0, 1])
    return f"wrong noise: two steps correlate by {alike:.3g}" if not abs(alike) <= 0.01 else None
