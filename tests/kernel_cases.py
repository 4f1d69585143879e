"""Tables of the kernel tests: executors, rules with their options, and how tensors are stored."""

import importlib.util
import os
from collections.abc import Iterable, Mapping
from itertools import combinations, product
from typing import Any, NamedTuple

import pytest
import torch
from kernel_variants import VARIANTS

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


if INTERPRETED:
    import kernel_interpreter

    kernel_interpreter.improve()


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

# What a case is made of besides its rule. `Trial` takes max_row_norm in units of the root of a row's length.
AXES: dict[str, tuple[Any, ...]] = {
    "weight_decay": (0.0, 0.2),
    "l1": (0.0, 0.1),
    "centralize": (False, "gradient", "update"),
    "max_row_norm": (None, 0.3),
    "dtypes": tuple(DTYPES),
}
STAGES = tuple(axis for axis in AXES if axis != "dtypes")


class Case(NamedTuple):
    rule: str
    options: dict[str, Any]
    dtypes: Dtypes = DTYPES["fp32"]

    @property
    def ours(self) -> type[torch.optim.Optimizer]:
        return getattr(fusedcalib, self.rule)

    def without(self, *stages: str) -> "Case":
        """The case with these stages off."""
        return self._replace(options={**self.options, **{stage: AXES[stage][0] for stage in stages}})


def cases(*choices: dict[str, Any]) -> dict[str, Case]:
    """Cases by name, each a rule and the number of its variant, with the stages that are on and the dtypes.

    A variant may decide for itself what an axis would: how it decays.
    """
    found = {}
    for choice in choices:
        choice = {axis: values[0] for axis, values in AXES.items()} | {"variant": 0} | choice
        own, stages = VARIANTS[choice["rule"]][choice["variant"]], {stage: choice[stage] for stage in STAGES}
        case = Case(choice["rule"], own | stages | own, DTYPES[choice["dtypes"]])
        name = _label(case, choice["dtypes"])
        assert found.setdefault(name, case) == case, f"two cases of the name {name}"
    return found


def _label(case: Case, dtypes: str) -> str:
    """The rule, its variant, the stages that are on, and the dtypes."""
    own = {k: v for k, v in case.options.items() if k not in ("lr", "betas") and (v or k not in STAGES)}
    words = [v if k == "centralize" else k if v is True else f"{k}={v}" for k, v in own.items()]
    return " ".join([case.rule, *words, dtypes]).replace(" ", "-")


def covering(*meetings: tuple[str, ...]) -> dict[str, Case]:
    """Few cases in which all meets that has to: wherever one can stand on two axes of a meeting, a case does.

    Greedy: for each variant in turn the case that brings most together for the first time.
    """
    chosen = []
    turns = []
    for turn, (rule, variant) in enumerate((r, i) for r in ORACLES for i in range(len(VARIANTS[r]))):
        names = {"rule": rule, "variant": variant}
        spread = [*DTYPES][turn % len(DTYPES) :] + [*DTYPES][: turn % len(DTYPES)]  # where all are as good
        values = product(*(AXES[stage] for stage in STAGES), spread)
        choices = [dict(zip((*STAGES, "dtypes"), v, strict=True)) | names for v in values]
        turns.append([(choice, _met(choice, meetings)) for choice in choices])
    missing = {pair for choices in turns for _, met in choices for pair in met}
    while missing:
        for choices in turns:
            choice, met = max(choices, key=lambda c: len(c[1] & missing))
            if met & missing:
                chosen.append(choice)
                missing -= met
    return cases(*chosen)


def _met(choice: dict[str, Any], meetings: Iterable[tuple[str, ...]]) -> set[Any]:
    """What comes together in a choice: pairs of an axis and where the case stands on it."""
    rule, variant = choice["rule"], choice["variant"]
    own = {stage: "its own" for stage in STAGES if stage in VARIANTS[rule][variant]}
    place = {**choice, **own, "variant": (rule, variant)}
    pairs = {pair for meeting in meetings for pair in combinations(meeting, 2)}
    return {((a, place[a]), (b, place[b])) for a, b in pairs}


ALL = covering(("variant", *STAGES, "dtypes"))
# What is interpreted: every variant, every rule and every dtype with every stage.
COVERING = covering(("rule", "variant"), ("rule", *STAGES), ("dtypes", *STAGES))
# What is compiled to loops, a second and more each: every rule, every dtype with every stage. What variants
# do, and rules beside stages, is in the source of the rules, which is that of all executors.
LOOPS = covering(("dtypes", *STAGES))
LAST = {case.rule: name for name, case in COVERING.items()}  # of each rule
THERE = {case.rule for case in LOOPS.values()}
LOOPS |= {name: COVERING[name] for rule, name in LAST.items() if rule not in THERE}


def matrix(eager: Mapping[str, Case], numba: Mapping[str, Case], triton: Mapping[str, Case]) -> list[Any]:
    """(backend, case) for parametrize: what is cheap on a backend decides how many cases it gets."""
    shares = (("eager", (), eager), ("numba", NUMBA.marks, numba), ("triton", TRITON.marks, triton))
    return [
        pytest.param(backend, case, id=f"{backend}-{name}", marks=marks)
        for backend, marks, cases in shares
        for name, case in cases.items()
    ]
