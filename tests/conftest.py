"""Fixtures of every test file; the tables behind them are in cases.py."""

import gc
import os
import random
import re
import signal
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from cases import BACKENDS, BY_LOOPS, DEVICE, FUSED, Twin, parameters
from rule_cases import RULES, Rule

# A shell has what it starts in the background ignore interrupts, and so does whatever that starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Random numbers that depend on the test's own name only, whatever ran before."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    numpy.random.seed(value)
    random.seed(value)
    return value


@pytest.fixture(autouse=True)
def environment():
    """Libraries leave variables behind, as how many ranks there are, which later tests must not find."""
    kept = dict(os.environ)
    yield
    if os.environ != kept:
        os.environ.clear()
        os.environ.update(kept)


def pytest_collection_finish() -> None:
    """The garbage collector need not look again at what is there for the whole run: all modules and tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def may_be_interpreted(path: Path) -> bool:
    """Whether tests of a file may have the mark "interpreted", which comes with kernel_cases.TRITON."""
    text = path.read_text(encoding="utf-8")
    return "kernel_cases" in text or "mark.interpreted" in text


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where kernels are interpreted, and no file is asked for, the others are not even imported."""
    asked = config.option.file_or_dir or os.environ.get("TRITON_INTERPRET") != "1"
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if not asked and is_test and not may_be_interpreted(collection_path) else None


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def on_device():
    """Tensors are made where the backends run; convolutions give the same bits again."""
    with torch.device(DEVICE), torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        yield


PAIRS = [(rule, b) for rule in RULES for b in BACKENDS if b != "numba" or rule in BY_LOOPS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Where a test says nothing else of them: every rule, every backend, both together where it has both."""
    marks = metafunc.definition.iter_markers("parametrize")
    said = " ".join(str(mark.args[0]) for mark in marks)
    open_ = [
        n for n in ("rule", "backend") if n in metafunc.fixturenames and not re.search(rf"\b{n}\b", said)
    ]
    values = {"rule": list(RULES), "backend": BACKENDS}
    if len(open_) == 2:
        metafunc.parametrize(open_, PAIRS, indirect=True)
    for name in open_ if len(open_) == 1 else ():
        metafunc.parametrize(name, values[name], indirect=True)


# Every kind of loop is compiled, and tried, by the kernel tests: these files are about what is around a loop,
# and have one rule's. A kind takes one to five seconds to compile, more than all else that they do.
ONE_RULES_LOOPS = tuple(
    f"test_{name}" for name in ("contract", "chain", "plans", "faults", "noise", "properties")
)
MOST_KINDS = 8  # of loops, that such a file may compile


def is_around_loops(path: Path) -> bool:
    return path.stem.startswith(ONE_RULES_LOOPS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out loops of other rules than AdamW in files that are not about them; the kernels come first."""

    def is_wanted(item: pytest.Item) -> bool:
        given = getattr(item, "callspec", None)
        if given is None or not is_around_loops(item.path):
            return True
        rule = given.params.get("rule", "AdamW")
        name = rule.name if isinstance(rule, Rule) else rule
        return name == "AdamW" or "numba" not in given.id.split("-")

    def comes_late(item: pytest.Item) -> bool:
        return not item.path.stem.startswith("test_kernels")  # what compiles most comes first

    items[:] = sorted(filter(is_wanted, items), key=comes_late)
    marked = {item.path for item in items if item.get_closest_marker("interpreted")}
    assert all(map(may_be_interpreted, marked)), "a file that the interpreted run would leave out"


@pytest.fixture(scope="module", autouse=True)
def few_loops(request: pytest.FixtureRequest):
    """Fails where such a file asks for more kinds of loops, whether they were compiled before or not."""
    if not (is_around_loops(request.path) and FUSED == "numba"):
        yield
        return
    from fusedcalib.executors.numba import run

    asked, compiled = set(), run.kernel_for

    def kernel_for(*kind):
        if kind[0] is not None:  # the sum of squares, which has no recipe, compiles in a moment
            asked.add(kind)
        return compiled(*kind)

    kernel_for.cache_info = compiled.cache_info
    run.kernel_for = kernel_for
    yield
    run.kernel_for = compiled
    assert len(asked) <= MOST_KINDS, f"{request.path.name} compiles {len(asked)} kinds of loops"


@pytest.fixture
def rule(request: pytest.FixtureRequest) -> Rule:
    return RULES[request.param]


@pytest.fixture
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
