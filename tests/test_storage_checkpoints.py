"""States and weights in bytes: what is saved, by whom it can be loaded, and what loading keeps."""

import copy
import pickle

import pytest
import torch
from cases import assert_identical, snapshot, twins
from storage_runs import (
    BYTES,
    KEPT,
    KINDS,
    LEAST,
    SHAPES,
    adamw,
    state_value,
    step,
    through_a_file,
    weight_value,
    weights,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
each_kind = pytest.mark.parametrize("kind", KEPT)


def entries(optimizer):
    return [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize("dtype", DTYPES)
@each_kind
def test_a_file_goes_on_to_the_same_bits(kind, dtype):
    """torch.optim casts what it loads to the parameter's dtype: bytes and scales arrive as they were."""
    params = weights(DTYPES[dtype])
    whole = adamw(params, **KEPT[kind])
    step(whole, 1, 2)
    copies = twins(params)
    resumed = adamw(copies)  # the file says how states are kept
    resumed.load_state_dict(through_a_file(whole.state_dict()))
    assert_identical(snapshot(resumed), snapshot(whole))
    step(whole, 3, 4)
    step(resumed, 3, 4)
    assert_identical(snapshot(resumed), snapshot(whole))


U8, F32, BF16 = torch.uint8, torch.float32, torch.bfloat16
IN_BYTES = {
    **{f"{name}_codes": (U8, (20, 100)) for name in KINDS},
    **{f"{name}_scales": (F32, (20, 2)) for name in KINDS},
}
OF_16, OF_8 = {"param_remainder": (U8, (20, 100, 2))}, {"param_remainder": (U8, (20, 100))}
# Of a parameter of 20 x 100 in bf16; of one of 3 x 40 all are as those of torch.optim, of a dtype.
SAVED = {
    "8bit": (IN_BYTES, F32),
    "split16": ({**dict.fromkeys(KINDS, (F32, (20, 100))), **OF_16}, F32),
    "split8": ({**dict.fromkeys(KINDS, (BF16, (20, 100))), **OF_8}, BF16),
    "split8, 8bit": (IN_BYTES | OF_8, F32),
    "split8 at random, 8bit": (IN_BYTES | OF_8, F32),
    "float32, 8bit": (IN_BYTES | {"master_param": (F32, (20, 100))}, F32),
    "bfloat16_stochastic": (dict.fromkeys(KINDS, (BF16, (20, 100))), BF16),
}


@pytest.mark.parametrize("kind", SAVED)
def test_keys_dtypes_and_shapes_of_a_file(kind):
    optimizer = adamw(weights(), **KEPT[kind])
    step(optimizer, 1)
    large, _, small, *_ = optimizer.state_dict()["state"].values()
    wanted, dtype = SAVED[kind]
    assert {k: (t.dtype, tuple(t.shape)) for k, t in large.items() if k != "step"} == wanted
    assert {small[name].dtype for name in KINDS} == {dtype}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"]
)
@each_kind
def test_copies_go_on_to_the_same_bits(kind, copied):
    optimizer = adamw(weights(), **KEPT[kind])
    step(optimizer, 1, 2)
    twin = copied(optimizer)
    before = snapshot(twin)
    step(optimizer, 3)
    assert_identical(snapshot(twin), before)  # it is apart
    step(twin, 3)
    assert_identical(snapshot(twin), snapshot(optimizer))


def test_files_say_which_version_of_bytes_they_have():
    groups = [{"params": weights()}, {"params": weights(), **KEPT["split16"]}, {"params": weights(), **BYTES}]
    optimizer = adamw(groups)
    versions = [group.get("storage_version") for group in optimizer.state_dict()["param_groups"]]
    assert versions == [None, 1, 1]
    saved = through_a_file(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert not any("storage_version" in group for group in optimizer.param_groups)
    plain = adamw(weights(), state_dtype={"exp_avg": torch.bfloat16}).state_dict()
    assert "storage_version" not in plain["param_groups"][0]


def test_another_version_is_refused_before_anything_is_loaded():
    optimizer = adamw(weights(), **BYTES)
    step(optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(storage_version=2, lr=9.0)
    step(optimizer, 2)
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=r"AdamW: the checkpoint has storage_version=2, .* knows 1 only"):
        optimizer.load_state_dict(saved)
    assert_identical(snapshot(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups
    step(optimizer, 3)


def encoded(optimizer):
    """What the states of an optimizer are in bytes, by the reference, where parameters are not small."""
    found = []
    for p in optimizer.param_groups[0]["params"]:
        of_param = {}
        for name, (encode, _) in KINDS.items():
            if p.ndim >= 2 and p[0].numel() >= 32 and p.numel() >= LEAST["min_8bit_size"]:
                values = encode(state_value(optimizer.state[p], name))
                of_param |= zip((f"{name}_codes", f"{name}_scales"), values, strict=True)
            else:
                of_param[name] = state_value(optimizer.state[p], name)
        found.append(of_param)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_of_torch_are_encoded_before_the_next_step(dtype):
    """Without a rounding to the parameter's dtype on the way; weights begin at what parameters are."""
    wide = weights(torch.float32)
    source = torch.optim.AdamW(wide, lr=0.01, weight_decay=0.1)
    step(source, 1, 2)
    params = [torch.nn.Parameter(p.detach().to(DTYPES[dtype])) for p in wide]
    ours, expected = (adamw(twins(params), master_weights="split8", **BYTES) for _ in "ab")
    ours.load_state_dict(through_a_file(source.state_dict()))
    assert ours.param_groups[0]["state_dtype"] == "8bit"
    for p, entry in zip(expected.param_groups[0]["params"], encoded(source), strict=True):
        expected.state[p].update(entry, step=torch.tensor(2.0))
    step(ours, 3)
    step(expected, 3)
    assert_identical(snapshot(ours), snapshot(expected))
    assert sum("exp_avg_sq_codes" in entry for entry in entries(ours)) == 3


@pytest.mark.parametrize("told", ["by the group", "by a file without our keys"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_decoded_for_a_group_that_wants_none(dtype, told):
    source = adamw(weights(DTYPES[dtype]), **BYTES)
    step(source, 1, 2)
    saved = copy.deepcopy(source.state_dict())
    ours, expected = (adamw(twins(source.param_groups[0]["params"]), state_dtype="float32") for _ in "ab")
    if told == "by a file without our keys":
        for key in ("state_dtype", "master_weights", "min_8bit_size", "storage_version"):
            del saved["param_groups"][0][key]
    ours.load_state_dict(saved)
    ours.param_groups[0]["state_dtype"] = "float32"
    for p, q in zip(expected.param_groups[0]["params"], source.param_groups[0]["params"], strict=True):
        values = {name: state_value(source.state[q], name).clone() for name in KINDS}
        expected.state[p].update(values, step=torch.tensor(2.0))
    step(ours, 3)
    step(expected, 3)
    assert [{*entry} for entry in entries(ours)] == [{"step", *KINDS}] * len(SHAPES)
    assert_identical(snapshot(ours), snapshot(expected))
    ours.param_groups[0].update(BYTES)  # and back: what was decoded is encoded
    step(ours, 4)
    assert sum("exp_avg_sq_codes" in entry for entry in entries(ours)) == 3


@pytest.mark.parametrize("kind", ["split16", "split8", "float32, 8bit"])
@pytest.mark.parametrize("asked", ["none", "split16"])
def test_weights_of_a_wider_model_are_what_the_parameters_are(kind, asked):
    """What bf16 parameters had beside them says nothing of fp32 ones."""
    source = adamw(weights(), **KEPT[kind])
    step(source, 1)
    params = [torch.nn.Parameter(p.detach().float()) for p in source.param_groups[0]["params"]]
    ours = adamw(params)
    ours.load_state_dict(copy.deepcopy(source.state_dict()))
    ours.param_groups[0].update(master_weights=asked, lr=0.0)
    before = [p.detach().clone() for p in params]
    step(ours, 2)
    assert_identical([p.detach() for p in params], before)
    assert not any({"param_remainder", "master_param"} & entry.keys() for entry in entries(ours))


def test_fp16_parameters_take_a_copy_where_bf16_ones_had_a_remainder():
    source = adamw(weights(), master_weights="split16")
    step(source, 1)
    params = [torch.nn.Parameter(p.detach().half()) for p in source.param_groups[0]["params"]]
    ours = adamw(params)
    ours.load_state_dict(copy.deepcopy(source.state_dict()))
    ours.param_groups[0].update(master_weights="float32", lr=0.0)
    step(ours, 2)
    for p in params:
        assert_identical(weight_value(p, ours.state[p]), p.detach().float())
        assert "param_remainder" not in ours.state[p]


# What is done to the state of a parameter of 20 x 100, and what the next step says of it.
BROKEN = {
    "no codes": (lambda e: e.pop("exp_avg_codes"), KeyError, "lacks 'exp_avg_codes'"),
    "no scales": (lambda e: e.pop("exp_avg_sq_scales"), KeyError, "lacks 'exp_avg_sq_scales'"),
    "neither": (
        lambda e: [e.pop(f"exp_avg_{x}") for x in ("codes", "scales")],
        KeyError,
        "stepped without the state 'exp_avg'",
    ),
    "codes of another shape": (
        lambda e: e.update(exp_avg_codes=e["exp_avg_codes"][:, :99].clone()),
        RuntimeError,
        r"'exp_avg_codes' is \(20, 99\) of torch.uint8 .* must be \(20, 100\)",
    ),
    "transposed codes": (
        lambda e: e.update(exp_avg_codes=e["exp_avg_codes"].t().contiguous().t()),
        RuntimeError,
        "'exp_avg_codes' must be contiguous",
    ),
    "flat scales": (
        lambda e: e.update(exp_avg_scales=e["exp_avg_scales"].flatten()),
        RuntimeError,
        r"'exp_avg_scales' is \(40,\) of torch.float32 .* must be \(20, 2\)",
    ),
    "strided scales": (
        lambda e: e.update(exp_avg_scales=e["exp_avg_scales"].t().contiguous().t()),
        RuntimeError,
        "'exp_avg_scales' must be contiguous",
    ),
    "codes of another dtype": (
        lambda e: e.update(exp_avg_codes=e["exp_avg_codes"].bfloat16()),
        RuntimeError,
        "'exp_avg_codes' is .* of torch.bfloat16",
    ),
    "remainder of another shape": (
        lambda e: e.update(param_remainder=e["param_remainder"][:7].clone()),
        RuntimeError,
        r"'param_remainder' is \(7, 100\)",
    ),
    "remainder of 3 bytes": (
        lambda e: e.update(param_remainder=torch.zeros(20, 100, 3, dtype=torch.uint8)),
        RuntimeError,
        r"'param_remainder' is \(20, 100, 3\)",
    ),
    "remainder in pieces": (
        lambda e: e.update(param_remainder=torch.zeros(2, 20, 100, dtype=torch.uint8).permute(1, 2, 0)),
        RuntimeError,
        "'param_remainder' must be contiguous",
    ),
    "rounded masters": (
        lambda e: e.update(master_param=torch.zeros(20, 100, dtype=torch.bfloat16)),
        RuntimeError,
        "'master_param' is .* of torch.bfloat16",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_state_that_does_not_fit_is_refused_and_nothing_changed(broken):
    """The parameter is the last: those before it are not stepped either."""
    change, error, said = BROKEN[broken]
    params = weights(shapes=((4, 128), (20, 100)))
    optimizer = adamw([("first", params[0]), ("second", params[1])], **KEPT["split8, 8bit"])
    step(optimizer, 1, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved["state"][1])
    optimizer.load_state_dict(saved)
    before = snapshot(optimizer)
    with pytest.raises(error, match=r"AdamW: parameter 1 \(second\) of group 0.*" + said):
        step(optimizer, 3)
    assert_identical(snapshot(optimizer), before)


def test_a_rule_that_counts_nothing_misses_codes_too():
    """Lion would take a momentum that is not there for new."""
    import fusedcalib

    optimizer = fusedcalib.Lion(weights(shapes=((20, 100),)), backend="eager", **BYTES)
    step(optimizer, 1)
    (entry,) = entries(optimizer)
    del entry["exp_avg_codes"]
    with pytest.raises(KeyError, match="lacks 'exp_avg_codes'"):
        step(optimizer, 2)
