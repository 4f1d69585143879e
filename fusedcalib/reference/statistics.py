"""Statistics of a step from their definitions, in plain torch and fp64: of the weights before and after."""

import torch
from torch import Tensor


def statistics(before: list[Tensor], grads: list[Tensor], after: list[Tensor]) -> dict[str, Tensor]:
    r"""Of each name [parameters + 1], the first that of all parameters as if they were one vector.

    .. math::
        \lVert g \rVert, \lVert \Delta \rVert, \lVert \theta \rVert, \sqrt{\overline{\Delta^2}},
        -\cos(\Delta, g) \text{ with } \Delta = \theta - \theta_{before}

    >>> found = statistics([torch.zeros(2)], [torch.tensor([3.0, 4.0])], [torch.tensor([-3.0, -4.0])])
    >>> found["grad_norm"], found["cosine"]
    (tensor([5., 5.], dtype=torch.float64), tensor([1., 1.], dtype=torch.float64))
    """

    def flat(tensors: list[Tensor]) -> list[Tensor]:
        each = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        each = [t.detach().to(torch.float64).flatten() for t in each]
        return [torch.cat(each), *each]

    rows: dict[str, list[Tensor]] = {}
    for old, g, new in zip(flat(before), flat(grads), flat(after), strict=True):
        change = new - old
        norm = torch.linalg.vector_norm
        found = {
            "grad_norm": norm(g),
            "update_norm": norm(change),
            "update_rms": change.square().mean().sqrt(),
            "update_ratio": norm(change) / norm(new),
            "param_norm": norm(new),
            "max_abs_grad": g.abs().max(),
            "nonfinite": (~g.isfinite()).sum().double(),
            "unmoved": (change == 0).double().mean(),
            "cosine": -torch.nan_to_num(change / norm(change), nan=0.0) @ (g / norm(g)),
        }
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in rows.items()}
