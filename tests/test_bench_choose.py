"""What the words of the benchmark tool choose: rules, features, lists, and the libraries beside ours."""

import sys

import pytest
import torch
from bench_subjects import CPU, LITTLE, fake_library

import fusedcalib
import fusedcalib.reference
from fusedcalib import __main__ as command
from fusedcalib.bench.env import machine
from fusedcalib.bench.measure import case, choose, gate, method, rivals
from fusedcalib.bench.models import shapes


@pytest.fixture
def fake(monkeypatch):
    return fake_library(monkeypatch)


# -- rivals


def test_a_rival_is_told_all_of_the_rule(fake):
    found, arguments, _ = rivals.RIVALS["optimi"].find(method.ADAMW, gpu=True)
    assert found is fake
    assert arguments == {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "triton": True}
    assert "triton" not in rivals.RIVALS["optimi"].find(method.ADAMW, gpu=False)[1]


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        (method.SUBJECTS["AdamW amsgrad"], "AdamW has no option 'amsgrad'"),
        (method.SUBJECTS["Adagrad"], "optimi has no Adagrad"),
    ],
)
def test_what_a_rival_has_not_is_said(fake, subject, message):
    with pytest.raises(method.NotAvailableError, match=message):
        rivals.RIVALS["optimi"].find(subject, gpu=False)


def test_torchs_own_class_is_no_rival(fake, monkeypatch):
    monkeypatch.setattr(sys.modules["optimi"], "AdamW", torch.optim.AdamW)
    with pytest.raises(method.NotAvailableError, match=r"torch\.optim's own class"):
        rivals.RIVALS["optimi"].find(method.ADAMW, gpu=False)


def test_every_rival_names_rules_that_there_are():
    for rival in rivals.RIVALS.values():
        assert rival.classes.keys() <= fusedcalib.optimizers().keys()


@pytest.mark.parametrize("cls", fusedcalib.optimizers())
def test_the_reference_takes_all_that_is_called_an_option_of_the_rule(cls):
    options = method.Subject(cls, {"lr": 0.5}).rule_options()
    assert options["lr"] == 0.5
    assert {"lr", "weight_decay", "maximize", "l1"} <= options.keys()
    assert not {"backend", "centralize", "noise", "fused"} & options.keys()
    ones = torch.ones(2, 2, dtype=torch.float64)
    assert fusedcalib.reference.ORACLES[cls](ones, ones, {}, **options)[0].isfinite().all()


def adamw_in_fp32(params, lr=1e-3):
    """AdamW whose bias corrections are made in fp32, as torch.compile makes them."""
    states = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    taken = torch.zeros(())

    @torch.no_grad()
    def step():
        taken.add_(1)
        first, second = (1 - torch.tensor(beta) ** taken for beta in (0.9, 0.999))
        for p, (m, v) in zip(params, states, strict=True):
            m.lerp_(p.grad, 1 - 0.9)
            v.mul_(0.999).addcmul_(p.grad, p.grad, value=1 - 0.999)
            p.mul_(1 - lr * 0.01).sub_(lr * (m / first) / ((v / second).sqrt() + 1e-8))

    return step


@pytest.mark.parametrize(
    ("narrow", "lr", "passes"), [(True, 1e-3, True), (True, 1.001e-3, False), (False, 1e-3, False)]
)
def test_numbers_in_fp32_are_allowed_to_those_that_have_them(narrow, lr, passes):
    params = shapes.build(LITTLE, CPU)
    entry = gate.Entry(gate.Kind(narrow=narrow), params, adamw_in_fp32(params, lr))
    assert gate.check(LITTLE, {"it": entry}, method.ADAMW)["it"].passed is passes


# -- the command


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--optimizer", "Adamm"], "--optimizer Adamm: there are ADOPT, "),
        (["--set", "lr"], "expected name=value"),
        (["--set", "lr=1e-3e"], "is no value of Python"),
        (["--set", "momentum=0.9"], "--set momentum: no option of AdamW"),
        (["--set", "lr=-1.0"], "--optimizer AdamW with lr=-1.0: Invalid learning rate"),
        (["--set", "centralize='update'"], "only True and False"),
        (["--set", "ema_decay=2"], "expected a number between 0 and 1"),
        (["--with", "clip,momentum"], "--with momentum: there are clip, noise, centralize, ema"),
        (["--model", "gpt5"], "--model gpt5: there are gpt2, "),
        (["--shapes", "no-such-file.json"], "no-such-file.json cannot be read"),
        (["--hf-config", "no-such-file.json"], "no-such-file.json cannot be read"),
        (["--against", "adam"], "--against adam: there are fused, foreach, for-loop, compile, apex"),
        (["--json", "no/such/folder.json"], "there is no folder"),
        (["--model", "llama3-405b"], "take a smaller --model, or fewer of them with --against"),
    ],
)
def test_wrong_words_are_named_and_mended(given, message, capsys):
    assert command.main(["bench", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fusedcalib bench: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys):
    assert command.main(["bench", "--device", "cuda"]) == 2
    assert "use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "tensors", "params"), [("gpt2", 148, 124_439_808), ("vit-b", 152, 86_567_656)]
)
def test_models_by_the_names_that_people_use(name, tensors, params):
    (spec,) = choose.lists_from([name], [], [])
    assert (spec.tensors, spec.params) == (tensors, params)


def test_values_that_are_not_the_usual_are_in_the_name():
    options = {"max_grad_norm": 0.5, "lr": 0.1}
    extras = choose.features_from(["ema"], options)
    assert options == {"lr": 0.1}
    assert choose.key_of(extras) == "clip=0.5+ema"
    assert choose.title_of(extras, "GC") == "clip, EMA"
    assert choose.key_of(choose.features_from([], {})) == ""


def test_memory_that_is_needed():
    subject = choose.subjects_from(["AdamW"], {})[0]
    methods = choose.methods_for(choose.features_from(["ema"], {}), ["fused"])
    one = case.Case(LITTLE, methods, subject=subject)
    assert choose.needed_bytes(one) == LITTLE.params * (2 * 16 + 2 * 20)
    assert machine.free_bytes(CPU) is None or machine.free_bytes(CPU) > 2**20
