"""Compressed states and split parameters on every executor: the same bits, and those of the reference."""

import pytest
import torch
from kernel_cases import BACKENDS, FUSED, device_of
from kernel_storage import ARRANGEMENTS, BF16, BY_ROWS, F32, STORAGES, assert_same_bits, kept, stepped
from rule_cases import RULES

import fusedcalib
from fusedcalib.reference import ORACLES, storage

IN_BYTES = [name for name in RULES if name not in ("Adagrad", "AdEMAMix")]
# One, two and four states; of the others only rules differ, which other tests compile.
FEW = ("Lion", "RMSprop", "Adan")
OF_LOOPS = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in IN_BYTES]


# What "six" is made of is in the others.
FORMS = [pytest.param(form, marks=[pytest.mark.slow] * (form == "six")) for form in STORAGES]
LONG = [pytest.param(name, marks=[pytest.mark.slow] * (name == "strided")) for name in BY_ROWS]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("form", FORMS)
def test_executors_keep_the_same_bits(backend, form, arrangement):
    runs = [kept(*stepped(b, "AdamW", arrangement, STORAGES[form])) for b in (backend, "eager")]
    assert_same_bits(*runs)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", OF_LOOPS)
def test_every_rule_keeps_the_same_bits(backend, name):
    options = {k: v for k, v in RULES[name].options.items() if k != "centralize"} | STORAGES["seven"]
    runs = [kept(*stepped(b, name, "unaligned", options, steps=2)) for b in (backend, "eager")]
    assert_same_bits(*runs)


ALL_ON = {
    "centralize": True,
    "max_grad_norm": 1.0,
    "ema_decay": 0.9,
    "weight_decay": 0.1,
    "max_row_norm": 30.0,
    "stochastic_rounding": True,
}


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("arrangement", LONG)
def test_with_all_stages_executors_differ_by_row_sums_alone(backend, arrangement):
    """Sums in another order move values by fp32's errors, and few codes by one."""
    runs = [
        kept(*stepped(b, "AdamW", arrangement, STORAGES["seven"] | ALL_ON, steps=2))
        for b in (backend, "eager")
    ]
    assert runs[0].keys() == runs[1].keys()
    for name, t in runs[0].items():
        a, b = t.cpu().double(), runs[1][name].cpu().double()
        if name.split(" ")[0].endswith("codes"):
            assert (a - b).abs().max() <= 1, name
            assert (a != b).double().mean() < 0.01, name
        elif not name.startswith("param_remainder"):
            spacing = 2.0**-7 if name.startswith("parameter") else 2.0**-14  # a place of bf16
            assert ((a - b).abs() <= spacing * b.abs() + 1e-6).all(), name


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_which_of_its_states_cannot_be_negative(name):
    """Random gradients of both signs: a state that stays above zero has the code without a zero."""
    rule = RULES[name]
    p = torch.nn.Parameter(torch.zeros(4, 64))
    optimizer = rule.ours([p], **rule.options, backend="eager")
    lowest = {}
    for _ in range(5):
        p.grad = torch.randn(4, 64)
        optimizer.step()
        for state in optimizer.rule.states[optimizer.rule.variant(optimizer.param_groups[0])]:
            lowest[state] = min(lowest.get(state, 0.0), float(optimizer.state[p][state].min()))
    assert {state for state, least in lowest.items() if least >= 0} == optimizer.rule.nonnegative & {*lowest}


def decoded(entry, name, nonnegative):
    """A state in fp32."""
    if f"{name}_codes" not in entry:
        return entry[name].to(F32)
    decode = storage.decode_nonnegative if nonnegative else storage.decode_signed
    return decode(entry[f"{name}_codes"].cpu(), entry[f"{name}_scales"].cpu())


def weights_of(p, entry):
    """A parameter with split8, in fp64."""
    return storage.join(p.detach(), entry["param_remainder"].view(torch.int8), 8).double()


@pytest.mark.parametrize("arrangement", ["rows_in_blocks", "rows_with_ends", "strided"])
@pytest.mark.parametrize("centralize", [False, "gradient", "update"])
@pytest.mark.parametrize("name", IN_BYTES)
def test_a_step_is_that_of_the_reference_on_decoded_values(name, centralize, arrangement):
    """In fp64 from what is decoded before: within fp32's errors, and one code where that is at a boundary."""
    rule = RULES[name]
    options = {**rule.options, "centralize": centralize, **STORAGES["seven"], "state_dtype": "8bit"}
    optimizer, params = stepped("eager", name, arrangement, options, steps=2)
    states = optimizer.rule.states[optimizer.rule.variant(optimizer.param_groups[0])]
    nonnegative = optimizer.rule.nonnegative
    before = []
    for p in params:
        entry = optimizer.state[p]
        values = {s: decoded(entry, s, s in nonnegative).double() for s in states}
        values |= {k: v.clone() for k, v in entry.items() if k in ("step", "mu_product", *rule.of_rows)}
        before.append((weights_of(p, entry), values))
        p.grad = torch.randn(p.shape).to(BF16)
    optimizer.step()
    oracle = ORACLES[name]
    for p, (w, state) in zip(params, before, strict=True):
        wanted, new = oracle(w, p.grad.double(), state, **rule.options | {"centralize": centralize})
        entry = optimizer.state[p]
        found = weights_of(p, entry)
        # Half a place of 16 bits, and a thousand roundings of fp32 of the step itself.
        bound = 2.0**-16 * wanted.abs() + 2.0**-14 * (wanted - w).abs() + 1e-7
        assert ((found - wanted).abs() <= bound).all(), (p.shape, (found - wanted).abs().max())
        for s in states:
            if f"{s}_codes" not in entry:
                largest = new[s].abs().max().item()  # where terms cancel, of their errors
                torch.testing.assert_close(entry[s].double(), new[s], rtol=1e-5, atol=1e-6 * largest)
                continue
            encode = storage.encode_nonnegative if s in nonnegative else storage.encode_signed
            codes, scales = encode(new[s].float())
            torch.testing.assert_close(entry[f"{s}_scales"], scales, rtol=1e-5, atol=0)
            apart = (entry[f"{s}_codes"].int() - codes.int()).abs()
            assert apart.max() <= 1
            assert (apart != 0).float().mean() < 0.01


@pytest.mark.parametrize("name", RULES)
def test_split16_follows_fp32_bit_for_bit(name):
    """The same gradients in bf16: 200 steps of a bf16 parameter and 16 bits are those of an fp32 one."""
    rule = RULES[name]
    shared = {**rule.options, "backend": "eager", "ema_decay": 0.9, "max_grad_norm": 2.0, "max_row_norm": 3.0}
    torch.manual_seed(0)
    start = torch.randn(6, 65).to(BF16)
    single, half = torch.nn.Parameter(start.float()), torch.nn.Parameter(start.clone())
    ours = [
        rule.ours([single], **shared),
        rule.ours([half], **shared, master_weights="split16", state_dtype="float32"),
    ]
    for _ in range(200):
        half.grad = torch.randn(6, 65).to(BF16)
        single.grad = half.grad.float()
        for optimizer in ours:
            optimizer.step()
        remainder = ours[1].state[half]["param_remainder"].view(torch.int16).squeeze(-1)
        assert torch.equal(storage.join(half.detach(), remainder, 16), single.detach())
    ema = [optimizer.state[p]["ema"] for optimizer, p in zip(ours, (single, half), strict=True)]
    assert torch.equal(*ema)


HOSTILE = {
    "zeros": lambda x: x.zero_(),
    "one outlier": lambda x: x.mul_(1e-3).index_fill_(1, torch.tensor([5]), 1e6),
    "denormal": lambda x: x.mul_(1e-41),
    "small": lambda x: x.mul_(2.0**-106),
    "nan": lambda x: x.index_fill_(1, torch.tensor([3]), float("nan")),
    "infinite": lambda x: x.index_fill_(1, torch.tensor([3]), float("-inf")),
    "huge": lambda x: x.mul_(1e37),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [32, 63, 64, 65, 200])
def test_hostile_blocks_are_kept_as_by_the_reference(backend, columns):
    """The first buffer of momentum is the gradient, that of RMSprop without memory its square."""
    device = device_of(backend)
    x = torch.cat([make(torch.randn(2, columns)) for make in HOSTILE.values()])
    for rule, encode, options, values in (
        ("SGD", storage.encode_signed, {"momentum": 0.5}, x),
        ("RMSprop", storage.encode_nonnegative, {"alpha": 0.0}, x * x),
    ):
        p = torch.nn.Parameter(torch.zeros_like(x, device=device))
        p.grad = x.to(device)
        optimizer = getattr(fusedcalib, rule)(
            [p], lr=0.0, state_dtype="8bit", min_8bit_size=0, backend=backend, **options
        )
        optimizer.step()
        (name,) = (key.removesuffix("_codes") for key in optimizer.state[p] if key.endswith("_codes"))
        codes, scales = (optimizer.state[p][f"{name}_{part}"].cpu() for part in ("codes", "scales"))
        wanted = encode(values)
        assert torch.equal(scales.view(torch.int32), wanted[1].view(torch.int32))
        assert torch.equal(codes, wanted[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_written_from_outside_is_what_a_step_begins_with(backend):
    """Zeroed, set or scaled, a parameter keeps what it was given to half of its last place, and its sign."""
    device = device_of(backend)
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4, 64, device=device).to(BF16))
    optimizer = fusedcalib.SGD([p], lr=1e-3, master_weights="split16", backend=backend)
    for change in (lambda: p.zero_(), lambda: p.fill_(1.0), lambda: p.mul_(2), lambda: p.neg_()):
        p.grad = torch.randn(4, 64, device=device).to(BF16)
        optimizer.step()
        with torch.no_grad():
            change()
        before = p.detach().double()
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 1e-3
        remainder = optimizer.state[p]["param_remainder"].view(torch.int16).squeeze(-1).cpu()
        weights = storage.join(p.detach().cpu(), remainder, 16).double()
        assert ((weights - before.cpu()).abs() <= 2.0**-8 * before.cpu().abs() + 1e-38).all()


@pytest.mark.parametrize("backend", FUSED)
def test_small_steps_are_not_lost_at_random(backend):
    """A weight of 1 moves by n steps of 2^-20 with split8 and random bits; to nearest it stands still."""
    device, steps = device_of(backend), 64
    for stochastic, moved in ((True, steps * 2.0**-20), (False, 0.0)):
        p = torch.nn.Parameter(torch.ones(64, 64, dtype=BF16, device=device))
        options = {"master_weights": "split8", "stochastic_rounding": stochastic, "backend": backend}
        optimizer = fusedcalib.SGD([p], lr=2.0**-20, **options)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        low = optimizer.state[p]["param_remainder"].view(torch.int8).cpu()
        distance = 1 - storage.join(p.detach().cpu(), low, 8).double().mean()
        # A step is 1/16 of a place of 2^-16 below 1: of n 4096 draws the mean has this standard error.
        error = 2.0**-16 * (steps / 16 * 15 / 16 / 4096) ** 0.5
        assert abs(distance - moved) <= 4 * error if stochastic else distance == 0


@pytest.mark.parametrize("form", ["exact", "seven", "six"])
def test_bytes_are_those_of_the_form(form):
    """Of a matrix, with its gradient: 14, 7.125, 6.125 bytes a parameter, and two counters of 4 bytes."""
    p = torch.nn.Parameter(torch.randn(64, 512).to(BF16))
    p.grad = torch.randn(64, 512).to(BF16)
    optimizer = fusedcalib.AdamW([p], **STORAGES[form], backend="eager")
    optimizer.step()
    wanted = {"exact": 14, "seven": 7 + 2 * 4 / 64, "six": 6 + 2 * 4 / 64}[form] * p.numel() + 4
    assert optimizer.state_bytes()["total"] == wanted


@pytest.mark.parametrize("backend", FUSED)
def test_small_parameters_take_one_more_launch(backend):
    """Matrices in bytes are a launch, biases and small matrices with fp32 states another: two for a model."""
    device = device_of(backend)
    shapes = [(64, 128), (128,), (128, 64), (64,), (8, 16), (256, 64)] * 5
    params = [torch.nn.Parameter(torch.randn(s, device=device).to(BF16)) for s in shapes]
    optimizer = fusedcalib.AdamW(params, **STORAGES["seven"], backend=backend)
    for p in params:
        p.grad = torch.randn_like(p)
    plan = optimizer._engine.prepare(optimizer.param_groups, optimizer.state)
    assert plan.step() == 2
