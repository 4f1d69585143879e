"""A torch CNN made into a calibrated one: its forward is followed, its layers are exchanged."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from .calib import (
    MODES,
    BranchExpand,
    BranchReadout,
    CalibConv2d,
    check_branches,
    check_grad_rule,
    check_readout,
)

# What a value is: without branches, maps [N, K C, H, W], rows [N, K F], or the shape of maps.
PLAIN, MAPS, ROWS, SHAPE = "plain", "maps", "rows", "shape"

# What treats every channel alike, and by itself.
LAYERS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    nn.Hardsigmoid,
    *(nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d),
)
FUNCTIONS = {
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "sigmoid", "tanh"),
    *("dropout", "dropout2d", "max_pool2d", "boolean_dispatch", "avg_pool2d", "adaptive_avg_pool2d"),
    *("adaptive_max_pool2d", "add", "iadd", "sub", "mul", "imul", "truediv", "contiguous", "clone"),
    *("add_", "mul_"),
}
# Dimensions whose size is the same with branches.
KEPT = (0, 2, 3, -1, -2, slice(2, None, None), slice(-2, None, None))


class _RefusedError(Exception):
    """What stands in the way."""


def calibrate(
    model: nn.Module,
    branches: int = 4,
    mode: str = "mixed",
    readout: str = "concat",
    grad_rule: str = "bp",
) -> dict[str, str]:
    """Makes a CNN calibrated, in place: before training, for layers whose shapes change are drawn anew.

    Every Conv2d becomes a `CalibConv2d`; where it reads a plain image, after a `BranchExpand`. Every
    BatchNorm2d of branches has K times the channels. A Linear that reads branches gets a `BranchReadout`
    before it, with "concat" in the form of K times the inputs. What lies beyond stays.

    The model's forward is traced with torch.fx, so it must not depend on values, and all that happens to
    branches between convolutions and the read-out must treat channels alike: activations, pooling, dropout,
    sums, `flatten(1)`, `view(x.size(0), -1)`.

    Args:
        model: the model. Parameters that change are new: make optimizers afterwards.
        branches: K. Default 4.
        mode: "mixed" or "grouped", as `CalibConv2d`. Default "mixed".
        readout: "concat", "max" or "mean", as `BranchReadout`. Default "concat".
        grad_rule: "bp" or "literal", as `CalibConv2d`. Default "bp".

    Returns:
        What was changed: of each layer's name, from what to what.

    Raises:
        ValueError: an argument out of range, or the model has something that branches cannot go through. It
            is as it was then.

    Source: Zhuo et al., "Calibrated Stochastic Gradient Descent for Convolutional Neural Networks", AAAI
    2019.

    >>> import torch, fusedcalib.nn
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 10))
    >>> sorted(fusedcalib.nn.calibrate(model, branches=2, mode="grouped"))
    ['0', '2']
    >>> model(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """
    check_branches(branches)
    check_readout(readout)
    check_grad_rule(grad_rule)
    if mode not in MODES:
        raise ValueError(f"Invalid mode: {mode!r}, expected one of {', '.join(MODES)}")
    try:
        found = _follow(model)
        _check_replaceable(model, found)
    except _RefusedError as refusal:
        raise ValueError(f"cannot calibrate {type(model).__name__}: {refusal}; nothing was changed") from None
    layers = dict(model.named_modules())
    options = {"branches": branches, "mode": mode, "grad_rule": grad_rule}
    new = {name: _made(layers[name], before, readout, options) for name, before in found.items()}
    for name, layer in new.items():
        parent, _, own = name.rpartition(".")
        setattr(layers[parent], own, layer)
    return {name: f"{_short(layers[name])} -> {_short(layer)}" for name, layer in new.items()}


def _follow(model: nn.Module) -> dict[str, str]:
    """The layers to exchange, and what each of them reads."""
    if any(isinstance(layer, CalibConv2d) for layer in model.modules()):
        raise _RefusedError("it is calibrated already")
    if not list(model.children()):
        raise _RefusedError(
            "it is a single layer, which cannot be exchanged in place; put it in a Sequential"
        )
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and type(layer) is not nn.Conv2d:
            raise _RefusedError(f"{name} is a {type(layer).__name__}, a Conv2d of another kind")
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise _RefusedError(
            f"its forward cannot be traced by torch.fx ({type(error).__name__}: {error})"
        ) from error
    layers = dict(model.named_modules())
    values: dict[fx.Node, str] = {}
    found: dict[str, str] = {}
    direct: list[str] = []
    for node in graph.nodes:
        kinds = {values[argument] for argument in node.all_input_nodes}
        if node.op == "get_attr":
            direct.append(node.target)
        if node.op == "call_module":
            layer, before = layers[node.target], values[node.all_input_nodes[0]]
            values[node] = _through_layer(node.target, layer, before)
            changes = type(layer) is nn.Conv2d or (
                before != PLAIN and isinstance(layer, nn.Linear | nn.BatchNorm2d)
            )
            if found.get(node.target, before) != before:
                raise _RefusedError(f"{node.target} is used with branches and without")
            if changes:
                found[node.target] = before
        elif node.op == "output" and kinds - {PLAIN}:
            raise _RefusedError("it returns branches: no Linear reads them out")
        elif kinds <= {PLAIN}:
            values[node] = PLAIN
        else:
            values[node] = _through_call(node, values)
    for name in direct:
        if name.rpartition(".")[0] in found:
            raise _RefusedError(f"its forward uses {name} itself, not only the layer")
    if not any(type(layers[name]) is nn.Conv2d for name in found):
        raise _RefusedError("it has no Conv2d")
    return found


def _through_layer(name: str, layer: nn.Module, before: str) -> str:
    """What a layer makes of a value."""
    if type(layer) is nn.Conv2d and before in (PLAIN, MAPS):
        return MAPS
    if before == PLAIN:
        return PLAIN
    if type(layer) is nn.Linear and before == ROWS:
        return PLAIN
    if type(layer) is nn.BatchNorm2d and before == MAPS:
        return MAPS
    if type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) in ((1, -1), (1, 3)):
        return ROWS
    if type(layer) in LAYERS:
        return before
    raise _RefusedError(
        f"{name} ({type(layer).__name__}) reads {before} of branches, for which there is no rule"
    )


def _through_call(node: fx.Node, values: dict[fx.Node, str]) -> str:
    """What a function or method makes of values with branches."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    before, arguments = values[node.all_input_nodes[0]], node.args[1:]
    refusal = _RefusedError(f"its forward has {node.format_node()}, for which there is no rule with branches")
    if before == SHAPE:  # of a shape only the batch and the size of the maps mean the same
        if node.target is operator.getitem and arguments[0] in KEPT:
            return PLAIN
    elif name == "size" or (node.target is getattr and arguments == ("shape",)):
        if not arguments or node.target is getattr:
            return SHAPE
        if arguments[0] in KEPT:
            return PLAIN
    elif name in ("view", "reshape"):
        sizes = tuple(arguments[0]) if isinstance(arguments[0], tuple | list) else arguments
        batch = sizes[0]
        if (
            isinstance(batch, fx.Node)
            and _is_size(batch, values)
            and batch.args[1] == 0
            and sizes[1:] == (-1,)
        ):
            return ROWS
    elif name == "flatten":
        if {**dict(zip(("start_dim", "end_dim"), arguments, strict=False)), **node.kwargs} in (
            *({"start_dim": 1}, {"start_dim": 1, "end_dim": -1}),
        ):
            return ROWS
    elif name == "mean":
        options = {**dict(zip(("dim", "keepdim"), arguments, strict=False)), **node.kwargs}
        dims: Any = options.get("dim")
        if before == MAPS and isinstance(dims, tuple | list) and {d % 4 for d in dims} == {2, 3}:
            return MAPS if options.get("keepdim") else ROWS
    elif name in FUNCTIONS or node.target is torch.nn.functional.max_pool2d:
        inputs = node.all_input_nodes
        if all(values[a] == before or _is_size(a, values) for a in inputs):
            return before
        refusal = _RefusedError(
            f"its forward has {node.format_node()}, which mixes values with and without branches"
        )
    raise refusal


def _is_size(node: fx.Node, values: dict[fx.Node, str]) -> bool:
    """Whether a value is a number of a shape: x.size(0) or x.shape[0]."""
    of_shape = node.target is operator.getitem and values[node.all_input_nodes[0]] == SHAPE
    return of_shape or (node.target == "size" and len(node.args) == 2)


def _check_replaceable(model: nn.Module, found: dict[str, str]) -> None:
    """That each layer has a place of its own, and nothing hangs on it."""
    owners: dict[Any, set[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        owners.setdefault(param, set()).add(name.rpartition(".")[0])
    for name in found:
        layer = model.get_submodule(name)
        if not name:
            raise _RefusedError(
                "it is a single layer, which cannot be exchanged in place; put it in a Sequential"
            )
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(getattr(layer, kind) for kind in hooks):
            raise _RefusedError(f"{name} has hooks, which would be lost")
        if any(owners[param] != {name} for param in layer.parameters()):
            raise _RefusedError(f"{name} shares a parameter with another layer")


def _made(layer: nn.Module, before: str, readout: str, options: dict[str, Any]) -> nn.Module:
    """What takes the layer's place; options are those of `CalibConv2d`."""
    branches: int = options["branches"]
    new: nn.Module
    result: nn.Module | None = None
    if isinstance(layer, nn.Conv2d):
        new = CalibConv2d(
            *(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding),  # type: ignore[arg-type]
            *(layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode),  # type: ignore[arg-type]
            *(layer.weight.device, layer.weight.dtype),
            **options,
        )
        result = nn.Sequential(BranchExpand(branches), new) if before == PLAIN else new
    elif isinstance(layer, nn.BatchNorm2d):
        reference = layer.weight if layer.weight is not None else layer.running_mean
        place = {} if reference is None else {"device": reference.device, "dtype": reference.dtype}
        statistics = layer.track_running_stats
        numbers = (layer.eps, layer.momentum, layer.affine, statistics)
        new = nn.BatchNorm2d(branches * layer.num_features, *numbers, **place)  # type: ignore[arg-type]
        for name, value in layer.state_dict().items():
            target = new.state_dict()[name]
            target.copy_(value.repeat(branches) if value.ndim else value)
    else:
        assert isinstance(layer, nn.Linear)
        place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        if readout == "concat":
            new = nn.Linear(branches * layer.in_features, layer.out_features, layer.bias is not None, **place)
        else:
            new = layer
            result = nn.Sequential(BranchReadout(branches, readout), layer)
    _keep(layer, new)
    return (result or new).train(layer.training)


def _keep(layer: nn.Module, new: nn.Module) -> None:
    """Values of parameters whose shape stays, and which of them are frozen."""
    for name, param in layer.named_parameters():
        own = new.get_parameter(name)
        own.requires_grad_(param.requires_grad)
        if own is not param and own.shape == param.shape:
            with torch.no_grad():
                own.copy_(param)


def _short(layer: nn.Module) -> str:
    """A layer in a word."""
    if isinstance(layer, nn.Sequential):
        return ", ".join(map(_short, layer))
    name = type(layer).__name__
    if isinstance(layer, nn.Conv2d):
        branches = f" of {layer.branches} branches" if isinstance(layer, CalibConv2d) else ""
        return f"{name}({layer.in_channels}, {layer.out_channels}){branches}"
    if isinstance(layer, nn.Linear):
        return f"{name}({layer.in_features}, {layer.out_features})"
    if isinstance(layer, nn.BatchNorm2d):
        return f"{name}({layer.num_features})"
    return name
