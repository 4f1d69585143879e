"""Tables of the kernel tests: executors, rules with their options, and how tensors are stored."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy
import pytest
import torch

import fusedcalib
from fusedcalib.reference import ORACLES

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _needs(module: str) -> pytest.MarkDecorator:
    lacking = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(lacking, reason=f"needs {module}")


# The same test body runs everywhere: "triton" compiled where there is a GPU, else interpreted.
_MODE = pytest.mark.skipif(not INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")
_TRITON_MARKS = [_needs("triton")] if GPU else [_needs("triton"), pytest.mark.interpreted, _MODE]
TRITON = pytest.param("triton", marks=_TRITON_MARKS)
NUMBA = pytest.param("numba", marks=_needs("numba"))
FUSED = [NUMBA, TRITON]
BACKENDS = ["eager", *FUSED]


def _convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """fp32 from and to bf16, to nearest even, as every GPU does it."""
    if target.name == "fp32":
        return values.astype("uint32") << 16
    rounded = torch.from_numpy(numpy.array(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view("uint16").reshape(values.shape)


if INTERPRETED:  # the interpreter drops the bits instead of rounding (triton-lang/triton #8322)
    from triton.runtime import interpreter

    _original = interpreter._convert_float
    interpreter._convert_float = lambda values, source, target, rounding: (
        _convert if {source.name, target.name} == {"fp32", "bf16"} else _original
    )(values, source, target, rounding)


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and GPU else "cpu"


class Dtypes(NamedTuple):
    """How tensors are stored. Where `state` is None the optimizer makes it, like the parameter."""

    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype | None = None


_F32, _F64, _BF16, _F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {
    "fp32": Dtypes(_F32, _F32),
    "bf16": Dtypes(_BF16, _BF16),
    "fp64": Dtypes(_F64, _F64),
    "bf16 fp32 state": Dtypes(_BF16, _BF16, _F32),
    "fp16": Dtypes(_F16, _F16),
    "fp32 bf16 state": Dtypes(_F32, _F32, _BF16),
    "bf16 fp32 grad": Dtypes(_BF16, _F32),
    "fp32 bf16 grad": Dtypes(_F32, _BF16),
}

# Option sets of each rule, with numbers that no mistake leaves unchanged. A rule that is not listed
# runs with its defaults.
_AVERAGES = {"lr": 0.1, "betas": (0.8, 0.95)}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.4},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    ],
    "Adam": [
        _AVERAGES,
        {**_AVERAGES, "amsgrad": True, "eps": 0.3, "maximize": True},
        {**_AVERAGES, "decoupled_weight_decay": True, "eps": 0.01},
    ],
    "AdamW": [{**_AVERAGES, "eps": 0.3, "maximize": True}, {**_AVERAGES, "amsgrad": True}],
}
DECAYS = (0.0, 0.2)
CENTRALIZE = (False, "gradient", "update")


class Case(NamedTuple):
    rule: str
    options: dict[str, Any]
    dtypes: Dtypes

    @property
    def ours(self) -> type[torch.optim.Optimizer]:
        return getattr(fusedcalib, self.rule)


def _label(rule: str, options: dict[str, Any], dtypes: str) -> str:
    flags = [key for key, value in options.items() if value is True]
    flags += [key for key in ("momentum", "weight_decay") if options.get(key)]
    where = options["centralize"] or "uncentred"
    return " ".join([rule, *sorted(flags), where, dtypes]).replace(" ", "-")


def _cases(cover: Callable[[int, int, int], bool]) -> dict[str, Case]:
    """Rules x variants x decays x centring x dtypes, where `cover` says so of the numbers of a case.

    They are those of its rule, variant and decay together, of its centring and of its dtypes.
    """
    found = {}
    listed = [(r, v, d) for r in ORACLES for v, d in product(VARIANTS.get(r, [{}]), DECAYS)]
    for turn, (rule, variant, decay) in enumerate(listed):
        for (j, where), (k, dtypes) in product(enumerate(CENTRALIZE), enumerate(DTYPES)):
            if cover(turn, j, k):
                options = {**variant, "weight_decay": decay, "centralize": where}
                found[_label(rule, options, dtypes)] = Case(rule, options, DTYPES[dtypes])
    return found


PRODUCT = _cases(lambda turn, where, dtypes: True)
# One dtype set for each variant and decay, in turn; then also one decay for each variant and centring.
COVERING = _cases(lambda turn, where, dtypes: dtypes == turn % len(DTYPES))
PAIRWISE = _cases(
    lambda turn, where, dtypes: dtypes == turn % len(DTYPES) and (turn + turn // 2 + where) % 2 == 0
)


def matrix(eager: Mapping[str, Case], numba: Mapping[str, Case], triton: Mapping[str, Case]) -> list[Any]:
    """(backend, case) for parametrize: what is cheap on a backend decides how much of the product it gets."""
    shares = (("eager", (), eager), ("numba", NUMBA.marks, numba), ("triton", TRITON.marks, triton))
    return [
        pytest.param(backend, case, id=f"{backend}-{name}", marks=marks)
        for backend, marks, cases in shares
        for name, case in cases.items()
    ]
