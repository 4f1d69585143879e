"""PyTorch's own optimizer inputs, from its test suite: same results, same errors.

They are read in another process, because the module that holds them changes the session it is
imported into: warning filters, the environment, Hypothesis's profile and torch's backend flags.
"""

import copy
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from cases import BACKENDS, BY_LOOPS, DEVICE, Twin, parameters
from rule_cases import IN_TORCH, RULES

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("what runs here runs in the plain run too", allow_module_level=True)

# Two modules that load half of torch hold decorators alone; were one in what is read, pickle would fail.
READ = """
import pickle, sys, torch
from unittest import mock
for name in ("common_device_type", "common_methods_invocations"):
    sys.modules[f"torch.testing._internal.{name}"] = mock.MagicMock()
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db
found = {}
for info in optim_db:
    name = info.optim_cls.__name__
    if name in sys.argv[2:]:
        inputs = [(i.desc, i.kwargs) for i in info.optim_inputs_func(device="cuda")]
        errors = [
            (i.optimizer_error_input.desc, i.optimizer_error_input.params,
             i.optimizer_error_input.kwargs, i.error_on is OptimizerErrorEnum.STEP_ERROR,
             i.error_type, i.error_regex)
            for device in sorted({"cpu", sys.argv[1]})
            for i in info.optim_error_inputs_func(device=device, dtype=torch.float32)
        ]
        found[name] = inputs, errors
pickle.dump(found, sys.stdout.buffer)
"""
FOUND = pickle.loads(
    subprocess.run([sys.executable, "-c", READ, DEVICE, *IN_TORCH], check=True, stdout=subprocess.PIPE).stdout
)

INPUTS = [
    pytest.param(RULES[name], kwargs, id=f"{name}-{i}-{desc}")
    for name, (inputs, _) in FOUND.items()
    for i, (desc, kwargs) in enumerate(inputs)
    if not kwargs.get("capturable")
]
CAPTURABLE = [
    pytest.param(RULES[name], kwargs, id=f"{name}-{i}-{desc}")
    for name, (inputs, _) in FOUND.items()
    for i, (desc, kwargs) in enumerate(inputs)
    if kwargs.get("capturable")
]
# That differentiable=True is not supported is said before what it cannot be combined with.
ERRORS = [
    pytest.param(RULES[name], *error, id=f"{name}-{i}-{error[0]}")
    for name, (_, errors) in FOUND.items()
    for i, error in enumerate(errors)
    if not error[2].get("differentiable")
]


def test_every_class_of_torch_has_inputs():
    assert sorted(FOUND) == sorted(IN_TORCH)
    assert all(len(inputs) > 3 and errors for inputs, errors in FOUND.values())


# In float32 numba is what the contract tests run; complex numbers cost no compilation more.
DTYPES = [(b, d) for b in BACKENDS for d in (torch.float64, torch.float32, torch.complex128)]
DTYPES = [(b, d) for b, d in DTYPES if (b, d) != ("numba", torch.float32)]


@pytest.mark.parametrize(("backend", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize(("rule", "kwargs"), INPUTS)
def test_inputs(rule, backend, kwargs, dtype):
    """Five steps on several tensors, some without a gradient at times."""
    if backend == "numba" and rule.name not in BY_LOOPS:
        pytest.skip("these loops are compiled in tests/test_kernels.py")
    built = Twin(rule, backend, parameters(dtype=dtype), **kwargs)
    built.step().step(2, missing=(1, 4)).step(2)
    built.check()


@pytest.mark.parametrize(("rule", "kwargs"), CAPTURABLE)
def test_capturable_inputs(rule, backend, kwargs):
    """On a GPU as all others; elsewhere torch's classes take them and fail in the step, and so do ours."""
    built = Twin(rule, backend, parameters(), **kwargs)
    if backend == "triton":
        built.step().step(2, missing=(1, 4)).step(2)
        built.check()
    else:
        built.gradients()
        with pytest.raises(RuntimeError, match="capturable=True needs all parameters on one GPU"):
            built.ours.step()


@pytest.mark.parametrize(("rule", "desc", "params", "kwargs", "on_step", "kind", "text"), ERRORS)
def test_error_inputs(rule, backend, desc, params, kwargs, on_step, kind, text):
    """The same exception and the same words as torch's class of that name."""
    params = [torch.nn.Parameter(torch.randn(2, 3))] if params is None else params

    def error_of(build):
        def run():
            optimizer = build(copy.deepcopy(params), **kwargs)
            if on_step:
                optimizer.step()

        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            with pytest.raises(kind, match=text) as caught:
                run()
        return str(caught.value)

    mine = error_of(lambda p, **options: rule.ours(p, backend=backend, **options))
    assert mine == error_of(rule.theirs)
