"""Param groups of a model: what decays, what is centred, and what neither is good for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["muon_groups", "param_groups"]

NORMS = (nn.LayerNorm, nn.RMSNorm)  # their weights can be matrices, those of other norms are vectors
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

# A shared parameter has several names.
Names = Mapping[nn.Parameter, list[str]]


def param_groups(
    model: nn.Module,
    weight_decay: float | None = 0.0,
    no_decay: Iterable[str] = (),
    centralize: bool | str = False,
    embeddings: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Param groups of a model, for any optimizer: weight decay and centring where they make sense.

    =============  ==================================================  ============  ==========
    group          parameters                                          weight decay  centring
    =============  ==================================================  ============  ==========
    "weights"      all others                                          as given      as given
    "embeddings"   of nn.Embedding and nn.EmbeddingBag, also tied      as given      never
    "no_decay"     biases, norms, vectors and scalars, those named     0             never
    =============  ==================================================  ============  ==========

    Those named are in `no_decay`, or the model or a part of it returns them from a method
    `no_weight_decay()`, as timm's models do. Frozen parameters are left out, shared ones appear once.

    Args:
        model: the model; before it is wrapped in FSDP, which flattens parameters.
        weight_decay: of weights and embeddings. Default 0. None leaves it to the optimizer's own.
        no_decay: names of parameters, or shell patterns such as "*.relative_position*". Default none.
        centralize: of the weights, as the optimizers take it. Default False leaves it to the optimizer's.
        embeddings: further options of the group of embeddings, such as `{"state_dtype": "float32"}` beside
            `state_dtype="8bit"` for the others. Default none.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: nothing in the model can be trained, or an entry of `no_decay` matches nothing.

    >>> import torch, fusedcalib
    >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2))
    >>> groups = fusedcalib.param_groups(model, weight_decay=0.1, centralize=True)
    >>> for group in fusedcalib.AdamW(groups, lr=1e-3).param_groups:
    ...     print(group["name"], group["param_names"], group["weight_decay"], group["centralize"])
    weights ['1.weight'] 0.1 True
    embeddings ['0.weight'] 0.1 False
    no_decay ['1.bias'] 0.0 False
    """
    patterns = [no_decay] if isinstance(no_decay, str) else list(no_decay)
    names = _trainable(model, patterns)
    kinds = _kinds(model, names, [*patterns, *_named_by_parts(model)])
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    options: dict[str, dict[str, Any]] = {
        "weights": {**decay, "centralize": centralize} if centralize else decay,
        "embeddings": {**decay, "centralize": False, **(embeddings or {})},
        "no_decay": {"weight_decay": 0.0, "centralize": False},
    }
    return [
        {"name": kind, "params": [(names[p][0], p) for p in names if kinds[p] == kind], **options[kind]}
        for kind in options
        if kind in kinds.values()
    ]


def _trainable(model: nn.Module, patterns: list[str], asked: str = "no_decay") -> Names:
    """The trainable parameters, once the model and the patterns are found to fit."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{'muon_groups' if asked == 'adamw' else 'param_groups'} needs the model itself, a "
            f"torch.nn.Module, and got {type(model).__name__}: "
            "pass model, not model.parameters()"
        )
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if is_lazy(param):
            raise ValueError(f"{name} has no shape yet: run a batch through the model before param_groups")
        names.setdefault(param, []).append(name)
    trainable = {param: several for param, several in names.items() if param.requires_grad}
    if not trainable:
        mend = "all are frozen; requires_grad_() those to train" if names else "it has none at all"
        raise ValueError(f"{type(model).__name__} has no trainable parameter: {mend}")
    every = [name for several in names.values() for name in several]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise ValueError(
                f"{asked}: {pattern!r} matches no parameter of {type(model).__name__}; names are those of "
                f"model.named_parameters(), such as {', '.join(get_close_matches(pattern, every, cutoff=0))}"
            )
    return trainable


def _kinds(model: nn.Module, names: Names, patterns: list[str]) -> dict[nn.Parameter, str]:
    """The group that each parameter belongs to."""
    norms, embeddings = _inside(model, NORMS), _inside(model, EMBEDDINGS)
    kinds = {}
    for param, several in names.items():
        named = any(fnmatchcase(name, pattern) for name in several for pattern in patterns)
        if named or param.ndim < 2 or param in norms or any(map(_is_bias, several)):
            kinds[param] = "no_decay"
        else:
            kinds[param] = "embeddings" if param in embeddings else "weights"
    return kinds


def _inside(model: nn.Module, layers: tuple[type[nn.Module], ...]) -> set[nn.Parameter]:
    """All parameters of the layers of these kinds, wherever else they are used."""
    return {p for module in model.modules() if isinstance(module, layers) for p in module.parameters()}


def _is_bias(name: str) -> bool:
    """Such as "fc.bias", "attention.bias_k" and "relative_position_bias_table"."""
    return not {"bias", "biases"}.isdisjoint(name.rpartition(".")[2].split("_"))


def _named_by_parts(model: nn.Module) -> Iterator[str]:
    """What `no_weight_decay()` of the model and of its parts returns, as names in the model."""
    for prefix, module in model.named_modules():
        method = getattr(module, "no_weight_decay", None)
        for name in method() if callable(method) else ():
            yield f"{prefix}.{name}" if prefix else name


# Layers whose weights are no stack of matrices though they have three dimensions, or no hidden matrix.
_NO_MATRICES = (nn.Conv1d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
HEADS = ("lm_head", "head", "heads", "classifier", "output", "embed_out", "score", "unembed", "to_logits")


def muon_groups(
    model: nn.Module,
    lr: float | None = None,
    adamw_lr: float | None = None,
    weight_decay: float | None = None,
    adamw: Iterable[str] = (),
    **options: Any,
) -> list[dict[str, Any]]:
    """Param groups of a model for `Muon`: hidden matrices to it, all others to AdamW, in one optimizer.

    ===========  ======================================================  =========  ============
    group        parameters                                              use_muon   weight decay
    ===========  ======================================================  =========  ============
    "matrices"   hidden weights of two dimensions or more                True       as given
    "adamw"      embeddings, output layers, kernels of nn.Conv1d,        False      as given
                 those named by `adamw`
    "no_decay"   biases, norms, vectors and scalars                      False      0
    ===========  ======================================================  =========  ============

    Output layers are those that `model.get_output_embeddings()` returns, and linear layers whose name ends
    with one of `lm_head`, `head`, `heads`, `classifier`, `output`, `embed_out`, `score`, `unembed`,
    `to_logits`, unless there are several of such a name (as the `output` of every layer of BERT).

    Args:
        model: the model.
        lr: learning rate of the matrices. Default None leaves it to the optimizer's.
        adamw_lr: of the others. Default None: the same.
        weight_decay: of matrices and "adamw". Default None leaves it to the optimizer's own.
        adamw: names of further parameters that AdamW is to step, or shell patterns. Default none.
        **options: further options of the groups that AdamW steps, as `betas`. Their `eps` is 1e-8 by default.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: nothing in the model can be trained, or an entry of `adamw` matches nothing.

    >>> import torch, fusedcalib
    >>> layers = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9, bias=False)
    >>> model = torch.nn.ModuleDict(dict(zip(("embed", "hidden", "head"), layers)))
    >>> opt = fusedcalib.Muon(fusedcalib.muon_groups(model, lr=0.02, adamw_lr=1e-3))
    >>> for group in opt.param_groups:
    ...     print(group["name"], group["param_names"], group["use_muon"], group["lr"])
    matrices ['hidden.weight'] True 0.02
    adamw ['embed.weight', 'head.weight'] False 0.001
    no_decay ['hidden.bias'] False 0.001
    """
    patterns = [adamw] if isinstance(adamw, str) else list(adamw)
    names = _trainable(model, patterns, "adamw")
    kinds = _kinds(model, names, [*_named_by_parts(model)])
    outside = _outer(model) | _inside(model, _NO_MATRICES)
    found: dict[str, list[tuple[str, nn.Parameter]]] = {"matrices": [], "adamw": [], "no_decay": []}
    for param, several in names.items():
        named = any(fnmatchcase(name, pattern) for name in several for pattern in patterns)
        other = kinds[param] == "embeddings" or param in outside or named
        kind = "no_decay" if kinds[param] == "no_decay" else "adamw" if other else "matrices"
        found[kind].append((several[0], param))
    rate = lr if adamw_lr is None else adamw_lr
    shared = {"use_muon": False, "eps": 1e-8, **({} if rate is None else {"lr": rate}), **options}
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    own: dict[str, dict[str, Any]] = {
        "matrices": {"use_muon": True, **({} if lr is None else {"lr": lr}), **decay},
        "adamw": {**shared, **decay},
        "no_decay": {**shared, "weight_decay": 0.0},
    }
    return [{"name": kind, "params": params, **own[kind]} for kind, params in found.items() if params]


def _outer(model: nn.Module) -> set[nn.Parameter]:
    """The weights of output layers."""
    layers = [
        (name.rpartition(".")[2], layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in HEADS
    ]
    endings = [ending for ending, _ in layers]
    outer = {p for ending, layer in layers if endings.count(ending) == 1 for p in layer.parameters()}
    method = getattr(model, "get_output_embeddings", None)
    last = method() if callable(method) else None
    return outer | ({*last.parameters()} if isinstance(last, nn.Module) else set())
