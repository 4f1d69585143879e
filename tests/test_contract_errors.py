"""The drop-in contract: a step that raises has written nothing, and says what to do instead."""

import pytest
import torch
from cases import assert_identical, parameters, snapshot, train
from rule_cases import COUNTED, RULES, each, each_few


def sparse(optimizer, params):
    params[-1].grad = params[-1].grad.to_sparse()


def expanded(optimizer, params):
    """Every element of the last parameter lies in the same memory."""
    p = params[-1]
    optimizer.state.pop(p, None)
    p.data = torch.ones((), device=p.device).expand(p.shape)
    p.grad = torch.ones_like(p)


def complex_centred(optimizer, params):
    p = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.complex64, device=params[0].device))
    p.grad = torch.ones_like(p)
    optimizer.add_param_group({"params": [p], "centralize": True})


def integers(optimizer, params):
    p = torch.nn.Parameter(torch.arange(3, device=params[0].device), requires_grad=False)
    p.grad = torch.ones_like(p)
    optimizer.add_param_group({"params": [p]})


def twice(optimizer, params):
    """torch warns of it when a group is added, then steps it twice; in parallel that is a race."""
    optimizer.param_groups[-1]["params"].append(params[0])


def group_option(**values):
    """A last group of its own, with options that only the step can find fault with."""

    def spoil(optimizer, params):
        (p,) = parameters(((4, 3),))
        p.grad = torch.ones_like(p)
        optimizer.add_param_group({"params": [p]})
        optimizer.param_groups[-1].update(values)

    return spoil


def stored(change):
    """State as a checkpoint of something else would leave it: the last parameter's first moment."""

    def spoil(optimizer, params):
        rule, p = RULES[type(optimizer).__name__], params[-1]
        optimizer.state[p] = state = rule.new_state(p)
        state[rule.moments[0]] = change(state[rule.moments[0]])

    return spoil


MOMENT = rf"({'|'.join(sorted({rule.moments[0] for rule in RULES.values()}))})"
INSTEAD = r"(torch\.optim|set it to False)"
# What is wrong with the last parameter or group -> what the message must name.
FAULTS = {
    "sparse gradient": (sparse, r"(?is)sparse.*(SparseAdam|torch\.optim\.SGD)"),
    "self-overlapping parameter": (expanded, r"(?is)(overlap|expand).*(clone|contiguous)"),
    "complex and centralized": (complex_centred, r"(?is)complex.*centralize|centralize.*complex"),
    "integers": (integers, r"int64"),
    "listed twice": (twice, r"(?i)twice"),
    "unknown centralize": (group_option(centralize="rows"), r"(?s)centralize.*rows"),
    "differentiable": (group_option(differentiable=True), rf"differentiable.*{INSTEAD}"),
    "capturable": (group_option(capturable=True), r"capturable.*GPU.*set capturable=False"),
    "state of another size": (stored(lambda m: m[1:].clone()), MOMENT),
    "state elsewhere": (stored(lambda m: m.to("meta")), MOMENT),
    "state of integers": (stored(lambda m: m.long()), MOMENT),
}


@each_few
@pytest.mark.parametrize("started", [False, True], ids=["first step", "later"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_raises_wrote_nothing(ours, backend, fault, started):
    if fault == "capturable" and backend == "triton":
        pytest.skip("it can be captured")
    params = parameters()
    optimizer = ours(params)
    for p in params:
        p.grad = torch.randn_like(p)
    if started:
        optimizer.step()
    spoil, message = FAULTS[fault]
    with torch.no_grad():
        spoil(optimizer, params)
    before = snapshot(optimizer)
    with pytest.raises(Exception, match=message):
        optimizer.step()
    assert_identical(snapshot(optimizer), before)


def test_a_good_step_after_a_failed_one(rule, twin):
    """What was refused is not remembered: mend it, and training goes on as if nothing had been."""
    built = twin().step(2)
    built.gradients()
    good = built.params[-1].grad
    sparse(built.ours, built.params)
    with pytest.raises(RuntimeError, match="sparse"):
        built.ours.step()
    built.params[-1].grad = good
    built.ours.step()
    built.theirs.step()
    built.steps += 1
    built.check()


@each(name for name in RULES if RULES[name].takes("betas") and name in COUNTED)
def test_a_step_that_fails_at_its_scalars_leaves_no_state(rule):
    """A beta of 1 divides by zero; torch checks the constructor's only, so it is met in the step."""
    params = parameters()
    optimizer = rule.ours(params, backend="eager", **rule.options)
    group = optimizer.param_groups[0]
    group["betas"] = (1.0,) * len(group["betas"])
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises((ZeroDivisionError, ValueError)):
        optimizer.step()
    assert not optimizer.state
    group["betas"] = rule.options["betas"]
    optimizer.step()
    before = snapshot(optimizer)
    group["betas"] = (1.0,) * len(group["betas"])
    with pytest.raises((ZeroDivisionError, ValueError)):
        optimizer.step()
    assert_identical(snapshot(optimizer), before)


@each(COUNTED)
def test_state_of_another_optimizer_is_not_gone_on_from(rule):
    """What was stepped without a state that this rule keeps has no value for it: KeyError, as torch's."""
    for lacking in ("mu_product", *rule.moments):
        params = parameters()
        optimizer = rule.ours(params, backend="eager", **rule.options)
        train(optimizer)
        if lacking not in optimizer.state[params[0]]:
            continue
        del optimizer.state[params[0]][lacking]
        before = snapshot(optimizer)
        with pytest.raises(KeyError, match=lacking):
            optimizer.step()
        assert_identical(snapshot(optimizer), before)
