"""The drop-in contract: tensors and state that change between two steps are what the next step uses.

Every change is done to the run here and to torch.optim's; both must go on alike.
"""

import pytest
import torch
from cases import SHAPES, assert_near, parameters, tolerance
from rule_cases import COUNTED, FEW, RULES, each_few


def set_step(value):
    return lambda optimizer, params: optimizer.state[params[1]].update(step=torch.tensor(value))


def on_moment(change):
    """Replace the first stored moment of the first parameter by what `change` makes of it."""

    def edit(optimizer, params):
        state = optimizer.state[params[0]]
        key = next(k for k in state if state[k].dim())
        state[key] = change(state[key])

    return edit


def in_other_memory(tensor):
    tensor.data = tensor.data / 2
    return tensor


COUNTED_FEW = [name for name in FEW if name in COUNTED]
# State is the user's to edit: what stands in `optimizer.state` is what the next step goes on from.
STATE_EDITS = {
    "counter replaced": (set_step(40.0), COUNTED_FEW),
    "counter filled": (lambda o, params: o.state[params[1]]["step"].fill_(7), COUNTED_FEW),
    "product replaced": (
        lambda o, params: o.state[params[1]].update(mu_product=torch.tensor(0.2)),
        ["NAdam"],
    ),
    "product filled": (lambda o, params: o.state[params[1]]["mu_product"].fill_(0.3), ["NAdam"]),
    "moment replaced": (on_moment(lambda m: torch.full_like(m, 0.25)), FEW),
    "moment transposed": (on_moment(lambda m: m.t().contiguous().t()), FEW),
    "moment edited": (on_moment(lambda m: m.mul_(0.5)), FEW),
    "one entry popped": (lambda o, params: o.state.pop(params[0]), FEW),
    "state cleared": (lambda o, params: o.state.clear(), FEW),
    "parameter edited": (lambda o, params: params[0].mul_(0.5), FEW),
    "moment's memory replaced": (on_moment(lambda m: in_other_memory(m)), FEW),
    "own checkpoint": (lambda o, params: o.load_state_dict(o.state_dict()), RULES),
}


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        pytest.param(RULES[name], change, id=f"{name}-{label}")
        for label, (change, names) in STATE_EDITS.items()
        for name in names
    ],
)
def test_state_edits_are_honoured(rule, change, twin):
    built = twin().step(3)
    built.both(change)
    built.step(2).check()


def add_group(optimizer, params):
    torch.manual_seed(0)
    params += parameters(((6, 2), (0,)))
    optimizer.add_param_group({"params": params[-2:], "lr": 0.3})


def append(optimizer, params):
    torch.manual_seed(0)
    params += parameters(((6, 2),))
    optimizer.param_groups[0]["params"].append(params[-1])


def drop(optimizer, params):
    optimizer.state.pop(optimizer.param_groups[0]["params"].pop(0), None)
    params.pop(0)


def empty_group(optimizer, params):
    optimizer.add_param_group({"params": []})


def new_data(make):
    """Give the first parameter other memory: same values, or a changed size (state starts anew)."""

    def swap(optimizer, params):
        params[0].data = make(params[0].data)
        state = optimizer.state.get(params[0], {})
        if any(m.shape != params[0].shape for m in state.values() if m.dim()):
            optimizer.state.pop(params[0])

    return swap


# Contract C15: no list, address, stride or size is remembered wrongly.
SWAPS = {
    "new data": new_data(torch.clone),
    "other strides": new_data(lambda d: d.t().contiguous().t()),
    "an offset view": new_data(lambda d: torch.cat([d, d])[len(d) :]),
    "every second column": new_data(lambda d: d.repeat_interleave(2, 1)[:, ::2]),
    "transposed in place": new_data(torch.t),
    "smaller": new_data(lambda d: d[1:].clone()),
    "smaller in place": new_data(lambda d: d[:4, :3]),
    "fewer rows in place": new_data(lambda d: d[:4]),
    "larger": new_data(lambda d: torch.cat([d, d])),
    "empty": new_data(lambda d: d[:0].clone()),
    "group added": add_group,
    "parameter appended": append,
    "parameter dropped": drop,
    "empty group": empty_group,
}


RUNS = [(RULES[name], {}) for name in FEW] + [(RULES["SGD"], {"momentum": 0})]


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
@pytest.mark.parametrize(("rule", "options"), RUNS, ids=[*FEW, "SGD without state"])
def test_c15_tensors_change_between_steps(rule, options, twin, swap):
    built = twin(parameters(((6, 6), *SHAPES[1:])), **options).step(2)
    old, expected = built.params[0].data, built.expected[0].data
    built.both(swap)
    built.step(2).check()
    assert_near(old, expected, tolerance(old.dtype, built.steps), "the memory it had before")


def test_c15_empty_groups_from_the_start(twin):
    twin(
        arrange=lambda params: [{"params": []}, {"params": params}, {"params": []}],
    ).step(2).check()


@each_few
def test_c15_gradient_of_other_strides_at_the_same_address(twin):
    built = twin(parameters(((6, 6),)))
    built.gradients()
    for _ in range(3):
        built.ours.step()
        built.theirs.step()
        built.steps += 1
        for p in built.params + built.expected:
            p.grad = p.grad.t()
    built.check()


def test_c15_gradient_in_other_memory(twin):
    """`p.grad` is the same object, what it holds is not where it was."""
    built = twin().step()
    for p, q in zip(built.params, built.expected, strict=True):
        p.grad.data = torch.randn_like(p)
        q.grad.data = p.grad.data.clone()
    built.ours.step()
    built.theirs.step()
    built.steps += 1
    built.check()
