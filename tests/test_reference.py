"""What all oracles have in common: options, purity, dtypes, docs, discovery."""

import ast
import copy
import doctest
import importlib
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedcalib import reference
from fusedcalib.reference import ORACLES, stages

F64 = torch.float64
EPS = torch.finfo(F64).eps
# The forms of each rule, with numbers that no mistake leaves unchanged.
FORMS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
    ],
    "SGDW": [{}, {"momentum": 0.9, "dampening": 0.3}],
    "Adam": [{}, {"amsgrad": True}, {"betas": (0.5, 0.6), "eps": 0.3}],
    "AdamW": [{}, {"amsgrad": True}, {"betas": (0.5, 0.6), "eps": 0.3}],
    "Adagrad": [{}, {"lr_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 0.3}],
    "Adadelta": [{}, {"rho": 0.5, "eps": 0.1}],
    "RMSprop": [
        {},
        {"momentum": 0.9},
        {"centered": True, "alpha": 0.8},
        {"centered": True, "alpha": 0.8, "momentum": 0.5, "eps": 0.3},
    ],
    "Adamax": [{}, {"betas": (0.5, 0.6), "eps": 0.3}],
    "NAdam": [{}, {"betas": (0.5, 0.6), "momentum_decay": 0.5, "eps": 0.3}],
    "RAdam": [{}, {"betas": (0.5, 0.6)}, {"betas": (0.8, 0.95), "eps": 0.3}],
    "Lion": [{}, {"betas": (0.5, 0.6)}],
    "Signum": [{}, {"momentum": 0.0}],
    "Adan": [{}, {"no_prox": True}],
    "ADOPT": [{}, {"clip_exponent": None, "decoupled_weight_decay": True}],
    "AdEMAMix": [{}, {"betas": (0.5, 0.6, 0.8), "beta3_warmup": 3, "alpha_warmup": 4, "eps": 0.3}],
    "AdaBelief": [{}, {"betas": (0.5, 0.6), "eps": 0.3, "decoupled_weight_decay": True}],
    "LaProp": [{}, {"betas": (0.5, 0.6), "eps": 0.3}],
    "LAMB": [{}, {"betas": (0.5, 0.6), "eps": 0.3, "trust_clip": True, "always_adapt": True}],
    "LARS": [{}, {"momentum": 0.9, "trust_coeff": 0.5, "always_adapt": True}],
    "StableAdamW": [{}, {"betas": (0.5, 0.6), "eps": 0.3}],
    "AdamMini": [{}, {"betas": (0.5, 0.6), "eps": 0.3, "decoupled_weight_decay": False}],
}
CASES = [(name, form) for name, forms in FORMS.items() for form in forms]


def label(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ",".join(f"{k}={v}" for k, v in value.items() if v) or "defaults"


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("value", [None, 1, 0, "grad", "", "Update", ["update"], 2.0])
def test_an_unknown_place_for_centring_is_refused(name: str, value: Any) -> None:
    w = torch.ones(2, 2)
    with pytest.raises(ValueError, match="centralize must be"):
        ORACLES[name](w, w, {}, centralize=value)


def test_true_means_gradient() -> None:
    w, g = torch.rand(2, 3, dtype=F64), torch.rand(2, 3, dtype=F64)
    for oracle in ORACLES.values():
        spelled = oracle(w, g, {}, centralize="gradient", weight_decay=0.1)[0]
        assert torch.equal(oracle(w, g, {}, centralize=True, weight_decay=0.1)[0], spelled)


@pytest.mark.parametrize("name", ORACLES)
def test_an_unknown_option_is_refused(name: str) -> None:
    foreign = "decoupled_weight_decay" if name == "Adan" else "no_prox"
    for option in ("foo", foreign):
        with pytest.raises(TypeError, match=option):
            ORACLES[name](torch.ones(2), torch.ones(2), {}, **{option: True})


@pytest.mark.parametrize("where", [False, "gradient", "update"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=label)
def test_inputs_are_neither_changed_nor_handed_back(
    name: str, options: dict[str, Any], where: bool | str
) -> None:
    for shape, decay in itertools.product(((3,), (2, 3)), (0, 0.1)):
        w, g = torch.rand(shape, dtype=F64), torch.rand(shape, dtype=F64)
        state: dict[str, Any] = {}
        for _ in range(2):
            given = copy.deepcopy((w, g, state))
            out, new_state = ORACLES[name](w, g, state, centralize=where, weight_decay=decay, **options)
            torch.testing.assert_close((w, g, state), given, rtol=0, atol=0)
            inputs = {t.data_ptr() for t in (w, g, *state.values()) if torch.is_tensor(t)}
            outputs = [t for t in (out, *new_state.values()) if torch.is_tensor(t)]
            assert inputs.isdisjoint(t.data_ptr() for t in outputs)
            w, state = out, new_state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ORACLES)
def test_the_given_dtype_is_kept_and_step_is_an_int(name: str, dtype: torch.dtype) -> None:
    w, state = torch.ones(2, 2, dtype=dtype), {}
    for count in (1, 2):
        w, state = ORACLES[name](w, torch.ones_like(w), state, weight_decay=0.1, centralize=True)
        kept = [v for v in state.values() if torch.is_tensor(v)]
        assert {t.dtype for t in (w, *kept)} == {dtype}
        if "step" in state:
            assert type(state["step"]) is int
            assert state["step"] == count
            state["step"] = torch.tensor(float(count))


def files() -> list[Path]:
    return sorted(Path(reference.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_nothing_of_the_package_is_imported(path: Path) -> None:
    """Own files by a relative import; torch and the standard library otherwise."""
    allowed = {*sys.stdlib_module_names, "torch"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            inside = node.level == 1
            assert inside or (node.level == 0 and str(node.module).split(".")[0] in allowed)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_examples_of_the_docs(path: Path) -> None:
    name = "fusedcalib.reference" + ("" if path.stem == "__init__" else f".{path.stem}")
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0


def test_every_file_is_discovered_and_no_name_is_taken_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert set(ORACLES) >= {"SGD", "Adam", "AdamW"}
    monkeypatch.setattr(stages, "ORACLES", {"SGD": ORACLES["SGD"]}, raising=False)
    with pytest.raises(RuntimeError, match="SGD"):
        reference._discover()
