"""Fixtures of every test file; the tables behind them are in cases.py."""

import random
import zlib

import numpy
import pytest
import torch
from cases import BACKENDS, DEVICE, Twin, parameters
from rule_cases import RULES, Rule


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Random numbers that depend on the test's own name only, whatever ran before."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    numpy.random.seed(value)
    random.seed(value)
    return value


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def on_device():
    """Tensors are made where the backends run; convolutions give the same bits again."""
    with torch.device(DEVICE), torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        yield


@pytest.fixture(params=list(RULES))
def rule(request: pytest.FixtureRequest) -> Rule:
    return RULES[request.param]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ours(rule: Rule, backend: str):
    """`ours(params, ...)`: this rule on this backend, with the options of an ordinary run."""
    return lambda params, **options: rule.ours(params, **{**rule.options, "backend": backend, **options})


@pytest.fixture
def twin(rule: Rule, backend: str):
    """`twin(...)`: a run in this package beside the same run in torch.optim; see cases.Twin."""

    def build(params=None, dtype=torch.float32, **options):
        params = parameters(dtype=dtype) if params is None else params
        return Twin(rule, backend, params, **{**rule.options, **options})

    return build
