"""Stacks of matrices: a row of a parameter [matrices, out, in] is one of each matrix (`matrix_dims`)."""

import math
import warnings

import pytest
import torch
from cases import assert_identical, snapshot
from kernel_cases import BACKENDS, TRITON, device_of
from rule_cases import FEW, RULES, each
from storage_runs import BYTES

import fusedcalib
from fusedcalib import GradientNoise
from fusedcalib.layout.row_scales import RowFactors, set_row_factors
from fusedcalib.layout.stacks import matrix_shape
from fusedcalib.reference import ORACLES

LAST = (-2, -1)
ALL = {"centralize": "update", "max_row_norm": 8.0, "ema_decay": 0.5}
SMALL_BYTES = {**BYTES, "min_8bit_size": 0}
# More columns than a block of 64 and no multiple of it, so that rows and blocks are others than of one row.
SHAPE = (3, 5, 70)


def step(optimizer, params, gradients):
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.to(p.device, p.dtype, copy=True)
    optimizer.step()


def stack_and_matrices(rule, backend, shape=SHAPE, **options):
    """The same matrices as one parameter and as one each, after three steps."""
    start = torch.randn(shape).to(device_of(backend))
    stack = [torch.nn.Parameter(start.clone())]
    matrices = [torch.nn.Parameter(matrix.clone()) for matrix in start.flatten(0, -3)]
    ours = rule.ours(stack, backend=backend, matrix_dims=LAST, **rule.options, **options)
    theirs = rule.ours(matrices, backend=backend, **rule.options, **options)
    for _ in range(3):
        gradient = torch.randn(shape)
        step(ours, stack, [gradient])
        step(theirs, matrices, gradient.flatten(0, -3))
    return ours, theirs


def assert_same_bits(ours, theirs):
    """Of parameters and all states, the scales of those in bytes too."""
    ((stack, kept),) = ours.state.items()
    for number, (matrix, entry) in enumerate(theirs.state.items()):
        assert torch.equal(stack.flatten(0, -3)[number], matrix)
        assert kept.keys() == entry.keys()
        for name, value in entry.items():
            part = kept[name].flatten(0, -3)[number] if value.ndim else kept[name]
            assert torch.equal(part, value), name


@each(FEW)
@pytest.mark.parametrize("options", [ALL, {"centralize": True}], ids=["all", "gradient"])
def test_a_stack_is_its_matrices(rule, options):
    """To the last bit, where no noise is drawn for an element's place."""
    assert_same_bits(*stack_and_matrices(rule, "eager", **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [SHAPE, (2, 2, 3, 70)], ids=str)
def test_a_stack_in_bytes_is_its_matrices(backend, shape):
    ours, theirs = stack_and_matrices(RULES["AdamW"], backend, shape, **SMALL_BYTES, **ALL)
    assert_same_bits(ours, theirs)
    (entry,) = ours.state.values()
    assert entry["exp_avg_scales"].shape == (*shape[:-1], 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_that_of_the_reference(backend):
    """In fp64. Sums of 70 elements in another order: a few thousand roundings of 1e-16."""
    rule = RULES["AdamW"]
    options = {**rule.options, "centralize": "update", "max_row_norm": 8.0, "matrix_dims": LAST}
    p = torch.nn.Parameter(torch.randn(SHAPE, dtype=torch.float64, device=device_of(backend)))
    optimizer = rule.ours([p], backend=backend, **options)
    expected, state = p.detach().clone(), {}
    for _ in range(3):
        gradient = torch.randn(SHAPE, dtype=torch.float64, device=p.device)
        step(optimizer, [p], [gradient])
        expected, state = ORACLES["AdamW"](expected, gradient, state, **options)
    assert (p - expected).abs().max() < 1e-12
    assert torch.linalg.vector_norm(p, dim=-1).max() <= 8 + 1e-12
    other, _ = ORACLES["AdamW"](p.detach(), gradient, {}, **{**options, "matrix_dims": None})
    ours, _ = ORACLES["AdamW"](p.detach(), gradient, {}, **options)
    assert (other - ours).abs().max() > 1e-3, "the option makes no difference here"


@pytest.mark.parametrize("backend", ["eager", TRITON])
def test_noise_is_of_an_elements_place(backend):
    """In the stack, whatever its rows are: with rows of one element each nothing else differs."""
    found = []
    for dims in (None, LAST):
        p = torch.nn.Parameter(torch.zeros(2, 3, 8, device=device_of(backend)))
        optimizer = fusedcalib.SGD(
            [p], lr=1.0, noise=GradientNoise(1.0), max_row_norm=1e9, matrix_dims=dims, backend=backend
        )
        step(optimizer, [p], [torch.zeros(2, 3, 8)])
        found.append(p.detach())
    assert torch.equal(*found)
    assert found[0].unique().numel() == 48


def test_a_matrix_of_a_stack_has_two_dimensions():
    """For `centralize_min_ndim` too; vectors have no rows, and matrices those that they had."""
    w = torch.randn(2, 3, 4)
    for least, shape, dims, moved in (
        (2, (2, 3, 4), LAST, w - w.mean(-1, keepdim=True)),
        (2, (2, 3, 4), (1, 2), w - w.mean(-1, keepdim=True)),
        (3, (2, 3, 4), LAST, w),
        (3, (2, 3, 4), None, w - w.mean((1, 2), keepdim=True)),
        (2, (6, 4), LAST, (w - w.mean(-1, keepdim=True)).view(6, 4)),
        (2, (24,), LAST, w.view(24)),
    ):
        p, beside = torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.zeros(2, 2))
        options = {"centralize": True, "centralize_min_ndim": least, "matrix_dims": dims}
        optimizer = fusedcalib.SGD([p, beside], lr=1.0, backend="eager", **options)
        step(optimizer, [p, beside], [w.view(shape), torch.zeros(2, 2)])
        torch.testing.assert_close(-p.detach(), moved)


def test_groups_with_and_without_share_a_launch():
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 2, 8), (8, 8))]
    groups = [{"params": params[:1], "matrix_dims": LAST, "max_row_norm": 0.5}, {"params": params[1:]}]
    optimizer = fusedcalib.SGD(groups, lr=0.1, centralize=True, backend="eager")
    step(optimizer, params, [torch.randn_like(p) for p in params])
    (bucket,) = optimizer._engine.plan.buckets
    assert [tuple(slot.tensors()[0].shape) for slot in bucket.slots] == [(8, 8), (8, 8)]


def test_rows_are_laid_out_only_where_they_matter():
    p = torch.nn.Parameter(torch.randn(2, 3, 8))
    optimizer = fusedcalib.SGD([p], lr=0.1, matrix_dims=LAST, backend="eager")
    step(optimizer, [p], [torch.randn(2, 3, 8)])
    (bucket,) = optimizer._engine.plan.buckets
    assert bucket.slots[0].leading == 1


def test_a_change_of_rows_holds_from_the_next_step_on():
    p = torch.nn.Parameter(torch.zeros(2, 3, 4))
    optimizer = fusedcalib.SGD([p], lr=1.0, centralize=True, backend="eager")
    gradient = torch.randn(2, 3, 4)
    step(optimizer, [p], [gradient])
    assert p.mean((1, 2)).abs().max() < 1e-6 < p.mean(-1).abs().max()
    before = p.detach().clone()
    optimizer.param_groups[0]["matrix_dims"] = list(LAST)  # as a configuration file has it
    step(optimizer, [p], [gradient])
    assert (p - before).mean(-1).abs().max() < 1e-6


def test_what_a_parameter_is_in_its_group():
    shapes = {(8, 6, 4): (8, 6, 4), (2, 8, 6, 4): (16, 6, 4), (6, 4): (1, 6, 4), (6,): (1, 6, 1)}
    for shape, found in shapes.items():
        assert matrix_shape(torch.zeros(shape), {"matrix_dims": LAST}) == found
    assert matrix_shape(torch.zeros(8, 6, 4), {"matrix_dims": ()}) == (1, 8, 24)


# -- states in bytes, of other rows -----------------------------------------------------------------


def trained(shape, **options):
    p = torch.nn.Parameter(torch.randn(shape))
    optimizer = fusedcalib.AdamW([p], backend="eager", **SMALL_BYTES, **options)
    step(optimizer, [p], [torch.randn(shape)])
    return optimizer, p


def values(optimizer):
    (entry,) = optimizer.expanded_state_dict()["state"].values()
    return {name: value.clone() for name, value in entry.items() if value.ndim}


@pytest.mark.parametrize("how", ["changed", "loaded"])
@pytest.mark.parametrize(("before", "after"), [(None, LAST), (LAST, None)])
@pytest.mark.parametrize("columns", [128, 70])
def test_states_in_bytes_take_over_other_rows(how, before, after, columns):
    """To the last bit where rows are whole blocks; else as if what they stood for were kept anew."""
    shape = (3, 5, columns)
    optimizer, p = trained(shape, matrix_dims=before)
    expected = values(optimizer)
    saved = optimizer.state_dict()
    if how == "loaded":
        optimizer = fusedcalib.AdamW([p], backend="eager", **SMALL_BYTES, matrix_dims=after)
        optimizer.load_state_dict(saved)
    optimizer.param_groups[0].update(matrix_dims=after or (), lr=0.0, betas=(1 - 1e-9, 1 - 1e-9))
    step(optimizer, [p], [torch.zeros(shape)])
    (entry,) = optimizer.state.values()
    found = values(optimizer)
    rows, length = (shape[:2], columns) if after else (shape[:1], 5 * columns)
    assert entry["exp_avg_scales"].shape == (*rows, math.ceil(length / 64))
    for name, value in expected.items():
        error = (found[name] - value).abs().amax() / value.abs().amax()
        assert error == 0 if columns == 128 else 0 < error < 2**-4, name


# -- what is refused, and what is said ---------------------------------------------------------------


# Parameter, gradient, which dimensions are the matrix, and what is said.
HERE, ACROSS, FOUR = torch.ones(2, 3, 4), torch.ones(2, 4, 3).transpose(-1, -2), torch.ones(2, 3, 4, 5)
REFUSED = {
    "parameter": (ACROSS, HERE, LAST, RuntimeError, "its parameter .* strides .*contiguous"),
    "gradient": (HERE, ACROSS, LAST, RuntimeError, "its gradient .* strides .*contiguous"),
    "four dimensions": (FOUR, FOUR, (1, 2), ValueError, "4 dimensions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_are_not_to_be_had(case):
    """Nothing is changed; without `matrix_dims` such parameters are stepped."""
    p, gradient, dims, error, said = REFUSED[case]
    first, p = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(p.clone())
    optimizer = fusedcalib.AdamW([first, p], centralize=True, matrix_dims=dims, backend="eager")
    first.grad, p.grad = torch.ones(3, 4), gradient
    before = snapshot(optimizer)
    with pytest.raises(error, match=f"AdamW: parameter 1 of group 0.*{said}.*matrix_dims=None"):
        optimizer.step()
    assert_identical(snapshot(optimizer), before)
    assert not optimizer.state
    optimizer.param_groups[0]["matrix_dims"] = ()
    optimizer.step()


def test_factors_of_rows_of_dimension_0_are_refused():
    """Of the layers of SVGD, a convolution of one dimension say."""
    p = torch.nn.Parameter(torch.ones(2, 3, 4))
    optimizer = fusedcalib.SGD([p], lr=1.0, matrix_dims=LAST, centralize=True, backend="eager")
    factors = RowFactors(torch.full((2,), 3.0), optimizer)
    set_row_factors(p, factors)
    p.grad = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"SGD: parameter 0 of group 0: .*in a group with matrix_dims=None"):
        optimizer.step()
    optimizer.param_groups[0].update(matrix_dims=LAST, centralize=False)
    optimizer.step()
    assert torch.equal(p, torch.full((2, 3, 4), -2.0))


def test_padded_rows_are_stepped():
    """A stack of which memory between rows belongs to something else."""
    p = torch.nn.Parameter(torch.zeros(2, 3, 6)[..., :4])
    gradient = torch.randn(2, 3, 4)
    step(fusedcalib.SGD([p], lr=1.0, centralize=True, matrix_dims=LAST, backend="eager"), [p], [gradient])
    torch.testing.assert_close(-p.detach(), gradient - gradient.mean(-1, keepdim=True))


def said_of(shapes, steps=1, **options):
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = fusedcalib.SGD(params, lr=0.1, backend="eager", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            step(optimizer, params, map(torch.zeros_like, params))
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("option", ["centralize", "max_row_norm"])
def test_what_looks_like_a_stack_is_said_once(option):
    """Of the first one, whatever comes later."""
    (said,) = said_of([(4, 4), (8, 64, 32), (8, 32, 64)], steps=2, **{option: True})
    assert said.startswith(f"SGD: parameter 1 of group 0 is (8, 64, 32), and {option} takes all 64 x 32 el")
    assert "give its group matrix_dims=(-2, -1)" in said


@pytest.mark.parametrize(
    "shape",
    [(64, 32, 3), (768, 48, 128), (1, 197, 64), (32, 1, 4), (64, 32, 3, 3), (4, 32, 31), (64, 64)],
    ids=str,
)
def test_what_is_no_stack_is_not_warned_of(shape):
    """Convolutions of one to three dimensions, one of large kernels as wav2vec 2.0's, one of a kind."""
    assert said_of([shape], centralize=True, max_row_norm=1.0) == []


def test_nobody_is_warned_who_says_it_or_does_not_ask_for_rows():
    stack = [(8, 64, 32)]
    assert said_of(stack, centralize=True, matrix_dims=LAST) == []
    assert said_of(stack) == []
    assert said_of(stack, centralize=True, centralize_min_ndim=4) == []
