"""The drop-in contract: what is saved, by whom it can be loaded, and what loading keeps."""

import copy
import io
import pickle

import pytest
import torch
from cases import Twin, assert_identical, parameters, snapshot, state_of, train, twins
from rule_cases import RULES

import fusedcalib


def saved_and_loaded(value):
    """Through a file, as `torch.load` reads it by default: plain types only."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("options", [{}, {"maximize": True}], ids=str)
def test_c12_state_keys_are_torchs(twin, options):
    built = twin(**options).step()
    mine, theirs = built.ours.state_dict(), built.theirs.state_dict()
    assert list(mine["state"]) == list(theirs["state"])
    for i, state in theirs["state"].items():
        assert list(mine["state"][i]) == list(state)
        for key, value in state.items():
            assert mine["state"][i][key].dtype == value.dtype
            assert mine["state"][i][key].stride() == value.stride()


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_c12_amsgrad_state(name, backend):
    built = Twin(RULES[name], backend, parameters(), amsgrad=True).step(3)
    built.check()
    assert list(state_of(built.ours, built.params[0])) == [
        "step",
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
    ]


@pytest.mark.parametrize("named", [False, True], ids=["plain", "named"])
def test_c12_torch_to_here_and_back(rule, backend, twin, named):
    """Two steps there, two here, two there: as six in torch.optim."""

    def arrange(params):
        return [(f"w{i}", p) for i, p in enumerate(params)] if named else params

    built = twin(arrange=arrange)
    stations = [rule.theirs, lambda p, **o: rule.ours(p, backend=backend, **o), rule.theirs]
    checkpoint = None
    for station in stations:
        built.ours = station(arrange(built.params), **rule.options)
        if checkpoint:
            built.ours.load_state_dict(saved_and_loaded(checkpoint))
        built.step(2).check()
        checkpoint = built.ours.state_dict()


def test_c12_resuming_here_is_exact(twin, ours):
    """A checkpoint taken in mid-training goes on to the very same bits."""
    built = twin().step(2)
    resumed = twins(built.params)
    optimizer = ours(resumed)
    optimizer.load_state_dict(saved_and_loaded(built.ours.state_dict()))
    for _ in range(2):
        built.step()
        for p, q in zip(resumed, built.params, strict=True):
            p.grad = q.grad.clone()
        optimizer.step()
    assert_identical(snapshot(optimizer), snapshot(built.ours))


def plain(value, where="saved"):
    """Nothing but what weights_only loading and DCP's flattening take."""
    if isinstance(value, dict):
        assert all(type(k) is str for k in value), where
        for key, entry in value.items():
            plain(entry, f"{where}[{key!r}]")
    elif isinstance(value, tuple):
        for entry in value:
            plain(entry, where)
    else:
        assert type(value) in (torch.Tensor, int, float, bool, str), f"{where}: {type(value)}"


@pytest.mark.parametrize("own", [{}, {"centralize": "update", "max_row_norm": 2.0}], ids=str)
def test_c16_plain_types(rule, own):
    params = parameters()
    optimizer = rule.ours(params, **own, backend="eager", **rule.options)
    train(optimizer)
    saved = optimizer.state_dict()
    theirs = rule.theirs(parameters()).state_dict()["param_groups"][0]
    theirs = {k: v for k, v in theirs.items() if k not in rule.own}
    for i, state in saved["state"].items():
        plain(state, f"state[{i}]")
    (group,) = saved["param_groups"]
    plain({k: v for k, v in group.items() if k not in theirs})
    assert group.keys() - theirs.keys() == rule.own.keys()
    assert_identical(saved_and_loaded(saved)["state"], saved["state"])


@pytest.mark.parametrize("by", ["load_state_dict", "__setstate__"])
def test_c18_checkpoints_without_our_group_keys(rule, by):
    """The keys that torch.optim knows nothing of keep what the constructor was told."""
    params = parameters()
    told = {"centralize": "update", "centralize_min_ndim": 4, "l1": 0.25, "max_row_norm": 2.0}
    told |= dict.fromkeys(rule.ours.rule.extras, True)
    optimizer = rule.ours(params, **told, backend="eager", **rule.options)
    theirs = rule.theirs(params, **rule.options)
    for key in rule.own:
        theirs.param_groups[0].pop(key, None)
    if by == "load_state_dict":
        optimizer.load_state_dict(theirs.state_dict())
    else:
        optimizer.__setstate__({"state": theirs.state, "param_groups": theirs.param_groups})
    assert {k: optimizer.param_groups[0][k] for k in told} == told
    train(optimizer)


def test_c18_old_pickles(rule):
    """An optimizer pickled before a key existed gets the key's default."""
    params = parameters()
    optimizer = rule.ours(params, backend="eager", **rule.options)
    state = copy.copy(optimizer.__getstate__())
    for place in ("defaults", "_extras"):
        state[place] = {k: v for k, v in state[place].items() if k not in rule.own}
    state["param_groups"] = [
        {k: v for k, v in group.items() if k not in rule.own} for group in state["param_groups"]
    ]
    revived = rule.ours.__new__(rule.ours)
    revived.__setstate__(state)
    revived.add_param_group({"params": parameters(((2, 3),))})
    for group in revived.param_groups:
        assert {k: group[k] for k in rule.own} == rule.own
    train(revived)
    assert revived.backend in repr(revived)


def test_c18_counters_of_old_checkpoints(rule, twin):
    """torch once stored plain numbers."""
    built = twin().step(2)

    def age(optimizer, params):
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            for key in ("step", "mu_product"):
                if key in state:
                    state[key] = state[key].item()
        optimizer.load_state_dict(saved)

    built.both(age)
    built.step().check()
    if rule.counted:
        assert state_of(built.ours, built.params[0])["step"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_c21_moments_stay_float32_under_narrow_parameters(rule, dtype):
    """torch's own rule casts them to the parameter's dtype; precision would be lost in silence."""
    wide = parameters()
    source = rule.theirs(wide, **rule.options)
    train(source)
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in wide]
    optimizer = rule.ours(params, backend="eager", **rule.options)
    optimizer.load_state_dict(saved_and_loaded(source.state_dict()))
    saved = list(source.state_dict()["state"].values())
    loaded = [state_of(optimizer, p) for p in params]
    # torch's loading brings the product, a number of the host, to the parameter's device.
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0, check_device=False)
    train(optimizer)
    assert {optimizer.state[p][k].dtype for p in params for k in rule.moments} == {torch.float32}


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("steps", [0, 2])
def test_c22_copies_go_on_alike(twin, copied, steps):
    """As an EMA wrapper or a process boundary makes them: the copy is whole, and apart."""
    built = twin().step(steps)
    twin_params, twin_optimizer = COPIES[copied]((built.params, built.ours))
    assert [id(p) for p in twin_optimizer.param_groups[0]["params"]] == [id(p) for p in twin_params]
    assert twin_optimizer.backend == built.ours.backend
    before = snapshot(twin_optimizer)
    built.step(2)
    assert_identical(snapshot(twin_optimizer), before)


@pytest.mark.parametrize("copied", COPIES)
def test_c22_copies_can_train(twin, copied):
    built = twin().step(2)
    built.params, built.ours = COPIES[copied]((built.params, built.ours))
    built.step(2).check()


def test_c22_a_scheduled_optimizer_is_copied(twin):
    """A scheduler puts a wrapper with a weak reference in the instance's `step`."""
    built = twin()
    torch.optim.lr_scheduler.StepLR(built.ours, 1)
    built.step()
    built.params, built.ours = copy.deepcopy((built.params, built.ours))
    built.step(2).check()


def test_load_refuses_other_groups(rule, ours):
    """The errors of torch's own class, and nothing loaded."""
    optimizer = ours(parameters())
    other = rule.theirs(parameters(((2, 2),))).state_dict()
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(other)
    assert optimizer.state_dict()["param_groups"] == groups


def test_c18_a_groups_own_options_survive_a_torch_checkpoint():
    """A file without our keys leaves each group's as they were, not as the optimizer's defaults are."""
    params = parameters(((3, 4), (5, 6)))
    ours = fusedcalib.AdamW([{"params": params[:1], "centralize": True}, {"params": params[1:]}])
    groups = [{"params": twins(params[:1])}, {"params": twins(params[1:])}]
    ours.load_state_dict(torch.optim.AdamW(groups).state_dict())
    assert [group["centralize"] for group in ours.param_groups] == [True, False]


def test_c04_an_unknown_option_may_be_any_tensor():
    params = parameters(((3, 4),))
    optimizer = fusedcalib.AdamW([{"params": params, "mask": torch.ones(7)}])
    train(optimizer)
    assert optimizer.param_groups[0]["mask"].numel() == 7
