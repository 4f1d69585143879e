"""The table of options: what None stands for, how groups keep a value, what errors say, where it is told."""

import inspect
import math
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import fusedcalib
from fusedcalib import GradientNoise, LangevinNoise, WeightNoise, noise
from fusedcalib.options import BACKENDS, OURS, SHARED, check_group, plain
from fusedcalib.storage import STATE_DTYPES

OPTIONS = Path(__file__).resolve().parents[1] / "docs" / "options.md"
each_option = pytest.mark.parametrize("option", SHARED, ids=lambda option: option.name)


def adamw(**options):
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    return fusedcalib.AdamW([p], backend="eager", **options)


# option: value, and what the error says of it
REFUSED = {
    "centralize": ("rows", "'rows', expected one of (False, True, 'gradient', 'update')"),
    "centralize_min_ndim": (0, "0, expected an int >= 1"),
    "matrix_dims": (
        (0, 1),
        "(0, 1), expected (-2, -1), or (1, 2) in a stack of three dimensions, or None; transpose parameters "
        "that lie otherwise",
    ),
    "cautious": (1, "1, expected True or False"),
    "cautious_weight_decay": (1, "1, expected True or False"),
    "l1": (-1, "-1, expected a finite number >= 0"),
    "max_row_norm": (0, "0, expected a number > 0, or None for no limit"),
    "seed": (2**64, f"{2**64}, expected an int in [0, 2^64)"),
    "max_grad_norm": (-1, "-1, expected a number > 0, or None for no limit"),
    "skip_nonfinite": (1, "1, expected True or False"),
    "ema_decay": (1, "1, expected a number in (0, 1) or None"),
    "stochastic_rounding": (1, "1, expected True or False"),
    "state_dtype": (
        "fp8",
        "'fp8', expected torch.float32, torch.bfloat16, torch.float16, torch.float64, '8bit', "
        "'bfloat16_stochastic', None or a dict of those by the states' names",
    ),
    "master_weights": ("split4", '\'split4\', expected None, "split16", "split8" or "float32"'),
    "min_8bit_size": (-1, "-1, expected an int >= 0"),
}


@pytest.mark.parametrize(("name", "value", "said"), [(k, *v) for k, v in REFUSED.items()])
def test_what_errors_say(name, value, said):
    with pytest.raises(ValueError, match=re.escape(f"Invalid {name} value: {said}") + "$"):
        adamw(**{name: value})


def test_what_errors_say_of_the_others():
    names = "GradientNoise, WeightNoise, LangevinNoise"
    with pytest.raises(ValueError, match=rf"^Invalid noise: 3, expected one of {names}, its dict, or None$"):
        adamw(noise=3)
    with pytest.raises(ValueError, match=r"^Invalid backend: 'cudnn', expected one of auto, triton, numba, "):
        fusedcalib.AdamW([torch.zeros(1)], backend="cudnn")
    with pytest.raises(ValueError, match=r"does not support differentiable=True; use torch\.optim\.AdamW\("):
        adamw(differentiable=True)
    assert {option.name for option in OURS} == {*REFUSED, "noise"}, "what has no check above?"


@pytest.mark.parametrize("option", OURS, ids=lambda option: option.name)
def test_how_groups_keep_a_default(option):
    """Numbers, strings and dicts, which can be saved; what is kept may be given again."""
    (group,) = adamw().param_groups
    kept = group[option.name]
    assert kept is not None
    assert (kept == option.none) if option.none is not None else kept == (option.default or kept)
    (same,) = adamw(**{option.name: kept}).param_groups
    assert same == {**group, "params": same["params"]}
    if option.default is None:
        (told,) = adamw(**{option.name: None}).param_groups
        assert told[option.name] == kept
    late = {**group, option.name: option.default}
    check_group(fusedcalib.AdamW, late)
    assert plain(late)[option.name] == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_group_may_have_a_dtype_as_it_is_called_or_as_it_is(dtype):
    p, q = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    p.grad, q.grad = torch.ones(2, 3), torch.ones(2, 3)
    optimizer = fusedcalib.AdamW([{"params": [p], "state_dtype": dtype}, {"params": [q]}], backend="eager")
    assert optimizer.param_groups[0]["state_dtype"] == str(dtype).removeprefix("torch.")
    optimizer.param_groups[1]["state_dtype"] = dtype
    optimizer.step()
    assert [optimizer.state[param]["exp_avg"].dtype for param in (p, q)] == [dtype, dtype]
    assert STATE_DTYPES[str(dtype).removeprefix("torch.")] is dtype


def test_backends_are_the_executors():
    assert BACKENDS[0] == "auto"
    for name in BACKENDS[1:]:
        assert callable(import_module(f"fusedcalib.executors.{name}").why_not)


# -- what is told -----------------------------------------------------------------------------


@each_option
def test_an_option_is_told_in_every_place(option):
    words = " ".join(option.text.split())
    assert words.startswith(option.doc)
    assert " ".join(f"{option.name}: {words}".split()) in " ".join(fusedcalib.FusedOptimizer.__doc__.split())
    first = re.split(r":math:|[\"(]", option.doc)[0]
    assert f"- `{option.name}`: {first}" in OPTIONS.read_text()


def test_the_docstring_is_one():
    """Every option once, in an indentation that holds for the whole."""
    doc = inspect.getdoc(fusedcalib.FusedOptimizer)
    listed = re.search(r"^Args:\n((?:    .*\n)+)", doc, re.MULTILINE)[1]
    names = re.findall(r"^    (\w+): ", listed, re.MULTILINE)
    assert names == ["params", *(option.name for option in SHARED)]
    assert "**options" not in doc


# -- noise is worked out once -------------------------------------------------------------------

EACH = [GradientNoise(eta=0.3, gamma=0.5), WeightNoise(std=0.25), LangevinNoise(temperature=2.0)]


@pytest.mark.parametrize("given", EACH, ids=lambda given: given.kind)
def test_a_noise_is_worked_out_once(given, monkeypatch):
    """A scheduler changes every group at every step; its noise is the same."""
    optimizer = adamw(noise=given)
    optimizer.step()
    asked = []
    monkeypatch.setattr(noise, "as_dict", lambda *args: asked.append(args))
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 * step
        optimizer.step()
    assert asked == []


def test_a_noise_that_changes_is_worked_out_anew():
    assert noise.parsed({"kind": "weights", "std": 0.5}).schedule == (0.5, 0.0, 0.0, 0.0)
    assert noise.parsed({"kind": "weights", "std": 0.25}).schedule == (0.25, 0.0, 0.0, 0.0)
    std = torch.tensor(0.5)
    changing = {"kind": "weights", "std": std}
    assert noise.parsed(changing).schedule[0] == 0.5
    std.fill_(2.0)
    assert noise.parsed(changing).schedule[0] == 2.0
    optimizer = adamw(lr=0.1, noise=WeightNoise(std=0.0))
    (p,) = optimizer.param_groups[0]["params"]
    plain_ = adamw(lr=0.1)
    for _ in range(2):
        optimizer.step()
        plain_.step()
        assert torch.equal(p, plain_.param_groups[0]["params"][0])
    optimizer.param_groups[0]["noise"]["std"] = 10.0  # in place
    optimizer.step()
    plain_.step()
    assert not torch.allclose(p, plain_.param_groups[0]["params"][0], atol=1)
    optimizer.param_groups[0]["noise"]["std"] = math.nan
    with pytest.raises(ValueError, match="Invalid std of WeightNoise: nan"):
        optimizer.step()
